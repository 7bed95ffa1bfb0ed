"""Initial weights of a part of a transcoder: the rows that the whole would have."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from pipeline.arch import init, init_rows, table
from pipeline.arch.base import Dims, Transcoder
from pipeline.arch.held import Held
from pipeline.arch.molt import MOLT
from pipeline.arch.options import ArchOptions, Init, Tie
from pipeline.core import activations
from pipeline.core.activations import Activation, JumpReLU
from pipeline.core.options import ActivationOptions
from pipeline.dist import select
from pipeline.dist.mesh import Mesh
from pipeline.dist.shard import Shard, shards
from tests import oracle
from tests.dist import threads

L, D, N, F = 3, 10, 400, 44
ARCHS = [*table.ARCHS, "tied to target"]
FITTED = {Init.data, Init.random_rows}
"""Starts that fit a gain to what all parts write together."""


def sample() -> tuple[Tensor, Tensor]:
    """Inputs off zero and targets that depend on them."""
    x = oracle.normal(N, L, D, dtype=torch.float32) + oracle.normal(L, D, seed=2, dtype=torch.float32)
    return x, torch.tanh(x) * 0.7 + 0.2 * x.roll(1, dims=2) - 0.5


def options_of(architecture: str, start: str, activation: str, d_features: int = F) -> ArchOptions:
    tie = {"tie": Tie.target} if architecture == "tied to target" else {}
    options = oracle.arch_options(architecture.split()[0], d_features=d_features, init=Init(start), **tie)
    # Not every start has a rate of its own; drawn rows have.
    return replace(options, init_firing=0.1) if activation == "jumprelu" and start != "data" else options


def started(
    options: ArchOptions, rule: Activation, held: Held | None = None, dtype: torch.dtype = torch.float32
) -> Transcoder:
    model = table.build(replace(options, d_features=rule.d_features), Dims(L, D), rule).to(dtype)
    init.initialise(model, *sample(), torch.Generator().manual_seed(3), held=held)
    return model


def started_in_parts(
    options: ArchOptions, activation: ActivationOptions, n: int, dtype: torch.dtype = torch.float32
) -> tuple[list[Shard], list[Transcoder]]:
    n_sources = table.n_sources(options, Dims(L, D))
    parts = shards(options, activation, n_sources, n)

    def work(mesh: Mesh) -> Transcoder:
        rule = select.rule(activation, n_sources, parts, mesh)
        return started(options, rule, select.held(parts, mesh), dtype)

    return parts, threads.run(n, 1, work)


def whole(options: ArchOptions, activation: ActivationOptions, dtype: torch.dtype = torch.float32) -> Transcoder:
    return started(options, activations.build(activation, table.n_sources(options, Dims(L, D)), F), dtype=dtype)


def rows_of(name: str, tensor: Tensor, model: Transcoder, held: Held) -> Tensor:
    """What a part has of a parameter of the whole."""
    if name in {"b_dec", "W_skip"}:
        return tensor
    if name in {"b_enc", "activation.log_threshold"}:
        return held.of(tensor.T).T
    return model.table_rows(held).of(tensor) if name[:2] in {"U.", "V."} else held.of(tensor)


@pytest.mark.parametrize("n", [2, 3])
@pytest.mark.parametrize("activation", ["topk", "jumprelu"])
@pytest.mark.parametrize("start", sorted(init.INITS))
@pytest.mark.parametrize("architecture", ARCHS)
def test_a_part_begins_with_the_rows_that_the_whole_would_have(
    architecture: str, start: str, activation: str, n: int
) -> None:
    if architecture == "molt" and start == "transposed":
        pytest.skip("refused")
    options, rule = options_of(architecture, start, activation), oracle.activation_options(activation)
    expected = dict(whole(options, rule).named_parameters())
    parts, models = started_in_parts(options, rule, n)
    seen = 0
    for shard, model in zip(parts, models, strict=True):
        held = Held(F, shard.ids())
        found = dict(model.named_parameters())
        assert found.keys() == expected.keys()
        for name, tensor in found.items():
            wanted = rows_of(name, expected[name], model, held)
            scaled = start in FITTED and name.startswith(("decoders", "U."))
            same = torch.allclose(tensor, wanted, rtol=1e-5, atol=1e-8) if scaled else torch.equal(tensor, wanted)
            assert same, name
            seen += bool(wanted.any())
    assert seen > 2 * n


@pytest.mark.parametrize("activation", ["jumprelu", "batchtopk"])
@pytest.mark.parametrize("architecture", ARCHS)
def test_the_fitted_gain_is_the_wholes_to_rounding(architecture: str, activation: str) -> None:
    options, rule = options_of(architecture, "data", activation), oracle.activation_options(activation)
    expected = whole(options, rule, torch.float64)
    parts, models = started_in_parts(options, rule, 3, torch.float64)
    for shard, model in zip(parts, models, strict=True):
        rows = model.table_rows(Held(F, shard.ids()))
        for source in range(model.n_sources):
            for one, other in zip(model.tables(source), expected.tables(source), strict=True):
                assert oracle.normwise(one, rows.of(other)) < 1e-12


@pytest.mark.parametrize("n", [2, 3])
def test_biases_for_a_firing_rate_are_the_wholes_when_features_come_in_blocks(
    n: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(init_rows, "BLOCK", 7)
    options, rule = options_of("clt", "uniform", "jumprelu"), oracle.activation_options("jumprelu")
    expected = whole(options, rule)
    parts, models = started_in_parts(options, rule, n)
    for shard, model in zip(parts, models, strict=True):
        assert torch.equal(model.b_enc, expected.b_enc[:, shard.ids()])
        assert isinstance(model.activation, JumpReLU)
        fires = (model.activation(model.encode(sample()[0])) > 0).sum(dim=0)
        assert ((fires - round(0.1 * N)).abs() <= 1).all()


def test_transforms_have_their_rows_in_a_part_as_in_the_whole() -> None:
    """Who holds features 1, 2 and 4 of a mixture has their rows of the tables."""
    options = ArchOptions("molt", d_features=8, ranks=[3, 1])  # 2 of rank 3, 6 of rank 1
    model = MOLT(options, Dims(1, 4), activations.build(ActivationOptions("relu"), 1, 8))
    assert model.first.tolist() == [0, 3, 6, 7, 8, 9, 10, 11]
    rows = model.table_rows(Held(8, torch.tensor([1, 2, 4])))
    assert rows.n == 12
    assert rows.ids is not None
    assert rows.ids.tolist() == [3, 4, 5, 6, 8]


@pytest.mark.parametrize("ids", [[0, 1, 2], [2, 5, 9], [9], list(range(10))])
def test_blocks_of_the_whole_name_what_is_here_of_each(ids: list[int]) -> None:
    held, rows = Held(10, torch.tensor(ids)), torch.tensor(ids, dtype=torch.float32) + 1
    found = torch.cat([block.of(block.spread(rows[here])) for here, block in held.blocks(4)])
    assert found.tolist() == rows.tolist()
    assert {block.n for _, block in held.blocks(4)} <= {4, 2}
    spread = held.spread(rows)
    assert spread.nonzero().squeeze(1).tolist() == ids
    assert held.of(spread).tolist() == rows.tolist()


def test_who_holds_all_gets_back_what_was_given() -> None:
    rows = oracle.normal(10, 3)
    assert Held(10).of(rows) is rows
    assert Held(10).spread(rows) is rows
    assert [(here.start, here.stop, block) for here, block in Held(10).blocks(4)] == [
        (0, 4, Held(4)),
        (4, 8, Held(4)),
        (8, 10, Held(2)),
    ]
