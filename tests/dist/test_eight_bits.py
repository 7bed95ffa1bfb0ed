"""Moments of 8 bits and weights of 16 where ranks share the features: those of one process, or a refusal."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from pipeline.arch import table
from pipeline.arch.base import Dims
from pipeline.arch.options import ArchOptions
from pipeline.core import activations
from pipeline.core.options import LossOptions
from pipeline.dist import mesh
from pipeline.dist.options import DistOptions
from pipeline.dist.shard import shards
from pipeline.errors import UserError
from pipeline.train import optim
from pipeline.train.eight_bit import is_coded
from pipeline.train.optim import Place
from pipeline.train.optimisers import optimizer_tensors
from pipeline.train.options import OptimOptions, Precision
from tests import oracle
from tests.dist import processes
from tests.dist.curves import Case, both, curve, usual
from tests.dist.test_same_curve import agree

ADAM8 = OptimOptions("adam8bit", lr=0.01)
WIDE = 6 * 128
"""128 rows of 6 numbers are 3 blocks of 256: 2 and 3 ranks meet at borders of blocks."""


@pytest.fixture(scope="module", autouse=True)
def libraries() -> None:
    """Imported before the first test, and before ranks are forked."""
    import torchao.optim  # noqa: F401


# The optimiser alone: the same gradients give the same bytes


def moved(dtype: torch.dtype, seed: int = 4) -> dict[str, Tensor]:
    """The rows that a rank has of a small table, and their moments, after three steps."""
    n_rows, width = 12, 128
    with mesh.started(DistOptions("feature_shard", features=None, data=1), torch.device("cpu")) as ranks:
        n, i = ranks.features.size, ranks.features.rank
        ids = torch.arange(n_rows)[n_rows * i // n : n_rows * (i + 1) // n]
        weight = Parameter(oracle.normal(n_rows, width, dtype=torch.float32)[ids].to(dtype))
        model = torch.nn.Module()
        model.encoders = torch.nn.ParameterList([weight])
        made = optim.build(model.named_parameters(), ADAM8, Place(ranks.features, seed, ids))
        for step in range(3):
            weight.grad = oracle.normal(n_rows, width, seed=step, dtype=torch.float32)[ids].to(dtype)
            made.step()
        assert is_coded(made.state[weight]["exp_avg"])  # fewer than 4,096 numbers, as one process has them
        return {"weight": weight.detach(), **optimizer_tensors(model, made)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n", [2, 3])
def test_rows_and_moments_of_a_rank_are_bit_for_bit_those_of_one_process(n: int, dtype: torch.dtype) -> None:
    one, found = moved(dtype), processes.run(n, moved, dtype)
    for key in ("weight", "exp_avg.codes/encoders.0", "exp_avg_sq.codes/encoders.0", "exp_avg_sq.scale/encoders.0"):
        assert torch.equal(torch.cat([each[key] for each in found]), one[key]), key
    assert torch.equal(moved(dtype, seed=5)["weight"], one["weight"]) == (dtype is torch.float32)


# Whole runs


def wide(architecture: str, activation: str, **changes: object) -> Case:
    case = usual(architecture, activation, optim=ADAM8, **changes)
    return replace(case, arch=replace(case.arch, d_features=WIDE))


def test_a_few_steps_are_those_of_one_process() -> None:
    for case, one, many in both([wide("clt", "topk", n_steps=3)], (2, 1)):
        agree(many, one, 1e-9, str(case))


@pytest.mark.slow
@pytest.mark.parametrize("grid", [(2, 1), (3, 1), (2, 2)], ids=str)
def test_the_curve_is_that_of_one_process(grid: tuple[int, int]) -> None:
    cases = [wide(*pair, n_steps=10) for pair in [("clt", "topk"), ("skip", "jumprelu"), ("tied", "batchtopk")]]
    for case, one, many in both([*cases, replace(cases[0], dtype=torch.float32)], grid):
        agree(many["lines"], one["lines"], 1e-9 if case.dtype is torch.float64 else 1e-3, str(case))


NOISE = 0.01
"""Other noise alone changes lines of `halved` by .5 % at the most. Ranks have one process's noise, but round what they
write to bfloat16 before it is summed over them."""


def halved(architecture: str, activation: str) -> Case:
    case = wide(architecture, activation, dtype=torch.float32, weights=Precision.bfloat16, n_steps=12)
    # Groups of 256 features: the borders of ranks, which keep a group together, are borders of blocks.
    rule = replace(case.rule, k=3) if activation == "groupmax" else case.rule
    return replace(case, rule=rule, loss=LossOptions("mse"))


@pytest.mark.slow
@pytest.mark.parametrize("grid", [(2, 1), (1, 2), (3, 1), (2, 2)], ids=str)
def test_tables_of_sixteen_bits_learn_as_in_one_process_and_replicas_are_equal(grid: tuple[int, int]) -> None:
    pairs = [("clt", "topk"), ("skip", "batchtopk"), ("per_layer", "groupmax")]
    for case, one, many in both([halved(*pair) for pair in pairs], grid):
        losses = [[line["loss/reconstruction"] for line in each["lines"]] for each in (one, many)]
        assert losses[1] == pytest.approx(losses[0], rel=NOISE), str(case)
        assert losses[1][-1] < 0.8 * losses[1][0]
        assert many["replicas"] == 1


@pytest.mark.slow
def test_other_noise_changes_as_little() -> None:
    cases = [replace(halved("clt", "topk"), noise=seed) for seed in range(5)]
    runs = [[line["loss/reconstruction"] for line in curve(case, (1, 1))["lines"]] for case in cases]
    for other in runs[1:]:
        assert other != runs[0]
        assert other == pytest.approx(runs[0], rel=NOISE)


# What is refused


def borders(arch: ArchOptions, width: int, n: int, activation: str = "topk", **changes: int) -> None:
    rule = replace(oracle.activation_options(activation), **changes)
    dims = Dims(2, width)
    with torch.device("meta"):
        whole = table.build(arch, dims, activations.build(rule, 2, arch.d_features))
    optim.check_borders("adam8bit", whole, shards(arch, rule, 2, n))


def test_ranks_whose_borders_lie_inside_blocks_are_refused_in_a_line() -> None:
    borders(ArchOptions("clt", 24), 256, 5)  # rows are whole blocks: any rows will do
    borders(ArchOptions("clt", WIDE), 6, 3)
    borders(ArchOptions("clt", 44), 6, 1)
    borders(ArchOptions("molt", 28, ranks=[4, 2, 1]), 256, 3)
    with pytest.raises(
        UserError, match=r"blocks of 256 numbers, and borders of 4 .* 6 wide; .* in multiples of 512, op"
    ):
        borders(ArchOptions("clt", WIDE), 6, 4)
    borders(ArchOptions("matryoshka", WIDE, prefixes=[256, WIDE]), 6, 2)
    with pytest.raises(UserError, match=r"\(and prefixes, "):
        borders(ArchOptions("matryoshka", WIDE, prefixes=[130, WIDE]), 6, 2)
    borders(ArchOptions("clt", WIDE), 6, 3, "groupmax", k=3)
    with pytest.raises(UserError, match="groups of groupmax"):  # 4 groups of 192 features, of which one rank has 2
        borders(ArchOptions("clt", WIDE), 6, 3, "groupmax", k=4)
    with pytest.raises(UserError, match="borders of 2"):  # the last block is not whole
        borders(ArchOptions("clt", WIDE + 2), 6, 2)
