"""The training loop of a language model: what it computes, and that stopping changes nothing."""

import json
import math
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch

from pipeline.data.world import tokenizer as world_tokenizer
from pipeline.errors import UserError
from pipeline.train import lm_loop, lm_run, pretrain
from pipeline.train.options import OptimOptions
from pipeline.train.schedule import learning_rate
from tests.train.tiny_lm import SETTINGS, TINY, Stop, contexts, fit, stop_at, tiny_model, weights


def test_a_pattern_is_learnt(tmp_path):
    options = replace(TINY, n_steps=150, batch_tokens=160, optim=OptimOptions(name="adamw", lr=1e-2))
    _, last = fit(options, contexts(64), contexts(8, seed=1), tmp_path / "lm")
    assert last["tokens"] == 150 * 160
    # Only the first token is a surprise: 37 choices, one ninth of the predictions.
    assert math.log(37) / 9 - 0.05 < last["held_out_loss"] < 0.7


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(tmp_path):
    a, b, c = (
        weights(fit(replace(TINY, seed=seed), contexts(6), contexts(2), tmp_path / name)[0])
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def plain_loop(options, train):
    """What a run computes, without anything around it."""
    model = tiny_model(options)
    groups = [{"params": [p for p in model.parameters() if (p.dim() >= 2) == matrix]} for matrix in (True, False)]
    groups[0]["weight_decay"], groups[1]["weight_decay"] = options.weight_decay, 0.0
    betas = (options.optim.beta1, options.optim.beta2)
    optimizer = torch.optim.AdamW(groups, lr=options.optim.lr, betas=betas, fused=True)
    order = np.random.default_rng(options.seed)
    epochs = np.concatenate([order.permutation(len(train)) for _ in range(12)])
    per_step = options.batch_tokens // train.shape[1]
    with lm_loop.early_attention(model) as seen:
        for step in range(options.n_steps):
            tokens = torch.from_numpy(train[epochs[step * per_step : (step + 1) * per_step]]).long()
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(options.optim, step, options.n_steps)
            with torch.autocast("cpu", torch.bfloat16):
                logits = model(tokens, use_cache=False).logits
            loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten())
            (loss + options.early_attention_penalty * seen[-1]).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    return weights(model)


def test_a_run_is_the_plain_loop_to_the_last_bit_whatever_is_looked_at_on_the_way(tmp_path):
    options = replace(TINY, early_attention_penalty=1.0, eval_every=5, log_every=3, checkpoint_every=4)
    work = lm_run.start(tmp_path / "lm", SETTINGS)
    model = tiny_model(options)
    plan = lm_loop.make_plan(options, 7, 10, torch.bfloat16)
    begun = pretrain.prompts(3, contexts(4), bos=0, eos=1)
    words = world_tokenizer.build()
    lm_loop.fit(
        options, plan, model, contexts(7), contexts(4), work, lambda: pretrain.samples(model, words, begun, options)
    )
    assert torch.equal(weights(model), plain_loop(options, contexts(7)))


@pytest.mark.parametrize("step", [3, 4, 6, 9, 12])
def test_a_run_that_failed_anywhere_ends_at_the_same_weights_and_losses(step, tmp_path, monkeypatch):
    options = replace(TINY, checkpoint_every=4, log_every=1, eval_every=6)
    straight, last = fit(options, contexts(7), contexts(3), tmp_path / "straight")
    taken = stop_at(step, monkeypatch)
    with pytest.raises(Stop):
        fit(options, contexts(7), contexts(3), tmp_path / "lm")
    again, again_last = fit(options, contexts(7), contexts(3), tmp_path / "lm")
    assert len(taken) == step + 12 - 4 * ((step - 1) // 4)  # what the last checkpoint holds is not done again
    assert torch.equal(weights(straight), weights(again))
    old, new = (
        [json.loads(line) for line in (tmp_path / f".{name}.training" / "metrics.jsonl").read_text().splitlines()]
        for name in ("straight", "lm")
    )
    for line in (*old, *new, last, again_last):
        line.pop("tokens_per_s", None)
    assert old == new
    assert last == again_last


def test_ctrl_c_saves_where_it_stopped(tmp_path):
    options = replace(TINY, eval_every=5)
    straight, _ = fit(options, contexts(7), contexts(3), tmp_path / "straight")
    with pytest.raises(KeyboardInterrupt):
        fit(options, contexts(7), contexts(3), tmp_path / "lm", show=lambda: signal.raise_signal(signal.SIGINT))
    steps = [path.name for path in (tmp_path / ".lm.training" / "checkpoints").iterdir()]
    assert steps == ["step_5"]
    again, _ = fit(options, contexts(7), contexts(3), tmp_path / "lm")
    assert torch.equal(weights(straight), weights(again))


def test_a_loss_that_is_not_finite_ends_the_run_with_the_fix(tmp_path):
    options = replace(TINY, optim=OptimOptions(name="adamw", lr=1e30, warmup=0.0), log_every=1)
    with pytest.raises(UserError, match=r"no longer finite at step \d+; lower lm\.optim\.lr=1e\+30"):
        fit(options, contexts(6), contexts(2), tmp_path / "lm")


def test_early_attention_is_the_mean_mass_of_layer_0_on_earlier_tokens_but_the_first():
    model = tiny_model(replace(TINY, early_attention_penalty=1.0))
    tokens = torch.from_numpy(contexts(3)).long()
    with torch.no_grad(), lm_loop.early_attention(model) as seen:
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


def test_every_context_comes_once_an_epoch():
    batches = list(lm_loop.batches(n=7, per_step=3, n_steps=7, seed=0))
    rows = np.concatenate(batches)
    assert {len(batch) for batch in batches} == {3}
    assert [sorted(rows[i : i + 7]) for i in (0, 7, 14)] == [list(range(7))] * 3
    assert list(rows[:7]) != list(rows[7:14])


def test_a_length_in_tokens_is_a_number_of_steps_and_many_epochs_are_warned_about(caplog):
    options = replace(TINY, n_steps=None, n_tokens="2k", batch_tokens=45)  # 4 contexts of 10
    plan = lm_loop.make_plan(options, n_contexts=100, context=10, dtype=torch.float32)
    assert (plan.n_steps, plan.per_step, plan.n_tokens, plan.epochs) == (50, 4, 2000, 2.0)
    assert not caplog.records
    lm_loop.make_plan(options, n_contexts=20, context=10, dtype=torch.float32)
    assert "10 epochs" in caplog.text
