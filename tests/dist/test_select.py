"""Ranks choose together exactly what one process chooses."""

import copy
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from pipeline.arch.options import ArchOptions
from pipeline.core import activations, products
from pipeline.core.activations import Activation, BatchTopK, Choosing
from pipeline.core.options import ActivationOptions, Kernels, Rank
from pipeline.core.sparse import Sparse
from pipeline.dist import mesh as meshes
from pipeline.dist import select, shard
from pipeline.dist.mesh import Mesh
from pipeline.dist.wire import Op, sent_bytes
from pipeline.errors import UserError
from tests import oracle
from tests.dist import processes, threads

B, L, F = 7, 3, 22
GRIDS = [(2, 1), (3, 1), (1, 2), (2, 2), (3, 2)]
"""Feature ranks and data ranks."""

FIRST = [0, 5]
"""Where the tokens of two data ranks begin: 5 and 2 of them."""

SELECTIONS = {**oracle.SELECTIONS, "groupmax": oracle.group_max}
CASES = [
    ((2, 1), torch.float32),
    ((3, 1), torch.bfloat16),
    ((1, 2), torch.float64),
    ((2, 2), torch.float32),
    ((3, 2), torch.float64),
]


def samples(dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    h = oracle.normal(B, L, F)
    few = h.clone()
    few[..., 8:], few[3:] = -1.0, -few[3:].abs()
    last = -h.abs()
    last[5:] *= -1
    kinds = {
        "gaussian": h,
        "many ties": (2 * h).round(),
        "all equal": torch.ones_like(h),
        "nothing above 0": -h.abs(),
        "zeros": torch.zeros_like(h),
        "few, and all on one feature rank": few,
        "all on the last data rank": last,
        "huge and tiny": h * 1e30 ** h.sign(),
    }
    return {name: kind.to(dtype) for name, kind in kinds.items()}


def norms_of(dtype: torch.dtype) -> Tensor:
    """Powers of two, so that products are exact and ties stay ties; a feature of norm 0 is never chosen."""
    exponents = torch.randint(-2, 3, (L, F), generator=torch.Generator().manual_seed(4))
    norms = torch.full((L, F), 2.0, dtype=torch.float64).pow(exponents)
    norms[:, 3] = 0
    return norms.to(dtype)


class Here(NamedTuple):
    """What a rank has of a batch."""

    tokens: slice
    ids: Tensor
    rule: Activation


def here(options: ActivationOptions, mesh: Mesh, parts: list[shard.Shard]) -> Here:
    first = FIRST[mesh.data.rank]
    last = B if mesh.data.rank == mesh.data.size - 1 else FIRST[mesh.data.rank + 1]
    ids = parts[mesh.features.rank].ids()
    return Here(slice(first, last), ids, select.rule(options, L, parts, mesh))


def parts_of(options: ActivationOptions, n: int) -> list[shard.Shard]:
    """Several ranges a rank, so that the order of ranks is not that of features; whole groups where there are such."""
    arch = "clt" if options.name == "groupmax" else "matryoshka"
    return shard.shards(ArchOptions(arch, d_features=F), options, L, n)


def sparse(rule: Activation, h: Tensor, norms: Tensor | None) -> Tensor:
    layers = list(rule.choose([layer.clone() for layer in h.unbind(1)], norms))
    return Sparse([pattern for pattern, _ in layers], [values for _, values in layers]).dense()


def together(
    options: ActivationOptions, grid: tuple[int, int], h: Tensor, norms: Tensor, sparsely: bool
) -> tuple[Tensor, list[Activation]]:
    """What the ranks choose, put together, and their rules."""
    parts = parts_of(options, grid[0])

    def work(mesh: Mesh) -> tuple[Here, Tensor]:
        one = here(options, mesh, parts)
        mine = h[one.tokens][:, :, one.ids]
        found = sparse(one.rule, mine, norms[:, one.ids]) if sparsely else one.rule(mine, norms[:, one.ids])
        return one, found

    whole = torch.full_like(h, torch.nan)
    rules = []
    for one, found in threads.run(*grid, work):
        rows = whole[one.tokens]
        rows[:, :, one.ids] = found
        rules.append(one.rule)
    return whole, rules


def options_of(name: str, k: int, **more: object) -> ActivationOptions:
    return ActivationOptions(name, k=None if "k_per_layer" in more else k, **more)


@pytest.mark.parametrize("sparsely", [False, True])
@pytest.mark.parametrize(("grid", "dtype"), CASES)
@pytest.mark.parametrize("name", sorted(SELECTIONS))
def test_ranks_choose_what_one_process_chooses(
    name: str, grid: tuple[int, int], dtype: torch.dtype, sparsely: bool
) -> None:
    if name == "groupmax" and grid[0] == 3:
        pytest.skip("groups of 11 make two blocks")
    for rank in (None, Rank.norm):
        for k in (2, 11) if name == "groupmax" else (1, 9, F):  # 9 is more than a rank has
            options, norms = options_of(name, k, rank=rank), norms_of(dtype)
            for kind, h in samples(dtype).items():
                one = activations.build(options, L, F)
                expected = sparse(one, h, norms) if sparsely else one(h, norms)
                found, rules = together(options, grid, h, norms, sparsely)
                assert torch.equal(found, expected), (kind, k, rank)
                chosen = SELECTIONS[name](h * norms if rank else h, k)
                assert torch.equal(found, oracle.at_pairs(h, chosen)), (kind, k, rank)
                if isinstance(one, BatchTopK):
                    for rule in rules:
                        assert isinstance(rule, BatchTopK)
                        assert torch.equal(rule.threshold_ema, one.threshold_ema), (kind, k, rank)
                        assert torch.equal(rule.ema_weight, one.ema_weight), (kind, k, rank)


@pytest.mark.parametrize("grid", [(2, 1), (2, 2)])
@pytest.mark.parametrize("name", ["topk", "batchtopk"])
def test_each_layer_has_its_own_k_of_the_whole(name: str, grid: tuple[int, int]) -> None:
    options, norms = options_of(name, 0, k_per_layer=[1, 14, 5]), norms_of(torch.float64)
    for h in samples().values():
        expected = oracle.at_pairs(h, SELECTIONS[name](h, [1, 14, 5]))
        for sparsely in (False, True):
            assert torch.equal(together(options, grid, h, norms, sparsely)[0], expected)


def test_an_annealed_k_is_that_of_the_moment_on_every_rank() -> None:
    options, h = options_of("topk", 2, k_start=20, k_anneal=1.0), samples()["many ties"]
    parts = parts_of(options, 2)

    def work(mesh: Mesh) -> list[Tensor]:
        one = here(options, mesh, parts)
        found = []
        for done in (0.0, 0.5, 1.0):
            one.rule.at(done)
            found.append(one.rule(h[:, :, one.ids]))
        return found

    first, second = threads.run(2, 1, work)
    for left, right, k in zip(first, second, (20, 11, 2), strict=True):
        expected = oracle.at_pairs(h, oracle.top_k(h, k))
        assert torch.equal(left, expected[:, :, parts[0].ids()])
        assert torch.equal(right, expected[:, :, parts[1].ids()])


@pytest.mark.parametrize("name", sorted(SELECTIONS))
def test_a_step_after_another_finds_the_same_though_it_begins_where_that_one_ended(name: str) -> None:
    options, parts = options_of(name, 2), parts_of(options_of(name, 2), 2)
    scales = [1.0, 1.1, 0.01, 100.0, 0.0, 1.0]
    h = samples()["gaussian"]
    one = activations.build(options, L, F)
    expected = [sparse(one, scale * h, None) for scale in scales]

    def work(mesh: Mesh) -> bool:
        mine = here(options, mesh, parts)
        return all(
            torch.equal(
                sparse(mine.rule, scale * h[mine.tokens][:, :, mine.ids], None), wanted[mine.tokens][:, :, mine.ids]
            )
            for scale, wanted in zip(scales, expected, strict=True)
        )

    assert threads.run(2, 2, work) == [True] * 4


@pytest.mark.parametrize("grid", [(1, 2), (2, 2)])
@pytest.mark.parametrize("name", sorted(SELECTIONS))
def test_where_data_ranks_look_at_the_same_tokens_these_compete_once(name: str, grid: tuple[int, int]) -> None:
    options = options_of(name, 2)
    parts = parts_of(options, grid[0])
    for h in samples().values():
        expected = oracle.at_pairs(h, SELECTIONS[name](h, 2))

        def work(mesh: Mesh, h: Tensor = h, expected: Tensor = expected) -> None:
            one = here(options, mesh, parts)
            with one.rule.peers.same_tokens(), one.rule.peers.same_tokens():
                assert torch.equal(one.rule(h[:, :, one.ids]), expected[:, :, one.ids])
            # And afterwards those of other ranks count again.
            one.rule(h[one.tokens][:, :, one.ids])

        threads.run(*grid, work)


@pytest.mark.parametrize("name", sorted(oracle.SELECTIONS))
def test_faster_kernels_choose_the_same(name: str) -> None:
    options, norms = options_of(name, 9), norms_of(torch.float32)
    with products.using(Kernels.auto, torch.device("cpu")):
        for h in samples(torch.float32).values():
            found, _ = together(options, (3, 2), h, norms, sparsely=True)
            assert torch.equal(found, oracle.at_pairs(h, SELECTIONS[name](h, 9)))


@pytest.mark.parametrize("kernels", [Kernels.torch, Kernels.auto])
def test_a_data_rank_may_have_no_token_at_all(kernels: Kernels) -> None:
    with products.using(kernels, torch.device("cpu")):
        one_rank_has_all_tokens()


def one_rank_has_all_tokens() -> None:
    h = samples(torch.float32)["many ties"]
    for name in ("batchtopk", "batchtopk_across"):
        options = options_of(name, 2)
        expected = oracle.at_pairs(h, SELECTIONS[name](h, 2))

        def work(mesh: Mesh, options: ActivationOptions = options) -> Tensor:
            one = here(options, mesh, parts_of(options, 1))
            return sparse(one.rule, h if mesh.data.rank == 0 else h[:0], None)

        found, nothing = threads.run(1, 2, work)
        assert torch.equal(found, expected)
        assert nothing.shape == (0, L, F)


def test_a_nan_of_any_rank_is_chosen_by_topk_so_that_the_loss_shows_it() -> None:
    h = samples()["many ties"]
    h[4, 1, 20] = torch.nan
    found, _ = together(options_of("topk", 3), (3, 1), h, norms_of(torch.float64), sparsely=True)
    where = found.isnan().nonzero().tolist()
    assert where == [[4, 1, 20]]
    tidy = [b for b in range(B) if b != 4]
    assert torch.equal(found[tidy], oracle.at_pairs(h, oracle.top_k(h, 3))[tidy])


@pytest.mark.parametrize("name", ["topk", "batchtopk", "batchtopk_across"])
def test_gradients_of_the_dense_form_reach_the_chosen_pairs_only(name: str) -> None:
    h, g = samples()["many ties"], oracle.normal(B, L, F, seed=9)
    expected = oracle.at_pairs(g, SELECTIONS[name](h, 3))
    options = options_of(name, 3)
    parts = parts_of(options, 2)

    def work(mesh: Mesh) -> tuple[Here, Tensor]:
        one = here(options, mesh, parts)
        mine = h[one.tokens][:, :, one.ids].clone().requires_grad_()
        one.rule(mine).backward(g[one.tokens][:, :, one.ids])
        assert mine.grad is not None
        return one, mine.grad

    for one, grad in threads.run(2, 2, work):
        assert torch.equal(grad, expected[one.tokens][:, :, one.ids])


# What AuxK asks for


@pytest.mark.parametrize("grid", [(2, 1), (3, 1), (1, 2), (3, 2)])
@pytest.mark.parametrize("k", [1, 3, 5])
def test_the_strongest_dead_features_are_those_of_all_ranks(grid: tuple[int, int], k: int) -> None:
    dead = torch.zeros(L, F, dtype=torch.bool)
    dead[0, [1, 4, 5, 12, 17, 21]] = True  # of several ranks
    dead[1, [2, 3]] = True  # fewer than k, or of one rank only
    options = options_of("topk", 2)
    parts = parts_of(options, grid[0])
    for kind, h in samples().items():
        if grid[0] == 1 and kind in ("many ties", "all equal"):
            continue  # one rank has all features, and torch's choice among equals
        expected = torch.zeros_like(h)
        for layer in range(L):
            ids = dead[layer].nonzero().squeeze(1)
            expected[:, layer, ids] = oracle.at_pairs(
                h[:, [layer]][:, :, ids], oracle.top_k(h[:, [layer]][:, :, ids], k)
            )[:, 0]

        def work(mesh: Mesh, h: Tensor = h, expected: Tensor = expected) -> None:
            one = here(options, mesh, parts)
            own = [dead[layer][one.ids].nonzero().squeeze(1) for layer in range(L)]
            mine = [h[one.tokens][:, layer][:, one.ids[ids]].clone().requires_grad_() for layer, ids in enumerate(own)]
            found = list(one.rule.peers.strongest([(z.relu(), ids) for z, ids in zip(mine, own, strict=True)], k))
            for layer, (z, ids, start) in enumerate(zip(found, own, mine, strict=True)):
                wanted = expected[one.tokens][:, layer][:, one.ids[ids]]
                assert torch.equal(z, wanted)
                (grad,) = torch.autograd.grad(z.sum(), start)
                assert torch.equal(grad, (wanted > 0).to(grad.dtype))

        threads.run(*grid, work)


def test_alone_the_strongest_come_layer_by_layer() -> None:
    z = oracle.normal(B, F).relu()
    peers = select.peers([shard.whole(F)], meshes.alone())
    few, many = peers.strongest([(z[:, :3], torch.arange(3)), (z, torch.arange(F))], 4)
    assert torch.equal(few, z[:, :3])
    assert torch.equal(many, oracle.at_pairs(z[:, None], oracle.top_k(z[:, None], 4))[:, 0])


# What is said on the way


@pytest.mark.parametrize(("dtype", "n_bytes"), [(torch.float32, 4), (torch.float64, 8), (torch.bfloat16, 4)])
@pytest.mark.parametrize("kind", ["gaussian", "all equal", "zeros"])
@pytest.mark.parametrize("grid", GRIDS)
def test_a_step_sends_what_the_formula_says(grid: tuple[int, int], kind: str, dtype: torch.dtype, n_bytes: int) -> None:
    n_features, n_data = grid
    h = samples(dtype)[kind]

    def counts(name: str, k: int, sparsely: bool) -> dict[str, tuple[int, int]]:
        options = options_of(name, k)
        parts = parts_of(options, n_features)

        def work(mesh: Mesh) -> dict[str, tuple[int, int]]:
            one = here(options, mesh, parts)
            mine = h[one.tokens][:, :, one.ids]
            sparse(one.rule, mine, None) if sparsely else one.rule(mine)
            return {what: (count.calls, count.sent) for what, count in mesh.wire.counts.items()}

        return threads.run(*grid, work)[-1]

    tokens = B - FIRST[n_data - 1]
    for k in (3, 20):
        most = max(part.n for part in parts_of(options_of("topk", k), n_features))
        gather = sent_bytes(Op.gather, tokens * L * min(k, most) * (n_bytes + 4), n_features)
        for sparsely in (False, True):
            assert counts("topk", k, sparsely) == ({} if n_features == 1 else {"topk": (1, gather)})
    passes = 6 if n_bytes == 8 else 3
    for name, rows, positions in (("batchtopk", L, B * F), ("batchtopk_across", 1, B * F * L)):
        # Equal values take as many passes more as the positions have elevens of bits: one.
        n = passes + (1 if kind == "all equal" and positions < 2048 else 0)
        expected = {"batchtopk": (n, n * sent_bytes(Op.reduce, rows * 2048 * 8, n_features * n_data))}
        if n_data > 1:
            expected["batchtopk tokens"] = (1, sent_bytes(Op.gather, 8, n_data))
        found = counts(name, 3, True)
        if kind == "gaussian" and dtype is torch.bfloat16:  # rounded to ties or not
            assert found["batchtopk"][0] in (n, n + 1)
        else:
            assert found == expected
    if n_features < 3:
        assert counts("groupmax", 2, True) == {}


def test_the_dead_features_of_no_rank_are_said_unless_they_are_many() -> None:
    parts = shard.shards(ArchOptions("clt", d_features=F), options_of("topk", 2), L, 2)

    def work(mesh: Mesh) -> list[tuple[int, int]]:
        peers = select.peers(parts, mesh)
        n = 4 if mesh.features.rank == 0 else 1
        few, many = (torch.ones(B, 1), torch.arange(1)), (torch.ones(B, n), torch.arange(n))
        seen = []
        for layers in ([few, few], [few, many]):
            mesh.wire.counts.clear()
            list(peers.strongest(layers, 3))
            seen.append((mesh.wire.counts["aux_k"].calls, mesh.wire.counts["aux_k"].sent))
        return seen

    for seen in threads.run(2, 1, work):
        assert seen == [(1, 2 * 8), (2, 2 * 8 + B * 3 * 8)]


# Who the peers are


def test_one_process_has_no_peers() -> None:
    rule = select.rule(options_of("batchtopk", 2), L, [shard.whole(F)], meshes.alone())
    assert torch.equal(
        sparse(rule, samples()["many ties"], None),
        sparse(activations.build(options_of("batchtopk", 2), L, F), samples()["many ties"], None),
    )
    assert type(rule.peers).__name__ == "Peers"
    held = select.held([shard.whole(F)], meshes.alone())
    assert (held.n, held.ids) == (F, None)


def test_k_and_its_checks_are_of_the_whole() -> None:
    parts = parts_of(options_of("topk", 2), 3)

    def work(mesh: Mesh) -> tuple[list[int], int, int]:
        rule = select.rule(options_of("topk", F), L, parts, mesh)
        assert isinstance(rule, Choosing)
        with pytest.raises(UserError, match=r"k=23 must lie between 1 and arch.d_features=22"):
            select.rule(options_of("topk", F + 1), L, parts, mesh)
        return rule.k, rule.whole, rule.d_features

    assert [found[:2] for found in threads.run(3, 1, work)] == [([F] * L, F)] * 3
    assert sum(found[2] for found in threads.run(3, 1, work)) == F


def test_a_copy_of_a_rule_has_the_same_peers() -> None:
    parts = parts_of(options_of("topk", 2), 2)

    def work(mesh: Mesh) -> bool:
        rule = select.rule(options_of("topk", 2), L, parts, mesh)
        return copy.deepcopy(rule).peers is rule.peers

    assert threads.run(2, 1, work) == [True, True]


@pytest.mark.parametrize("grid", [(3, 1), (2, 2)])
def test_real_processes_choose_what_one_does(grid: tuple[int, int]) -> None:
    found = processes.run(grid[0] * grid[1], _in_a_process, grid)
    assert found == [True] * len(found)


def _in_a_process(grid: tuple[int, int]) -> bool:
    from pipeline.dist.options import DistOptions

    right = True
    with meshes.started(DistOptions("mesh", features=grid[0], data=grid[1]), torch.device("cpu")) as mesh:
        for name in ("topk", "batchtopk", "batchtopk_across"):
            options = options_of(name, 3)
            one = here(options, mesh, parts_of(options, grid[0]))
            for h in samples(torch.float32).values():
                expected = oracle.at_pairs(h, SELECTIONS[name](h, 3))[one.tokens][:, :, one.ids]
                right &= torch.equal(sparse(one.rule, h[one.tokens][:, :, one.ids], None), expected)
    return right
