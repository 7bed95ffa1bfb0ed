"""The compiled kernels against double loops in float64, and choices against sorts, bit for bit."""

import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pipeline.core import native, native_build, products
from pipeline.core.deferred import RowTerm
from pipeline.core.options import Kernels
from pipeline.core.pattern import Pattern, fixed_k
from pipeline.errors import UserError
from tests import oracle

needs_compiler = pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="no C++ compiler")
CPU = torch.device("cpu")

RAGGED = {
    "ragged": [[2, 5], [0], [1, 3, 6], [5, 2]],
    "empty rows first, inside and last": [[], [4, 1], [], [], [6], []],
    "one token, no feature": [[]],
    "no feature at all": [[], [], []],
    "every feature": [list(range(7))] * 3,
    "one feature for all": [[3]] * 9,
    "padding at index 0": [[4, 0, 0], [0, 0, 0], [0, 5, 0]],
}
WIDTHS = [1, 5, 37, 64]


def csr(rows: list[list[int]], n_features: int = 7) -> Pattern:
    offsets = [sum(map(len, rows[:b])) for b in range(len(rows) + 1)]
    return Pattern(torch.tensor([i for row in rows for i in row], dtype=torch.int64), torch.tensor(offsets), n_features)


def random_pattern(n_tokens: int, n_features: int, k: int, seed: int = 0) -> Pattern:
    return fixed_k(oracle.normal(n_tokens, n_features, seed=seed).topk(k).indices, n_features)


def float32(*shape: int, seed: int) -> Tensor:
    return oracle.normal(*shape, seed=seed, dtype=torch.float32)


@pytest.fixture
def with_threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@needs_compiler
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("rows", RAGGED.values(), ids=RAGGED.keys())
def test_the_three_products_equal_the_loops(rows: list[list[int]], width: int) -> None:
    pattern = csr(rows)
    pairs = [(b, i) for b, row in enumerate(rows) for i in row]
    values, table = float32(len(pairs), seed=1), float32(7, width, seed=2)
    x = float32(len(rows), 2 * width, seed=3)[:, :width]  # rows that lie apart
    y, inner, d_table = torch.zeros(len(rows), width).double(), torch.zeros(len(pairs)), torch.zeros(7, width).double()
    for e, (b, i) in enumerate(pairs):
        y[b] += values[e].double() * table[i].double()
        d_table[i] += values[e].double() * x[b].double()
        inner[e] = x[b].double() @ table[i].double()
    assert oracle.normwise(native.bag(pattern, values, table), y) < 1e-6
    assert oracle.normwise(native.row_products(pattern, x, table), inner) < 1e-6
    assert oracle.normwise(native.bag_of_tokens(pattern, values, x), d_table) < 1e-6


@needs_compiler
def test_products_are_added_to_what_is_there_when_told_so() -> None:
    pattern, values, table = csr(RAGGED["ragged"]), float32(8, seed=1), float32(7, 5, seed=2)
    space = torch.ones(4, 3, 5)
    expected = 1 + native.bag(pattern, values, table)
    native.bag(pattern, values, table, space[:, 1], add=True)
    assert oracle.normwise(space[:, 1], expected) < 1e-6
    assert (space[:, 0] == 1).all()
    assert (space[:, 2] == 1).all()
    x, sums = float32(4, 5, seed=3), torch.ones(8)
    native.row_products(pattern, x, table, sums, add=True)
    assert oracle.normwise(sums, 1 + native.row_products(pattern, x, table)) < 1e-6


@needs_compiler
def test_the_transposed_pattern_is_torchs() -> None:
    rows = [[5, 2], [], [2], [6, 5]]
    for got, expected in zip(native.by_feature(csr(rows)), csr(rows).by_feature, strict=True):
        assert torch.equal(got, expected)


HARD = {
    "normal": lambda: float32(19, 301, seed=5),
    "narrow": lambda: float32(7, 9, seed=5),
    "ties everywhere": lambda: (2 * float32(31, 300, seed=6)).round(),
    "all equal": lambda: torch.ones(3, 200),
    "none above 0": lambda: -float32(4, 150, seed=7).abs(),
    "few above 0": lambda: float32(5, 260, seed=8) - 2.5,
    "ascending": lambda: torch.arange(400.0)[None] + torch.zeros(2, 1),
    "an infinity": lambda: float32(3, 200, seed=9).index_fill(1, torch.tensor([17, 140]), float("inf")),
}


@needs_compiler
@pytest.mark.parametrize("k", [1, 4, 9])
@pytest.mark.parametrize("make", HARD.values(), ids=HARD.keys())
def test_topk_chooses_what_a_sort_chooses(make: Callable[[], Tensor], k: int) -> None:
    h = make()
    values, indices = native.topk(h, k)
    for row, taken, where in zip(h.tolist(), values.tolist(), indices.tolist(), strict=True):
        best = sorted(range(len(row)), key=lambda i: (-row[i], i))[:k]
        expected = {(i, row[i]) for i in best if row[i] > 0}
        assert {(i, v) for i, v in zip(where, taken, strict=True) if v > 0} == expected
        assert all((i, v) == (0, 0.0) for i, v in zip(where, taken, strict=True) if not v > 0)


@needs_compiler
@pytest.mark.parametrize("width", [7, 64, 130])
def test_topk_takes_every_feature_where_k_is_their_number(width: int) -> None:
    h = float32(5, width, seed=1)
    values, indices = native.topk(h, width)
    dense = torch.zeros(5, width).scatter_add(1, indices, values)
    assert torch.equal(dense, h.relu())


@needs_compiler
@pytest.mark.parametrize("place", [0, 77, 199])
def test_a_nan_is_chosen_so_that_the_loss_shows_it(place: int) -> None:
    h = float32(2, 200, seed=1)
    h[1, place] = float("nan")
    values, indices = native.topk(h, 3)
    assert values[1].isnan().tolist().count(True) == 1
    assert int(indices[1][values[1].isnan()]) == place
    assert not values[0].isnan().any()
    chosen, _ = native.largest(h.flatten(), 5, 1.0)
    assert 200 + place in chosen.tolist()


@needs_compiler
@pytest.mark.parametrize("guess", [0.0, 0.5, 1.9, 50.0])
@pytest.mark.parametrize("n", [1, 40, 100000])
@pytest.mark.parametrize("make", HARD.values(), ids=HARD.keys())
def test_the_largest_of_a_batch_are_those_of_torch(make: Callable[[], Tensor], n: int, guess: float) -> None:
    flat = make().flatten()
    got, expected = native.largest(flat, n, guess), products.largest(flat, n, guess)
    assert torch.equal(got[0], expected[0])
    assert float(got[1]) == float(expected[1])


@needs_compiler
@pytest.mark.parametrize("share", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("half", [0.0, 0.4])
@pytest.mark.parametrize("make", HARD.values(), ids=HARD.keys())
def test_the_pairs_of_a_gate_are_those_of_torch(make: Callable[[], Tensor], half: float, share: float) -> None:
    h = make()
    theta = 0.5 + float32(h.shape[1], seed=3).abs() if half else torch.zeros(h.shape[1])
    most = round(share * h.numel())
    slow = products.gate(h.double(), theta.double(), half, most)
    for kernels in (Kernels.torch, Kernels.compiled):
        with products.using(kernels, CPU):
            found = products.gate(h, theta, half, most)
        assert found.n_active == slow.n_active == int((h > theta).sum())
        assert (found.active is None) == (found.n_active > most)
        if found.active is not None:
            tokens, indices = (h > theta).nonzero(as_tuple=True)
            assert torch.equal(found.active.tokens, tokens)
            assert torch.equal(found.active.indices, indices)
            assert torch.equal(found.values, h[tokens, indices])
        expected = ((h.double() - theta > -half) & (h <= theta)).nonzero(as_tuple=True)
        assert (found.beyond is None) == (half == 0.0 or found.n_active + expected[0].numel() > most)
        if found.beyond is not None:
            assert found.n_beyond == expected[0].numel()
            assert torch.equal(found.beyond.tokens, expected[0])
            assert torch.equal(found.beyond.indices, expected[1])


@needs_compiler
def test_a_gate_lets_a_nan_through_so_that_the_loss_shows_it() -> None:
    h = float32(3, 200, seed=1)
    h[1, 77] = h[2, 199] = float("nan")
    for kernels in (Kernels.torch, Kernels.compiled):
        with products.using(kernels, CPU):
            found = products.gate(h, torch.full((200,), 0.7), 0.2, 600)
        assert found.active is not None
        where = found.values.isnan().nonzero().squeeze(1)
        assert found.active.tokens[where].tolist() == [1, 2]
        assert found.active.indices[where].tolist() == [77, 199]


@needs_compiler
@pytest.mark.parametrize("width", [5, 64, 150])
def test_products_with_sums_of_rows_equal_those_of_each_row(width: int) -> None:
    pattern, table = random_pattern(40, 130, 5), float32(130, width, seed=2)
    spread = float32(40, 3, width, seed=1)[:, 1]
    each = products.row_products(pattern, spread.double(), table.double())
    expected = 1 + torch.zeros(130).double().index_add(0, pattern.indices, each)
    for kernels in (Kernels.torch, Kernels.compiled):
        sums = torch.ones(130)
        with products.using(kernels, CPU):
            products.sum_products(pattern, spread, table, sums)
        assert oracle.normwise(sums, expected) < 1e-6


def adam_inputs() -> tuple[list[Tensor], Tensor, list[RowTerm]]:
    """weight, two moments; a dense gradient; two terms, one with rows that lie apart."""
    weight, m, v = float32(130, 37, seed=1), float32(130, 37, seed=2), float32(130, 37, seed=3).square()
    first, second = random_pattern(40, 130, 5), random_pattern(11, 130, 3, seed=9)
    spread = float32(11, 3, 37, seed=6)[:, 1]
    terms = [
        RowTerm(first, float32(200, seed=4), float32(40, 37, seed=5)),
        RowTerm(second, float32(33, seed=7), spread),
    ]
    return [weight, m, v], float32(130, 37, seed=8), terms


@needs_compiler
@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize("beta1", [0.9, 0.0])
@pytest.mark.parametrize(("with_grad", "n_terms"), [(True, 0), (True, 2), (False, 1), (False, 2)])
def test_adam_with_terms_equals_the_formula(with_grad: bool, n_terms: int, beta1: float, decoupled: bool) -> None:
    (weight, m, v), grad, terms = adam_inputs()
    g = grad.double() if with_grad else torch.zeros(130, 37).double()
    for term in terms[:n_terms]:
        for e, (b, i) in enumerate(zip(term.pattern.tokens.tolist(), term.pattern.indices.tolist(), strict=True)):
            g[i] += term.weights[e].double() * term.rows[b].double()
    lr, beta2, eps, decay, step = 0.02, 0.99, 1e-6, 0.1, 3.0
    W = weight.double() * (1 - lr * decay) if decoupled else weight.double()
    g = g if decoupled else g + decay * W
    M, V = beta1 * m.double() + (1 - beta1) * g, beta2 * v.double() + (1 - beta2) * g * g
    W = W - lr * (M / (1 - beta1**step)) / ((V / (1 - beta2**step)).sqrt() + eps)
    native.adam(
        weight, (m, v), grad if with_grad else None, terms[:n_terms],
        step=step, lr=lr, betas=(beta1, beta2), eps=eps, weight_decay=decay, decoupled=decoupled,
    )  # fmt: skip
    assert oracle.normwise(weight, W) < 1e-6
    assert oracle.normwise(m, M) < 1e-6
    assert oracle.normwise(v, V) < 1e-6


@needs_compiler
def test_the_number_of_threads_changes_no_bit(with_threads: Callable[[int], None]) -> None:
    pattern, table, x = random_pattern(90, 150, 6), float32(150, 33, seed=1), float32(90, 33, seed=2)
    weights, h = float32(540, seed=3), float32(90, 150, seed=4)

    def everything() -> list[Tensor]:
        state, grad, terms = adam_inputs()
        native.adam(
            state[0], (state[1], state[2]), grad, terms,
            step=2.0, lr=0.01, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.0, decoupled=False,
        )  # fmt: skip
        return [
            native.bag(pattern, weights, table),
            native.row_products(pattern, x, table),
            native.bag_of_tokens(pattern, weights, x),
            *native.topk(h, 4),
            *state,
        ]

    with_threads(1)
    one = everything()
    with_threads(2)
    two = everything()
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@needs_compiler
def test_other_types_take_torchs_way() -> None:
    pattern, table = csr(RAGGED["ragged"]), oracle.normal(7, 5)
    with products.using(Kernels.compiled, CPU):
        assert products.active() == Kernels.compiled
        y = products.bag(pattern, oracle.normal(8, seed=2), table)
    assert y.dtype == torch.float64
    assert torch.equal(y, products.bag(pattern, oracle.normal(8, seed=2), table))
    assert products.active() == Kernels.torch


# Building


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A process that has built nothing, with an empty cache folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    native_build.library.cache_clear()
    yield tmp_path
    native_build.library.cache_clear()


def test_without_a_compiler_auto_takes_torch_and_says_so(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PATH", str(fresh))
    with caplog.at_level(logging.INFO), products.using(Kernels.auto, CPU) as kernels:
        assert kernels == products.active() == Kernels.torch
    assert "no C++ compiler" in caplog.text
    with pytest.raises(UserError, match=r"no C\+\+ compiler.*install one"), products.using(Kernels.compiled, CPU):
        pass
    assert products.active() == Kernels.torch


def test_kernels_for_another_device_are_refused() -> None:
    for kernels, device in ((Kernels.compiled, "cuda"), (Kernels.triton, "cpu")):
        with pytest.raises(UserError, match=r"use train\.kernels=auto"), products.using(kernels, torch.device(device)):
            pass


def script(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def test_a_compiler_that_fails_is_an_error_with_its_words(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = script(
        fresh / "cc", 'test "$1" = --version && exit 0; echo "kernels.cpp: error: no such flag" >&2; exit 1'
    )
    monkeypatch.setenv("CXX", compiler)
    with pytest.raises(UserError, match=r"no such flag.*train\.kernels=torch"):
        native_build.built()
    assert list(native_build.folder().iterdir()) == []


def test_a_library_that_does_not_load_is_an_error_with_its_file(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", script(fresh / "cc", 'for last; do :; done; test "$1" = --version || echo x > "$last"'))
    with pytest.raises(UserError, match=r"kernels-.*\.so does not load.*delete it"):
        native_build.library()


def test_a_library_is_built_once_and_again_for_another_compiler(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counted = 'test "$1" = --version && echo {0} && exit 0; echo x >> {1}/calls; for last; do :; done; echo > "$last"'
    monkeypatch.setenv("CXX", script(fresh / "cc", counted.format("one", fresh)))
    first = native_build.built()
    assert first == native_build.built()
    assert first.parent == fresh / "clt" / "native"
    monkeypatch.setenv("CXX", script(fresh / "cc", counted.format("two", fresh)))
    assert native_build.built() != first
    assert (fresh / "calls").read_text() == "x\nx\n"
    assert len(list(native_build.folder().iterdir())) == 2
