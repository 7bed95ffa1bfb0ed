"""The loss curve of one process with every term of the loss, and with what a run may change about its steps."""

from dataclasses import replace

import pytest

from pipeline.arch.options import ArchOptions, Init
from pipeline.core.options import LayerWeighting, LossOptions, PreActForm, Ramp, Rank, Schedules, SparsityForm
from pipeline.train.options import OptimOptions, SparseStep
from tests import oracle
from tests.dist.curves import Case, F, both, usual
from tests.dist.test_same_curve import agree

N = 12
NOW = Schedules(sparsity=Ramp(), l0=Ramp())


def arch(name: str, **options: object) -> ArchOptions:
    return oracle.arch_options(name, d_features=F, init=Init.uniform, **options)


def rule(name: str, **options: object):
    return replace(oracle.activation_options(name), **options)


CASES = [
    Case(arch("clt"), rule("topk", k=4), LossOptions("weights", layer_weights=[1.0, 3.0, 0.5])),
    Case(arch("clt"), rule("topk", k=20, rank=Rank.norm), LossOptions("k above the shard", multi_topk=1 / 8)),
    Case(arch("sae"), rule("topk", k_start=12, k_anneal=0.7), LossOptions("annealed", aux_k=1 / 4)),
    Case(arch("clt"), rule("relu"), LossOptions("l1", sparsity=0.05, sparsity_form=SparsityForm.l1, schedule=NOW)),
    Case(arch("per_layer"), rule("relu"), LossOptions("controlled", target_l0=9)),
    Case(
        arch("clt"),
        rule("jumprelu"),
        LossOptions("l0", l0=2.0, target_l0=7.5, pre_act=0.1, pre_act_form=PreActForm.january, schedule=NOW),
    ),
    Case(arch("tied", scale=True, offset=True), rule("batchtopk", k=4), LossOptions("aux", aux_k=1 / 4)),
    Case(
        arch("crosscoder"),
        rule("batchtopk", k=4, rank=Rank.norm),
        LossOptions("inverse", layer_weighting=LayerWeighting.inverse_variance),
    ),
    Case(arch("matryoshka", random_prefixes=4), rule("topk", k=4), LossOptions("drawn prefixes", aux_k=1 / 4)),
    Case(arch("matryoshka", prefixes=[5, 18, 44]), rule("jumprelu"), LossOptions("prefixes", sparsity=0.05)),
]


@pytest.mark.slow
@pytest.mark.parametrize("grid", [(2, 1), (1, 3), (2, 2)], ids=str)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_every_loss_is_that_of_one_process(grid: tuple[int, int], accumulate: int) -> None:
    forms = [SparseStep.always, SparseStep.never]
    cases = [replace(case, n_steps=N, accumulate=accumulate, sparse=form) for case in CASES for form in forms]
    for case, one, many in both(cases, grid):
        agree(many, one, 1e-9, str(case))


@pytest.mark.slow
@pytest.mark.parametrize("grid", [(3, 1), (1, 2), (2, 2)], ids=str)
def test_optimisers_clipping_and_resampling_are_those_of_one_process(grid: tuple[int, int]) -> None:
    cases = [
        usual("clt", "topk", n_steps=N, optim=OptimOptions("adam", lr=0.01, clip=0.5)),
        usual("tied", "jumprelu", n_steps=N, optim=OptimOptions("adamw", lr=0.01, weight_decay=0.1)),
        usual("clt", "topk", n_steps=N, resample_steps=5),
        usual("per_layer", "jumprelu", n_steps=N, resample_steps=5, accumulate=2),
    ]
    for case, one, many in both(cases, grid):
        agree(many, one, 1e-9, str(case))
