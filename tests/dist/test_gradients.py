"""Gradients of several ranks are those of one process on all of their tokens."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from pipeline.arch.base import Transcoder
from pipeline.arch.options import Tie
from pipeline.core import deferred, products
from pipeline.core.options import Kernels, LossOptions, SparsityForm
from pipeline.core.sparse import bag, fixed_k
from pipeline.dist import gradient_plan, gradients, mesh
from pipeline.dist.gradient_plan import Held
from pipeline.dist.gradients import Gradients
from pipeline.dist.options import DistOptions
from pipeline.dist.share import Share
from pipeline.train import optim
from pipeline.train.objective import Objective, Whole
from pipeline.train.optim import Place
from pipeline.train.optimisers import optimizer_tensors
from pipeline.train.options import OptimOptions, SparseStep
from tests import oracle
from tests.dist import processes

L, F, D, B = 3, 11, 6, 26
DDP = DistOptions("ddp", features=1, data=None)
CPU = torch.device("cpu")

ARCHITECTURES = {
    "clt": oracle.arch_options("clt"),
    "per_layer": oracle.arch_options("per_layer"),
    "skip": oracle.arch_options("skip"),
    "tied by source": oracle.arch_options("tied", tie=Tie.source, scale=True, offset=True),
    "tied by target": oracle.arch_options("tied", tie=Tie.target, scale=True, offset=True),
    "tied plainly": oracle.arch_options("tied", tie=Tie.source),
    "sae": oracle.arch_options("sae"),
    "crosscoder": oracle.arch_options("crosscoder"),
    "molt": oracle.arch_options("molt"),
    "matryoshka": oracle.arch_options("matryoshka", prefixes=[3, 7, 11]),
}

RECIPES = {
    "topk": ("topk", LossOptions("auxk", aux_k=1 / 4), SparseStep.always),
    "topk, two": ("topk", LossOptions("multi", multi_topk=1 / 8), SparseStep.always),
    "groupmax": ("groupmax", LossOptions("mse"), SparseStep.auto),
    "relu": ("relu", LossOptions("l1", sparsity=0.3, sparsity_form=SparsityForm.l1), SparseStep.always),
    "jumprelu": ("jumprelu", LossOptions("tanh", sparsity=0.3, pre_act=0.2), SparseStep.always),
    "dense": ("jumprelu", LossOptions("tanh", sparsity=0.3), SparseStep.never),
}


def backward(model: Transcoder, objective: Objective, share: Share, n_tokens: int, seed: int = 0) -> None:
    """What a step does before the optimiser's, on a rank's share of the batch."""
    x, y = (oracle.normal(n_tokens, L, D, seed=seed + i, dtype=model.b_dec.dtype) for i in (5, 6))
    dead = torch.zeros(model.n_sources, model.d_features, dtype=torch.bool)
    dead[-1, [2, 5]] = True
    size = share.part_rows(n_tokens)
    for span in share.spans(n_tokens):
        rows = slice(span.start, span.stop)
        out = objective.forward(model, x[rows], 0)
        terms = objective(model, out, x[rows], y[rows], dead, 4, None, Whole(2.5, 4.0))
        (sum(terms.values()) * share.weight(size) / share.parts).backward()


def made(architecture: str, recipe: str, d_features: int = F) -> tuple[Transcoder, Objective]:
    activation, loss, sparse = RECIPES[recipe]
    options = ARCHITECTURES[architecture]
    if options.prefixes is not None:
        options = replace(options, prefixes=[3, 7, d_features])
    model = oracle.transcoder(options, activation, L, d_features, D, seed=3).train()
    return model, Objective(loss, model, 7.25, 8, sparse=sparse)


class Result(NamedTuple):
    """Of a rank."""

    gradients: dict[str, Tensor]
    held: Held
    used: dict[int, Tensor]
    """Rows of each dense gradient that were not 0, before."""
    n_terms: int
    """That travelled."""
    sent: dict[str, int]


def written_out(model: Transcoder) -> dict[str, Tensor]:
    for parameter in model.parameters():
        deferred.materialise(parameter)
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def reduced(cases: Sequence[tuple[str, str]], parts: int, n_tokens: int, d_features: int = F) -> list[Result]:
    """What each case gives, in a rank."""
    results = []
    with mesh.started(DDP, CPU) as ranks:
        for architecture, recipe in cases:
            model, objective = made(architecture, recipe, d_features)
            parameters = list(model.parameters())
            reducing = Gradients(parameters, ranks.data)
            backward(model, objective, Share(ranks.data.rank, ranks.data.size, parts), n_tokens)
            held, _ = gradients.inspect(parameters)
            used = {i: (p.grad != 0).flatten(1).any(1) for i, p in enumerate(parameters) if p.grad is not None}
            with ranks.wire.counting() as counts:
                reducing.reduce()
            sent = {what: count.sent for what, count in counts.items()}
            n_terms = sum(len(deferred.terms(parameter)) for parameter in parameters)
            results.append(Result(written_out(model), held, used, n_terms, sent))
    return results


def cases_of(recipe: str) -> list[tuple[str, str]]:
    return [(architecture, recipe) for architecture in ARCHITECTURES]


def assert_equal(cases: Sequence[tuple[str, str]], got: list[Result], expected: list[Result]) -> None:
    for case, ours, theirs in zip(cases, got, expected, strict=True):
        assert ours.gradients.keys() == theirs.gradients.keys(), case
        for name, gradient in theirs.gradients.items():
            assert oracle.normwise(ours.gradients[name], gradient) < 1e-12, (case, name)


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("recipe", list(RECIPES))
@pytest.mark.parametrize(("n", "parts"), [(2, 1), (3, 2)])
def test_gradients_are_those_of_one_process(n: int, parts: int, recipe: str) -> None:
    """In float64, 26 tokens in slices of unequal length: more to send than the dense gradients of 11 features."""
    cases = cases_of(recipe)
    expected = reduced(cases, parts, B)
    got = processes.run(n, reduced, cases, parts, B)
    for rank in got:
        assert_equal(cases, rank, expected)
        assert all(same(a.gradients, b.gradients) for a, b in zip(rank, got[0], strict=True))  # to the last bit


@pytest.mark.parametrize("recipe", ["topk", "topk, two", "groupmax", "relu"])
@pytest.mark.parametrize(("n", "parts"), [(2, 1), (3, 2)])
def test_so_they_are_where_terms_are_fewer_bytes(n: int, parts: int, recipe: str) -> None:
    """8 tokens, 132 features."""
    cases = cases_of(recipe)
    expected = reduced(cases, parts, 8, 132)
    got = processes.run(n, reduced, cases, parts, 8, 132)
    for rank in got:
        assert_equal(cases, rank, expected)
        assert all(same(a.gradients, b.gradients) for a, b in zip(rank, got[0], strict=True))
        assert all(result.n_terms for result in rank)


@pytest.mark.parametrize(("n_tokens", "d_features"), [(8, 132), (7, 132), (26, 11)])
@pytest.mark.parametrize("recipe", ["topk", "topk, two", "groupmax"])
def test_the_bytes_on_the_wire_are_those_of_the_plan(recipe: str, n_tokens: int, d_features: int) -> None:
    cases = cases_of(recipe)
    got = processes.run(3, reduced, cases, 1, n_tokens, d_features)
    for i, (architecture, _) in enumerate(cases):
        held = [rank[i].held for rank in got]
        n_used = {p: int(sum(rank[i].used[p] for rank in got).bool().sum()) for p in gradient_plan.beside(held)}
        whole = gradients.whole(list(made(architecture, recipe, d_features)[0].parameters()), n_used)
        planned = gradient_plan.sent(gradient_plan.decided(held, whole), whole, held[0], 3)
        for rank in got:
            assert rank[i].sent == {what: n for what, n in planned.items() if n}, architecture


def test_the_bytes_of_a_cross_layer_transcoder_are_those_of_the_formula() -> None:
    """TopK: 9 tokens by 3 ranks, k = 2, 132 features, in float64."""
    (result,) = processes.run(3, reduced, [("clt", "groupmax")], 1, 9, 132)[1]
    n, k, s = 3, 1, 8
    assert result.sent == {
        "gradient sizes": 8 * (3 + 2 * L + 2 * L + 2 * L) * 2,
        "gradient terms": 2 * L * (4 * (k * n + n) + 2 * s * k * n + 2 * s * n * D),
        "gradients": 2 * s * (L * 132 + L * D) * 2 // 3,
    }
    assert result.n_terms == L + L * (L + 1) // 2


def table_terms(n_tokens: int) -> list[tuple[Tensor, ...]]:
    """The terms of every table, after they were gathered."""
    with mesh.started(DDP, CPU) as ranks:
        model, objective = made("clt", "topk, two", 132)
        reducing = Gradients(model.parameters(), ranks.data)
        if ranks.data.size == 1:
            for parameter in model.parameters():
                deferred.want(parameter, parameter.dim() == 2)
        backward(model, objective, Share(ranks.data.rank, ranks.data.size, 2), n_tokens)
        reducing.reduce()
        terms = [term for parameter in model.parameters() for term in deferred.terms(parameter)]
        return [(term.pattern.indices, term.pattern.offsets, term.weights, term.rows) for term in terms]


def test_gathered_terms_are_those_of_one_process_in_its_order_of_tokens() -> None:
    """Two parts, 5 tokens each."""
    expected = table_terms(10)
    assert len(expected) == 2 * 2 * (L + L * (L + 1) // 2)
    for got in processes.run(3, table_terms, 10):
        for ours, theirs in zip(got, expected, strict=True):
            assert torch.equal(ours[0], theirs[0])
            assert torch.equal(ours[1], theirs[1])
            assert oracle.normwise(ours[2], theirs[2]) < 1e-14
            assert oracle.normwise(ours[3], theirs[3]) < 1e-14


def unlike() -> Result:
    """Three tables with terms: of the first rank 1 has a dense gradient instead, of the second rank 0 has nothing."""
    with mesh.started(DDP, CPU) as ranks:
        size, rank = ranks.data.size, ranks.data.rank
        tables = [torch.nn.Parameter(oracle.normal(132, D, seed=i)) for i in range(4)]
        reducing = Gradients(tables, ranks.data)
        for one in range(2) if size == 1 else [rank]:
            pattern = fixed_k(torch.tensor([[2, 5], [0, 2], [7, 1]]) + one, 132)
            values, rows = oracle.normal(6, seed=10 + one), oracle.normal(3, D, seed=20 + one)
            for i, table in enumerate(tables[:3]):
                if (i, one) == (0, 1):
                    (bag(pattern, values, table * 1) * rows).sum().backward()
                elif (i, one) != (1, 0):
                    (bag(pattern, values, table) * rows).sum().backward()
        held, _ = gradients.inspect(tables)
        with ranks.wire.counting() as counts:
            reducing.reduce()
        n_terms = [len(deferred.terms(table)) for table in tables]
        assert n_terms == [0, 0, 1, 0] or size == 1
        for table in tables:
            deferred.materialise(table)
        written = {str(i): table.grad for i, table in enumerate(tables) if table.grad is not None}
        return Result(written, held, {}, sum(n_terms), {what: count.sent for what, count in counts.items()})


def test_ranks_that_have_unlike_terms_agree_all_the_same() -> None:
    expected = unlike()
    assert sorted(expected.gradients) == ["0", "1", "2"]
    for got in processes.run(2, unlike):
        assert got.gradients.keys() == expected.gradients.keys()
        for name, gradient in expected.gradients.items():
            assert oracle.normwise(got.gradients[name], gradient) < 1e-14, name


def trained(optimizer: OptimOptions, recipe: str, dtype: torch.dtype, steps: int) -> list[Tensor]:
    """Weights and moments after so many steps."""
    with mesh.started(DDP, CPU) as ranks, products.using(Kernels.auto, CPU):
        model, objective = made("clt", recipe, 132)
        model.to(dtype)
        adam = optim.build(model.named_parameters(), optimizer, Place(ranks.features))
        reducing = Gradients(model.parameters(), ranks.data)
        share = Share(ranks.data.rank, ranks.data.size, 2)
        for step in range(steps):
            adam.zero_grad()
            backward(model, objective, share, 8, 100 * step)
            reducing.reduce()
            adam.step()
        return [tensor.detach().clone() for tensor in optimizer_tensors(model, adam).values()] + [
            parameter.detach() for parameter in model.parameters()
        ]


def assert_same_bytes(n: int, *args: Any) -> None:
    first, *others = processes.run(n, trained, *args, torch.float32, 50)
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_after_50_steps_weights_and_moments_are_the_same_bytes_on_every_rank() -> None:
    assert_same_bytes(2, OptimOptions("adam", lr=1e-3), "topk")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "recipe"), [("adamw", "topk, two"), ("adam", "relu"), ("muon", "groupmax"), ("signsgd", "topk")]
)
def test_so_they_are_with_any_optimiser_and_three_ranks(name: str, recipe: str) -> None:
    assert_same_bytes(3, OptimOptions(name, lr=1e-3, decay=0.0 if name == "signsgd" else 0.2), recipe)


@pytest.mark.parametrize("clip", [None, pytest.param(0.5, marks=pytest.mark.slow)])
def test_after_50_steps_they_are_those_of_one_process(clip: float | None) -> None:
    options = OptimOptions("adam", lr=1e-3, clip=clip)
    expected = trained(options, "topk", torch.float64, 50)
    for got in processes.run(2, trained, options, "topk", torch.float64, 50):
        assert all(oracle.normwise(a, b) < 1e-9 for a, b in zip(got, expected, strict=True))
