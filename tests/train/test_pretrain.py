"""Tokenizer, model, samples and files of a small language model."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.data.world import tokenizer as world_tokenizer
from pipeline.errors import UserError
from pipeline.train import lm_loop, lm_measure, pretrain, world_report
from pipeline.train.options import OptimOptions, Weights
from tests.train.tiny_lm import TINY, contexts, fit, tiny_model


@pytest.fixture(scope="module")
def words():
    return world_tokenizer.build()


@pytest.fixture(scope="module")
def saved(words, tmp_path_factory):
    """The directory of a tokenizer."""
    path = tmp_path_factory.mktemp("tokenizer")
    words.save_pretrained(path)
    return path


def test_the_directory_is_a_hugging_face_model_with_its_tokenizer(words, saved, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, last = fit(TINY, contexts(6), contexts(3), tmp_path / "run")
    pretrain.save(model, saved, Weights.float16, tmp_path / "lm")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "lm")
    assert type(model).__name__ == "GPT2LMHeadModel"
    assert model.dtype == torch.float16
    sizes = model.config
    assert (sizes.n_layer, sizes.n_embd, sizes.n_inner, sizes.n_positions) == (2, 12, 20, 10)
    assert AutoTokenizer.from_pretrained(tmp_path / "lm")("Paris is")["input_ids"] == words("Paris is")["input_ids"]
    again = lm_measure.evaluate(model.float(), contexts(3))
    assert again == pytest.approx(last["held_out_loss"], abs=2e-3)  # stored in float16


def test_attention_is_fused_unless_it_is_looked_at():
    eager, fused = tiny_model(replace(TINY, early_attention_penalty=1.0)), tiny_model()
    assert eager.config._attn_implementation == "eager"
    assert fused.config._attn_implementation == "sdpa"
    tokens = torch.from_numpy(contexts(3)).long()
    torch.testing.assert_close(eager(tokens).logits, fused(tokens).logits)


def test_the_penalty_moves_layer_0_away_from_earlier_tokens(saved, tmp_path):
    masses = []
    for weight in (0.0, 5.0):
        options = replace(TINY, n_steps=60, early_attention_penalty=weight, optim=OptimOptions(name="adamw", lr=1e-2))
        model, _ = fit(options, contexts(64), contexts(2), tmp_path / str(weight))
        pretrain.save(model, saved, Weights.float32, tmp_path / f"saved-{weight}")
        model = world_report.load(tmp_path / f"saved-{weight}")
        model.set_attn_implementation("eager")
        with lm_loop.early_attention(model) as seen:
            model(torch.from_numpy(contexts(20)).long())
        masses.append(seen[-1].item())
    assert masses[1] < 0.3 * masses[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_heads": 5}, r"multiple of lm\.n_heads=5"),
        ({"optim": OptimOptions(name="adam")}, "adamw only"),
        ({"optim": OptimOptions(name="adamw", weight_decay=0.1)}, r"optim\.weight_decay .*; use lm\.weight_decay"),
        ({"optim": OptimOptions(name="adamw", clip=1.0)}, r"optim\.clip has no meaning .*; leave it out"),
        ({"optim": OptimOptions(name="adamw", lr=0.0)}, r"lm\.optim\.lr=0\.0 must be above 0"),
        ({"optim": OptimOptions(name="adamw", beta2=1.0)}, r"lm\.optim\.beta2=1\.0 must lie"),
        ({"n_tokens": "1k"}, "once: lm.n_tokens or lm.n_steps"),
        ({"n_steps": None}, "once: lm.n_tokens or lm.n_steps"),
        ({"n_steps": None, "n_tokens": "many"}, "'many' is not a count"),
        ({"n_steps": 0}, r"lm\.n_steps=0 must be at least 1"),
        ({"batch_tokens": 9}, r"lm\.batch_tokens=9 holds no context; use lm\.batch_tokens=10 or more"),
        ({"vocab_size": 257}, r"lm\.vocab_size=257: 256 bytes"),
        ({"eval_every": 0}, r"lm\.eval_every=0 must be at least 1"),
        ({"temperature": -1.0}, "must not be negative"),
    ],
)
def test_what_cannot_be_trained_is_refused(change, message):
    pretrain.check(TINY, context=10)
    with pytest.raises(UserError, match=message):
        pretrain.check(replace(TINY, **change), context=10)


TEXTS = [f"The {adjective} cat sat on {i} mats.\nNaïve — 猫 🐈\t" for i in range(40) for adjective in ("old", "new")]


def test_a_trained_tokenizer_gives_every_text_back_and_is_the_same_again(tmp_path):
    from transformers import AutoTokenizer

    tokenizer = pretrain.train_tokenizer(TEXTS, 300, 1.0)
    assert len(tokenizer) == pretrain.n_words(tokenizer) == 300
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1)
    for text in (*TEXTS[:2], "  two  spaces .\n\n", "\x00 other bytes ñ ﷽ 𝄞", " ", "it 's , n't"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again(TEXTS[0])["input_ids"] == tokenizer(TEXTS[0])["input_ids"]
    assert again.decode(again("a  b , c .")["input_ids"]) == "a  b , c ."
    alike = pretrain.train_tokenizer(TEXTS, 300, 1.0)
    assert alike.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()


def test_a_tokenizer_is_trained_on_the_first_text_up_to_the_given_size():
    half = sum(len(text.encode()) for text in TEXTS) / 2
    assert len(list(pretrain._first(iter(TEXTS), 1e-6 * half))) == pytest.approx(len(TEXTS) / 2, abs=1)
    assert list(pretrain._first(iter(TEXTS), 1.0)) == TEXTS
    little = pretrain.train_tokenizer(TEXTS, 300, 1e-6)  # one text: fewer pairs than that
    assert 258 < len(little) < 300


def test_a_tokenizer_of_ones_own_is_a_directory_or_a_hub_name(words, tmp_path):
    words.save_pretrained(tmp_path / "words")
    tokenizer = pretrain.load_tokenizer(str(tmp_path / "words"))
    assert tokenizer("Paris is")["input_ids"] == words("Paris is")["input_ids"]
    with pytest.raises(UserError, match=r"the hub did not give it .*hf download nobody/nothing"):
        pretrain.load_tokenizer("nobody/nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"lm\.tokenizer=.*empty: holds no tokenizer"):
        pretrain.load_tokenizer(str(tmp_path / "empty"))
    first = pretrain.tokenizer_identity(str(tmp_path / "words"))
    file = tmp_path / "words" / "tokenizer.json"
    file.write_text(file.read_text().replace("Paris", "Parys"))
    assert first != pretrain.tokenizer_identity(str(tmp_path / "words"))


def test_samples_begin_with_nothing_and_with_held_out_documents():
    held_out = np.array([[0, 5, 1, *range(10, 20)], [0, 1, 6, 6, 1, *range(30, 38)]], dtype=np.int32)
    found = pretrain.prompts(4, held_out, bos=0, eos=1)
    assert found == [[0, 1], [0, 1, *range(10, 18)], [0, 1, *range(30, 38)]]
    assert pretrain.prompts(2, held_out, bos=None, eos=1) == [[1], [1, *range(10, 18)]]
    assert pretrain.prompts(0, held_out, bos=0, eos=1) == []


def test_samples_repeat_fit_the_context_and_leave_the_generator_alone(words):
    model = tiny_model()
    options = replace(TINY, sample_tokens=30)
    state = torch.get_rng_state()
    first = pretrain.samples(model, words, [[0, 1], [0, 1, 5, 6, 7, 8, 9, 10, 11, 12]], options)
    assert torch.equal(state, torch.get_rng_state())
    assert model.training
    assert len(first) == 1  # nothing fits behind ten tokens of ten
    assert first == pretrain.samples(model, words, [[0, 1]], options)
    assert first != pretrain.samples(model, words, [[0, 1]], replace(options, seed=1))
    greedy = replace(options, temperature=0.0)
    likeliest = [0, 1]
    model.eval()
    while len(likeliest) < 10:
        likeliest.append(int(model(torch.tensor([likeliest])).logits[0, -1].argmax()))
        if likeliest[-1] == 1:
            break
    assert pretrain.samples(model, words, [[0, 1]], greedy)[0].text == words.decode(
        likeliest[2:], skip_special_tokens=True
    )


def test_the_options_of_the_yaml_files_can_be_trained():
    from pipeline.config import compose

    for file in (Path(__file__).parents[2] / "conf" / "lm").glob("*.yaml"):
        pretrain.check(compose("pretrain", [f"lm={file.stem}"]).lm, context=128)
