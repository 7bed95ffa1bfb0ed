"""What a plan says that ranks send is what they send, to the byte: steps of training over gloo, counted."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import pytest

from pipeline.arch.base import Dims
from pipeline.arch.options import ArchOptions
from pipeline.core.options import ActivationOptions, LossOptions, Rank, SparsityForm, ThetaGrad
from pipeline.dist import plan, plan_gradients
from pipeline.dist.plan import Grid, Seen
from pipeline.dist.share import Share
from pipeline.stages import plan_paper
from pipeline.stages.options import TrainConfig
from pipeline.train.options import OptimOptions, Precision, SparseStep
from tests.dist import processes, steps
from tests.dist.steps import D, L, Said

B, F = 22, 29

CLT = ArchOptions("clt", F)
WIDE = ArchOptions("clt", 3 * 8 * 128)
"""128 rows of 6 numbers are 3 blocks of moments: 2, 3, 4 and 8 ranks meet at borders of blocks."""
TOPK = ActivationOptions("topk", k=3)
BATCHTOPK = ActivationOptions("batchtopk", k=3)
ACROSS = ActivationOptions("batchtopk_across", k=3)
GROUPMAX = ActivationOptions("groupmax", k=7)
JUMPRELU = ActivationOptions("jumprelu", threshold=0.1, bandwidth=0.5, theta_grad=ThetaGrad.anthropic)
RELU = ActivationOptions("relu")
MSE = LossOptions("mse")
AUXK = LossOptions("auxk", aux_k=1 / 4)
WIDER = LossOptions("multi_topk", multi_topk=1 / 8)
TANH = LossOptions("tanh", sparsity=0.3, pre_act=0.1)
L1 = LossOptions("l1", sparsity=0.3, sparsity_form=SparsityForm.l1)
STEERED = replace(L1, target_l0=9)
L0 = LossOptions("l0", l0=2.0, target_l0=9)


def case(
    activation: ActivationOptions, loss: LossOptions = MSE, arch: ArchOptions = CLT, parts: int = 1, clip: float = 0.0
) -> TrainConfig:
    base = settings()
    train = replace(base.train, batch_tokens=B, accumulate=parts)
    optim = OptimOptions("adam", lr=1e-2, clip=clip or None)
    return replace(base, arch=arch, activation=activation, loss=loss, train=train, optim=optim)


def halved(cfg: TrainConfig) -> TrainConfig:
    """With tables of 16 bits, and moments of 8."""
    train = replace(cfg.train, weights=Precision.bfloat16)
    return replace(cfg, train=train, optim=replace(cfg.optim, name="adam8bit"))


@cache
def settings() -> TrainConfig:
    return steps.composed("train.kernels=torch")


def cases() -> dict[str, TrainConfig]:
    """The first ones are those of the fast tests."""
    dense = case(replace(TOPK, rank=Rank.norm))
    nested, drawn = ArchOptions("matryoshka", F, prefixes=[5, 13, F]), ArchOptions("matryoshka", F, random_prefixes=4)
    return {
        "topk, auxk, in parts, clipped": case(TOPK, AUXK, parts=2, clip=0.1),
        "batchtopk, auxk": case(BATCHTOPK, AUXK),
        "batchtopk_across, multi_topk": case(ACROSS, WIDER),
        "groupmax": case(GROUPMAX, arch=ArchOptions("clt", 28)),
        "jumprelu, l0": case(JUMPRELU, L0),
        "relu, steered": case(RELU, STEERED),
        "matryoshka": case(TOPK, arch=nested),
        "topk, auxk, 16 bits": halved(case(TOPK, AUXK, WIDE)),
        "topk": case(TOPK),
        "topk, auxk": case(TOPK, AUXK),
        "topk, multi_topk": case(TOPK, WIDER),
        "topk by norm, dense": replace(dense, train=replace(dense.train, sparse=SparseStep.never)),
        "groupmax, auxk": case(GROUPMAX, AUXK, ArchOptions("clt", 28)),
        "jumprelu": case(JUMPRELU, TANH),
        "jumprelu, l0, auxk, in parts": case(JUMPRELU, replace(L0, aux_k=1 / 4), parts=2),
        "relu": case(RELU, L1),
        "matryoshka, drawn": case(BATCHTOPK, arch=drawn),
        "per_layer": case(TOPK, arch=ArchOptions("per_layer", F)),
        "skip": case(TOPK, arch=ArchOptions("skip", F, skip=True)),
        "tied": case(TOPK, AUXK, ArchOptions("tied", F)),
        "crosscoder": case(TOPK, AUXK, ArchOptions("crosscoder", F)),
        "molt": case(TOPK, arch=ArchOptions("molt", 28, ranks=[4, 2, 1])),
        "batchtopk, multi_topk, 16 bits": halved(case(BATCHTOPK, WIDER, WIDE, parts=2, clip=0.1)),
        "jumprelu, l0, 16 bits": halved(case(JUMPRELU, replace(L0, aux_k=1 / 4), WIDE)),
        "matryoshka, 16 bits": halved(case(TOPK, arch=ArchOptions("matryoshka", 6144, prefixes=[3072, 6144]))),
    }


N_FAST = 8


def expected(cfg: TrainConfig, paper: plan_paper.Paper, rank: int, said: Sequence[Said]) -> dict[str, tuple[int, int]]:
    """The plan for a rank's step, with what the data decided in it. said: by every rank."""
    grid = paper.grid
    data_rank, feature_rank = divmod(rank, grid.features)
    row = said[data_rank * grid.features : (data_rank + 1) * grid.features]
    dead = tuple(tuple(one.dead) for one in row) if cfg.loss.aux_k > 0 else ()
    step = plan_paper.step_of(cfg, paper, any(map(any, dead)), feature_rank, data_rank)
    talks = list(plan.talks(step, Seen(dead, said[rank].ties)))
    if grid.data > 1:
        found = said[rank].gradients
        assert found is not None
        talks += plan_gradients.talks(*found)
    return {what: (count.calls, count.sent) for what, count in plan.counts(talks, grid).items()}


def hold_against_counts(features: int, data: int, names: Sequence[str], equal: bool = False) -> int:
    """-> how often a cut fell between equal values"""
    grid, chosen = Grid(features, data), [cases()[name] for name in names]
    by_rank = processes.run(grid.world, steps.taken, chosen, features, data, 2, equal)
    for number, (name, cfg) in enumerate(zip(names, chosen, strict=True)):
        paper = plan_paper.built(cfg, Dims(L, D), grid, steps.RUN)
        for at in range(2):
            said = [found[number][at] for found in by_rank]
            for rank in range(grid.world):
                wanted = expected(cfg, paper, rank, said)
                assert said[rank].counts == wanted, f"{name}, step {at}, rank {rank} of {features} x {data}"
                assert sum(sent for _, sent in wanted.values()) > 0
    return sum(said.ties for of_rank in by_rank for each in of_rank for said in each)


@pytest.mark.parametrize(("features", "data"), [(2, 1), (1, 2), (2, 2)])
def test_every_byte_that_is_sent_was_planned(features: int, data: int) -> None:
    hold_against_counts(features, data, list(cases())[:N_FAST])


def test_breaking_ties_over_all_tokens_was_planned() -> None:
    # 21 of 22 tokens are the same, so that the cut falls between equal values.
    assert hold_against_counts(2, 2, ["matryoshka, drawn", "batchtopk_across, multi_topk"], equal=True) > 0


@pytest.mark.slow
@pytest.mark.parametrize(("features", "data"), [(2, 1), (1, 2), (3, 1), (4, 1), (2, 2), (1, 4), (8, 1), (4, 2), (2, 4)])
def test_every_byte_that_is_sent_was_planned_whatever_is_trained(features: int, data: int) -> None:
    # GroupMax with 4 features a group cannot be shared by 8 ranks, nor 4 mixtures of 7 transforms.
    left_out = {"groupmax", "groupmax, auxk", "molt"} if features > 4 else set()
    hold_against_counts(features, data, [name for name in cases() if name not in left_out])


def test_what_travels_of_the_gradients_is_known_beforehand_where_every_token_has_k_features() -> None:
    archs = [CLT, ArchOptions("per_layer", F), ArchOptions("skip", F, skip=True)]
    chosen = [case(TOPK, arch=arch, parts=parts) for arch in archs for parts in (1, 2)]
    chosen += [halved(case(TOPK, arch=replace(arch, d_features=128), parts=2)) for arch in archs]
    [by_case, _] = processes.run(2, steps.taken, chosen, 1, 2, 1)
    for cfg, [said] in zip(chosen, by_case, strict=True):
        paper, parts = plan_paper.built(cfg, Dims(L, D), Grid(1, 2), steps.RUN), cfg.train.accumulate
        held = [plan_gradients.held(paper.rank, n, [[3 * n] * L] * parts) for n in Share(0, 2).sizes(B // parts)]
        wanted = plan.counts(plan_gradients.talks(held, plan_gradients.whole(paper.rank)), Grid(1, 2))
        assert {"gradient sizes", "gradient terms", "gradients"} == wanted.keys()
        for what, count in wanted.items():
            assert said.counts[what] == (count.calls, count.sent), f"{what}, {cfg.arch.name}, {parts} parts"
