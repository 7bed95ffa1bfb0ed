"""The choosing rules beyond one k for all: groups, ranking by decoder norms, k for each layer, k that falls."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from pipeline.core import activations, products
from pipeline.core.activations import BatchTopK, Choosing
from pipeline.core.options import ActivationOptions, Rank
from pipeline.core.sparse import Sparse
from pipeline.errors import UserError
from tests import oracle

B, L, F = 5, 3, 12
SELECTIONS = {**oracle.SELECTIONS, "groupmax": oracle.group_max}
NAMES = sorted(SELECTIONS)
PER_LAYER = ["batchtopk", "groupmax", "topk"]
ANNEALED = ["batchtopk", "batchtopk_across", "topk"]


def build(name: str, **options: object) -> Choosing:
    rule = activations.build(ActivationOptions(name, **options), L, F).eval()
    assert isinstance(rule, Choosing)
    return rule


def both_forms(rule: Choosing, h: Tensor, norms: Tensor | None = None) -> list[Tensor]:
    layers = list(rule.choose([layer.clone() for layer in h.unbind(1)], norms))
    sparse = Sparse([pattern for pattern, _ in layers], [values for _, values in layers])
    return [rule(h, norms), sparse.dense()]


def samples() -> list[Tensor]:
    """Gaussian, nothing positive, and integers in which most cuts fall on ties."""
    whole = torch.randint(-4, 4, (B, L, F), generator=torch.Generator().manual_seed(3)).double()
    return [oracle.normal(B, L, F), -oracle.normal(B, L, F).abs(), whole, torch.ones(B, L, F).double()]


def norms_of(zero: Sequence[int] = ()) -> Tensor:
    """Powers of two, so that products are exact and ties stay ties."""
    exponents = torch.randint(-2, 3, (L, F), generator=torch.Generator().manual_seed(4))
    norms = torch.full((L, F), 2.0, dtype=torch.float64).pow(exponents)
    norms[:, list(zero)] = 0
    return norms


@pytest.mark.parametrize("k", [1, 2, 3, 6, F])
def test_groupmax_keeps_the_largest_of_each_group_of_neighbours(k: int) -> None:
    for h in samples():
        expected = oracle.at_pairs(h, oracle.group_max(h, k))
        for got in both_forms(build("groupmax", k=k), h):
            assert torch.equal(got, expected)


def test_groupmax_of_a_row_by_hand() -> None:
    rule = activations.build(ActivationOptions("groupmax", k=3), 1, 6)
    h = torch.tensor([[[1.0, 2.0, 5.0, 5.0, -1.0, -2.0]]])
    assert rule(h).tolist() == [[[0, 2, 5, 0, 0, 0]]]


@pytest.mark.parametrize("zero", [(), (0, 5, 11)])
@pytest.mark.parametrize("k", [1, 2, 6])
@pytest.mark.parametrize("name", NAMES)
def test_ranking_by_norm_compares_what_features_write_and_keeps_their_values(
    name: str, k: int, zero: Sequence[int]
) -> None:
    norms = norms_of(zero)
    for h in samples():
        expected = oracle.at_pairs(h, SELECTIONS[name](h * norms, k))
        for got in both_forms(build(name, k=k, rank=Rank.norm), h, norms):
            assert torch.equal(got, expected)


def test_what_fills_up_a_row_with_too_few_values_above_0_is_not_chosen_again(monkeypatch: pytest.MonkeyPatch) -> None:
    def padded(h: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """As faster kernels have it: entries of value 0 at index 0."""
        values, indices = h.relu().sort(dim=-1, descending=True, stable=True)
        return values[..., :k], torch.where(values > 0, indices, 0)[..., :k]

    monkeypatch.setattr(products, "topk", padded)
    h = -oracle.normal(B, L, F).abs()
    h[:, :, 0], h[1, :, 5] = 3.0, 2.0
    for rank in Rank:
        for got in both_forms(build("topk", k=4, rank=rank), h, norms_of()):
            assert torch.equal(got, h.relu())


def wide(kind: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """Rows [7, 437], which leave a rest of 53 when they are cut into 64 groups."""
    h = oracle.normal(7, 437, seed=11, dtype=dtype)
    if kind == "ties":
        return (4 * h).round()
    if kind == "a few positive in one row":
        h[3] = -h[3].abs()
        h[3, [5, 200, 430]] = 1.0
    if kind == "all in the rest":
        h[:, 390:420] += 10.0
    if kind == "all in one group":
        h[:, ::64] += 10.0
    if kind == "an infinity":
        h[2, 17] = float("inf")
    return h


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("k", [1, 5, 16, 27, 437])
@pytest.mark.parametrize(
    "kind", ["normal", "ties", "a few positive in one row", "all in the rest", "all in one group", "an infinity"]
)
def test_the_largest_of_wide_rows_are_those_of_a_sort(kind: str, k: int, dtype: torch.dtype) -> None:
    h = wide(kind, dtype)
    values, indices = products.topk(h, k)
    expected = torch.zeros_like(h)
    for row, taken in zip(h.tolist(), expected, strict=True):
        for i in sorted(range(len(row)), key=lambda i: (-row[i], i))[:k]:
            taken[i] = max(row[i], 0.0)
    assert torch.equal(torch.zeros_like(h).scatter_add(1, indices, values), expected)


@pytest.mark.parametrize("place", [0, 200, 436])
def test_a_nan_in_a_wide_row_is_chosen_so_that_the_loss_shows_it(place: int) -> None:
    h = wide("normal")
    h[4, place] = float("nan")
    values, indices = products.topk(h, 5)
    assert values.isnan().any(dim=1).tolist() == [row == 4 for row in range(7)]
    assert int(indices[4][values[4].isnan()]) == place


@pytest.mark.parametrize("name", NAMES)
def test_ranking_by_norm_differs_from_ranking_by_value_and_equal_norms_make_no_difference(name: str) -> None:
    h = oracle.normal(B, L, F)
    by_value, by_norm = build(name, k=2), build(name, k=2, rank=Rank.norm)
    assert not by_value.by_norm
    assert by_norm.by_norm
    assert torch.equal(by_value(h, norms_of()), by_value(h))
    assert torch.equal(by_norm(h, torch.full((L, F), 0.5)), by_value(h))
    assert not torch.equal(by_norm(h, norms_of()), by_value(h))


@pytest.mark.parametrize("name", NAMES)
def test_the_gradient_under_norm_ranking_reaches_the_chosen_pairs_only(name: str) -> None:
    h, g, norms = oracle.normal(B, L, F).requires_grad_(), oracle.normal(B, L, F, seed=9), norms_of((2,))
    build(name, k=2, rank=Rank.norm)(h, norms).backward(g)
    assert h.grad is not None
    assert torch.equal(h.grad, oracle.at_pairs(g, SELECTIONS[name](h.detach() * norms, 2)))


@pytest.mark.parametrize("name", NAMES)
def test_norms_once_fixed_are_ranked_by_whatever_is_handed_over(name: str) -> None:
    h, norms = oracle.normal(B, L, F), norms_of()
    rule = build(name, k=2, rank=Rank.norm)
    expected = rule(h, norms)
    rule.fixed_norms = norms
    assert torch.equal(rule(h, torch.ones(L, F)), expected)
    assert not any("norms" in key for key in rule.state_dict())


def test_a_batch_rule_remembers_the_smallest_product_when_it_ranks_by_norm() -> None:
    rule, norms = build("batchtopk", k=2, rank=Rank.norm).train(), norms_of()
    assert isinstance(rule, BatchTopK)
    h = oracle.normal(B, L, F)
    products = rule(h, norms) * norms
    expected = [float(layer[layer > 0].min()) for layer in products.unbind(1)]
    assert rule.threshold.tolist() == pytest.approx(expected)


@pytest.mark.parametrize("rank", list(Rank))
@pytest.mark.parametrize("name", PER_LAYER)
def test_each_layer_has_its_own_k(name: str, rank: Rank) -> None:
    k, norms = [2, 1, 6], norms_of()
    for h in samples():
        ranked = h * norms if rank == Rank.norm else h
        expected = oracle.at_pairs(h, SELECTIONS[name](ranked, k))
        for got in both_forms(build(name, k_per_layer=k, rank=rank), h, norms):
            assert torch.equal(got, expected)


# k that falls


@pytest.mark.parametrize("name", ANNEALED)
def test_k_falls_linearly_over_its_share_of_the_run_and_then_stays(name: str) -> None:
    rule = build(name, k=2, k_start=10, k_anneal=0.5)
    seen = []
    for done in (0.0, 0.125, 0.25, 0.375, 0.5, 0.9, 1.0):
        rule.at(done)
        assert rule.k == [rule.k[0]] * L
        seen.append(rule.k[0])
    assert seen == [10, 8, 6, 4, 2, 2, 2]


@pytest.mark.parametrize("name", ANNEALED)
def test_an_annealed_rule_chooses_by_the_k_of_the_moment_and_by_its_last_when_told_nothing(name: str) -> None:
    rule, h = build(name, k=2, k_start=6, k_anneal=1.0), oracle.normal(B, L, F)
    assert torch.equal(rule(h), oracle.at_pairs(h, SELECTIONS[name](h, 2)))
    for done, k in ((0.0, 6), (0.5, 4), (1.0, 2)):
        rule.at(done)
        for got in both_forms(rule, h):
            assert torch.equal(got, oracle.at_pairs(h, SELECTIONS[name](h, k)))


def test_layers_with_a_k_of_their_own_fall_from_the_same_start() -> None:
    rule = build("topk", k_per_layer=[2, 4, 8], k_start=8, k_anneal=1.0)
    rule.at(0.0)
    assert rule.k == [8, 8, 8]
    rule.at(0.5)
    assert rule.k == [5, 6, 8]
    rule.at(1.0)
    assert rule.k == [2, 4, 8]


def test_without_annealing_the_run_makes_no_difference_to_k() -> None:
    rule = build("topk", k_per_layer=[2, 4, 8])
    for done in (0.0, 0.3, 1.0):
        rule.at(done)
        assert rule.k == [2, 4, 8]


# What is refused


@pytest.mark.parametrize(
    ("name", "options", "line"),
    [
        ("topk", {"k_per_layer": [2, 3]}, r"has 2 numbers for 3 layers of features; give 3"),
        ("topk", {"k_per_layer": [2, 3, 13]}, r"k_per_layer=\[2, 3, 13\].*between 1 and arch.d_features=12"),
        ("batchtopk", {"k_per_layer": [2, 0, 3]}, r"between 1 and arch.d_features=12"),
        ("topk", {"k": 2, "k_per_layer": [2, 3, 4]}, r"twice; add activation.k=null"),
        ("batchtopk_across", {"k_per_layer": [2, 3, 4]}, r"k_per_layer has no meaning for activation=batchtopk_across"),
        ("relu", {"rank": Rank.norm}, r"activation.rank has no meaning for activation=relu"),
        ("jumprelu", {"k_start": 3}, r"activation.k_start has no meaning"),
        ("groupmax", {"k": 2, "k_start": 3}, r"activation.k_start has no meaning for activation=groupmax"),
        ("groupmax", {"k": 5}, r"5 equal groups of arch.d_features=12.*activation.k=4 or arch.d_features=15"),
        ("groupmax", {"k_per_layer": [2, 3, 7]}, r"7 equal groups.*activation.k=6 or arch.d_features=14"),
        ("topk", {"k": 4, "k_start": 3, "k_anneal": 0.5}, r"k_start=3 must lie between .*\(4\) and arch.d_features=12"),
        ("topk", {"k": 4, "k_start": 13, "k_anneal": 0.5}, r"k_start=13 must lie between"),
        ("topk", {"k_per_layer": [1, 6, 2], "k_start": 5, "k_anneal": 0.5}, r"k_start=5 must lie between .*\(6\)"),
        ("topk", {"k": 4, "k_start": 8}, r"k_start=8 and activation.k_anneal=None go together"),
        ("topk", {"k": 4, "k_anneal": 0.5}, r"k_start=None and activation.k_anneal=0.5 go together"),
        ("topk", {"k": 4, "k_start": 8, "k_anneal": 0.0}, r"k_anneal=0.0 is a share of the run"),
        ("topk", {"k": 4, "k_start": 8, "k_anneal": 1.5}, r"k_anneal=1.5 is a share of the run"),
    ],
)
def test_settings_that_make_no_sense_are_refused_in_a_line(name: str, options: dict[str, object], line: str) -> None:
    with pytest.raises(UserError, match=line) as refused:
        build(name, **options)
    assert "\n" not in str(refused.value)


def test_tokens_that_compete_with_nobody_are_refused_and_named_topk() -> None:
    with pytest.raises(UserError, match=r"train.batch_tokens=1 .*activation=topk"):
        activations.check_batch(build("batchtopk", k=2), 1)
    activations.check_batch(build("batchtopk", k=2), 2)
    for name in ("topk", "groupmax", "batchtopk_across"):  # the last compares layers too
        activations.check_batch(build(name, k=2), 1)
