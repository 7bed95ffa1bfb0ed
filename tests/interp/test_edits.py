"""What single features write, and edits of a model and its replacement, against sums and plain hooks."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from pipeline.arch.base import Dims
from pipeline.arch.options import Tie
from pipeline.arch.table import ARCHS
from pipeline.core.activations import FixedThreshold
from pipeline.core.sparse import sparsify
from pipeline.data import models
from pipeline.data.models import LanguageModel
from pipeline.data.options import ModelOptions
from pipeline.interp.edits import Sides, features_of, one_each, written
from tests import oracle
from tests.interp.test_replacement import random, slow_hooks, tokens

B, L, F, D = 5, 3, 11, 6

VARIANTS = {
    **{name: oracle.arch_options(name) for name in ARCHS},
    "clt, next layer": oracle.arch_options("clt", max_reach=1, skip=True),
    "tied, offset": oracle.arch_options("tied", offset=True, skip=True),
    "tied to target": oracle.arch_options("tied", tie=Tie.target, offset=True),
}


@pytest.fixture(scope="module")
def lm(tiny_gpt2: Path) -> LanguageModel:
    return models.load(ModelOptions(name="local", path=str(tiny_gpt2)))


@pytest.mark.parametrize("name", sorted(VARIANTS))
def test_what_one_feature_writes_is_its_term_of_the_sum(name: str) -> None:
    options = VARIANTS[name]
    n_sources = ARCHS[options.name].sources(Dims(L, D))
    model = oracle.transcoder(options, FixedThreshold(oracle.normal(n_sources, F, seed=3).abs()), dtype=torch.float64)
    x, source, weights = oracle.normal(B, L, D), n_sources - 1, model.weights()
    ids, values = torch.tensor([3, 0, 10, 3, 7]), torch.tensor([0.5, 2.0, 0.1, 1.5, 0.7], dtype=torch.float64)
    got = written(model, one_each(model, source, ids, values), x)
    assert got.shape == (B, L, D)
    if options.name == "molt":  # the others' gates are shut
        dense = torch.zeros(B, n_sources, F, dtype=torch.float64)
        dense[torch.arange(B), source, ids] = values
        torch.testing.assert_close(got, model.decode(dense, x) - model.b_dec)
        assert got[:, source].abs().min() > 0
        assert got[:, :source].abs().max() < 1e-15
        return
    for b in range(B):
        for m in range(L):
            expected = torch.zeros(D, dtype=torch.float64)
            if oracle.writes(options, source, m):
                expected = oracle.sent_row(options, weights, source, m, int(ids[b]), values[b])
            torch.testing.assert_close(got[b, m], expected, rtol=1e-12, atol=1e-14)


def test_features_are_those_of_the_transcoder() -> None:
    for name in ("clt", "crosscoder", "tied"):
        model = random(name)
        x = torch.randn(7, 3, 20, generator=torch.Generator().manual_seed(1))
        torch.testing.assert_close(features_of(model, x).dense(), sparsify(model(x, True).features).dense())


def test_the_state_is_that_of_the_model(lm: LanguageModel, tiny_gpt2: Path) -> None:
    seen: list[tuple[Tensor, Tensor]] = []

    def keep(layer: int, resid: Tensor, normed: Tensor, own: Tensor) -> Tensor:
        seen.append((normed, own))
        return own

    logits = slow_hooks(tiny_gpt2, tokens(), keep)
    state = Sides(lm, random("clt")).state(tokens())
    for got, expected in (
        (state.logits, logits),
        (state.x, torch.stack([normed for normed, _ in seen], dim=2)),
        (state.mlp_out, torch.stack([own for _, own in seen], dim=2)),
    ):
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)


def test_an_edited_model_is_live_behind_the_edit(lm: LanguageModel, tiny_gpt2: Path) -> None:
    added = torch.randn(3, 20, generator=torch.Generator().manual_seed(2))

    def slow(layer: int, resid: Tensor, normed: Tensor, own: Tensor) -> Tensor:
        own = own.clone()
        own[1, 4] += added[layer]
        return own

    def edit(layer: int, out: Tensor) -> Tensor:
        return slow(layer, out, out, out)

    expected = slow_hooks(tiny_gpt2, tokens(), slow)
    torch.testing.assert_close(Sides(lm, random("clt")).original(tokens(), edit), expected, atol=1e-4, rtol=1e-4)


def test_an_edited_replacement_is_live_behind_the_edit(lm: LanguageModel, tiny_gpt2: Path) -> None:
    model, read = random("clt"), []
    added = torch.randn(3, 20, generator=torch.Generator().manual_seed(2))

    def slow(layer: int, resid: Tensor, normed: Tensor, own: Tensor) -> Tensor:
        read.append(normed.flatten(0, 1))
        x = torch.stack([*read, *([torch.zeros_like(read[0])] * (2 - layer))], dim=1)
        y = model(x).y_hat[:, layer].view(own.shape).clone()
        y[1, 4] += added[layer]
        return y

    def edit(layer: int, out: Tensor) -> Tensor:
        out = out.clone()
        out[1, 4] += added[layer]
        return out

    expected = slow_hooks(tiny_gpt2, tokens(), slow)
    torch.testing.assert_close(Sides(lm, model).replaced(tokens(), edit), expected, atol=5e-4, rtol=1e-4)
