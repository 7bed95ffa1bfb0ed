"""Training a language model from scratch, on a tiny scale."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.data.options import DatasetKind, DatasetOptions
from pipeline.data.world import tokenizer as world_tokenizer
from pipeline.errors import UserError
from pipeline.stages import pretrain as stage
from pipeline.stages.options import PretrainConfig
from pipeline.train import pretrain, world_report
from pipeline.train.options import LmOptions, OptimOptions, Weights

TINY = LmOptions(name="tiny", n_layers=2, d_model=12, n_heads=3, d_mlp=20, n_steps=12, batch_tokens=40)


@pytest.fixture(scope="module")
def words():
    return world_tokenizer.build()


def contexts(n, context=10, seed=0):
    """<bos>, then each token the one before it plus one."""
    start = np.random.default_rng(seed).integers(3, 40, size=(n, 1))
    tokens = (start + np.arange(context)).astype(np.int32)
    tokens[:, 0] = 0
    return tokens


def tiny_model(options=TINY, seed=0):
    torch.manual_seed(seed)
    return pretrain.build(options, n_words=57, context=10, bos=0, eos=1)


def test_a_pattern_is_learnt(words, tmp_path):
    options = replace(TINY, n_steps=150, batch_tokens=160, optim=OptimOptions(name="adamw", lr=1e-2))
    result = pretrain.fit(options, contexts(64), contexts(8, seed=1), words, tmp_path / "lm")
    assert result["n_tokens"] == 150 * 160
    # Only the first token is a surprise: 37 choices, one ninth of the predictions.
    assert math.log(37) / 9 - 0.05 < result["held_out_loss"] < 0.7


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(words, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        pretrain.fit(replace(TINY, seed=seed), contexts(6), contexts(2), words, tmp_path / name)
    alike = np.repeat(contexts(1), 6, axis=0)  # no order to differ by: the seed is also that of the first weights
    for name, seed in (("d", 0), ("e", 1)):
        pretrain.fit(replace(TINY, seed=seed), alike, contexts(2), words, tmp_path / name)
    a, b, c, d, e = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abcde")
    assert a == b
    assert a != c
    assert d != e
    assert not list(tmp_path.glob(".*"))


def test_the_directory_is_a_hugging_face_model_with_its_tokenizer(words, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options = replace(TINY, weights=Weights.float16)
    result = pretrain.fit(options, contexts(6), contexts(3), words, tmp_path / "lm")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "lm")
    assert type(model).__name__ == "GPT2LMHeadModel"
    assert model.dtype == torch.float16
    sizes = model.config
    assert (sizes.n_layer, sizes.n_embd, sizes.n_inner, sizes.n_positions) == (2, 12, 20, 10)
    assert AutoTokenizer.from_pretrained(tmp_path / "lm")("Paris is")["input_ids"] == words("Paris is")["input_ids"]
    again = pretrain.evaluate(model.float(), contexts(3))
    assert again == pytest.approx(result["held_out_loss"], abs=2e-3)  # stored in float16
    assert result["n_parameters"] == sum(p.numel() for p in model.parameters())


def test_early_attention_is_the_mean_mass_of_layer_0_on_earlier_tokens_but_the_first():
    model = tiny_model()
    tokens = torch.from_numpy(contexts(3)).long()
    with torch.no_grad(), pretrain.early_attention(model) as seen:
        out = model(tokens, output_attentions=True)
    weights = out.attentions[0]
    n, n_heads, context, _ = weights.shape
    mass = [
        float(weights[b, h, i, j])
        for b in range(n)
        for h in range(n_heads)
        for i in range(context)
        for j in range(1, i)
    ]
    assert seen[-1].item() == pytest.approx(sum(mass) / (n * n_heads * context), rel=1e-5)
    kept = seen[-1]
    model(tokens)
    assert seen[-1] is kept  # closed


def test_the_penalty_moves_layer_0_away_from_earlier_tokens(words, tmp_path):
    masses = []
    for weight in (0.0, 5.0):
        options = replace(TINY, n_steps=60, early_attention_penalty=weight, optim=OptimOptions(name="adamw", lr=1e-2))
        to = tmp_path / str(weight)
        pretrain.fit(options, contexts(64), contexts(2), words, to)
        model = world_report.load(to)
        model.set_attn_implementation("eager")
        with pretrain.early_attention(model) as seen:
            model(torch.from_numpy(contexts(20)).long())
        masses.append(seen[-1].item())
    assert masses[1] < 0.3 * masses[0]


def test_the_loss_is_the_mean_negative_log_probability_of_the_next_token():
    torch.manual_seed(0)
    logits, tokens = torch.randn(3, 5, 7), torch.randint(7, (3, 5))
    slow = [-logits[n, t].log_softmax(-1)[tokens[n, t + 1]].item() for n in range(3) for t in range(4)]
    assert pretrain.next_token_loss(logits, tokens).item() == pytest.approx(np.mean(slow), rel=1e-6)


def test_the_held_out_loss_weighs_every_context_alike():
    model = tiny_model()
    rows = contexts(pretrain.EVAL_BATCH + 5)
    one_by_one = [pretrain.evaluate(model, rows[i : i + 1]) for i in range(len(rows))]
    assert pretrain.evaluate(model, rows) == pytest.approx(np.mean(one_by_one), rel=1e-5)


def test_every_context_comes_once_an_epoch():
    batches = list(pretrain._batches(n=7, per_step=3, n_steps=7, seed=0))
    rows = np.concatenate(batches)
    assert {len(batch) for batch in batches} == {3}
    assert [sorted(rows[i : i + 7]) for i in (0, 7, 14)] == [list(range(7))] * 3
    assert list(rows[:7]) != list(rows[7:14])


def test_what_cannot_be_trained_is_refused_before_anything_is_written(words, tmp_path):
    (tmp_path / "there").mkdir()
    with pytest.raises(UserError, match="exists already"):
        pretrain.fit(TINY, contexts(6), contexts(2), words, tmp_path / "there")
    with pytest.raises(UserError, match=r"multiple of lm\.n_heads=5"):
        pretrain.fit(replace(TINY, n_heads=5), contexts(6), contexts(2), words, tmp_path / "new")
    with pytest.raises(UserError, match="adamw only"):
        pretrain.fit(replace(TINY, optim=OptimOptions(name="adam")), contexts(6), contexts(2), words, tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


def world_dataset(**changes):
    return DatasetOptions(name="world", kind=DatasetKind.world, **{"n_tokens": "2k", "held_out": 2, **changes})


def test_the_command_writes_a_model_and_a_report_of_what_it_knows(tmp_path, monkeypatch):
    monkeypatch.setattr(world_report, "N_DOCUMENTS", 600)
    cfg = PretrainConfig(lm=replace(TINY, n_steps=4), dataset=world_dataset(), to=str(tmp_path / "new" / "lm"))
    to = stage.run(cfg)
    assert to == tmp_path / "new" / "lm"
    report = json.loads((to / "world.json").read_text())
    assert report["command"].startswith("clt pretrain lm=tiny dataset=world dataset.n_tokens=2k")
    assert report["lm"]["seed"] == 0
    # The model has seen 160 tokens: it knows nothing, and the generator's own loss is far below.
    assert report["losses"]["held_out_loss"] > 5 > 1.1 > report["losses"]["floor"] > 0.8
    assert max(score["accuracy"] for score in report["tasks"].values()) < 0.9
    assert report["swap_layer_0_mlp"]["capital"]["n"] == 1560
    assert [path.name for path in to.parent.iterdir()] == ["lm"]


def test_other_text_than_the_world_is_refused(tmp_path):
    dataset = DatasetOptions(name="text", kind=DatasetKind.text, n_tokens="all", path=str(Path(__file__)))
    with pytest.raises(UserError, match="use dataset=world"):
        stage.run(PretrainConfig(lm=TINY, dataset=dataset, to=str(tmp_path / "lm")))
    assert not list(tmp_path.iterdir())
