from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.core.normalize import MlpNorm
from pipeline.data import harvest as module
from pipeline.data.harvest import Buffers, Rows, finite, harvest, statistics, sums
from pipeline.data.layout import SITES
from pipeline.data.tokens import Packed, Split
from pipeline.errors import UserError
from tests.data import fake
from tests.data.fake import D, FakeModel, L, T


def all_rows(model: FakeModel, packed: Packed, contexts: range, batch_tokens: int) -> list[Rows]:
    """All at once, so every pass has a buffer of its own."""
    buffers = Buffers(fake.as_model(model), packed.contexts.shape[1], batch_tokens, n=len(contexts))
    return list(harvest(fake.as_model(model), packed, contexts, buffers))


def test_rows_stay_valid_for_as_many_passes_as_there_are_buffers() -> None:
    model, packed = fake.as_model(FakeModel()), fake.pack()[Split.train]
    expected = all_rows(FakeModel(), packed, range(9), batch_tokens=2 * T)
    passes = harvest(model, packed, range(9), Buffers(model, T, batch_tokens=2 * T, n=3))
    rows = [next(passes) for _ in range(3)]
    for kept, fresh in zip(rows, expected, strict=False):
        assert torch.equal(kept.resid_mid, fresh.resid_mid)
        assert torch.equal(kept.mlp_out, fresh.mlp_out)
    next(passes)
    assert not torch.equal(rows[0].mlp_out, expected[0].mlp_out)
    assert torch.equal(rows[1].mlp_out, expected[1].mlp_out)


def test_a_row_is_a_token_after_the_first_of_its_context() -> None:
    packed = fake.pack()[Split.train]
    resid_mid, mlp_out = FakeModel().collect(torch.from_numpy(packed.contexts))
    t = 0
    for rows in all_rows(FakeModel(), packed, range(len(packed.contexts)), batch_tokens=3 * T):
        assert rows.first == t
        for got, full in ((rows.resid_mid, resid_mid), (rows.mlp_out, mlp_out)):
            assert got.dtype == torch.bfloat16
            for values in got:
                context, position = t // (T - 1), 1 + t % (T - 1)
                assert torch.equal(values, full[context, position].bfloat16())
                t += 1
            t -= len(got)
        t += len(rows.resid_mid)
    assert t == packed.n_rows == 41 * 6 - 2  # no first position, no padding


def test_passes_do_not_cross_the_contexts_that_are_asked_for() -> None:
    model, shapes = FakeModel(), []
    collect = model.collect

    def counted(tokens: Tensor, **more: Any) -> tuple[Tensor, Tensor]:
        shapes.append(len(tokens))
        return collect(tokens, **more)

    model.collect = counted  # type: ignore[method-assign]
    packed = fake.pack()[Split.train]
    rows = all_rows(model, packed, range(10, 17), batch_tokens=3 * T + 5)
    assert shapes == [3, 3, 1]
    assert [r.first for r in rows] == [60, 78, 96]
    shapes.clear()
    all_rows(model, packed, range(10, 12), batch_tokens=1)  # at least a context
    assert shapes == [1, 1]


def random_rows(n: int, seed: int) -> Rows:
    generator = torch.Generator().manual_seed(seed)
    resid_mid, mlp_out = (torch.randn(n, L, D, generator=generator).mul(7).bfloat16() for _ in range(2))
    return Rows(0, resid_mid, mlp_out)


@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_sums_and_statistics_follow_their_formulas(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PIECE", 100)  # 6 rows
    threads = torch.get_num_threads()
    norm = FakeModel().mlp_norm()._replace(kind=kind)
    rows = random_rows(101, seed=0)
    expected = np.zeros((3, 2, L, D))
    values: list[list[np.ndarray]] = [[], [], []]
    for n in range(101):
        sites = (rows.resid_mid[n].double(), normed(rows.resid_mid[n], norm), rows.mlp_out[n].double())
        for site, x in enumerate(sites):
            expected[site] += np.stack([x.numpy(), x.numpy() ** 2])
            values[site].append(x.numpy())
    got = sums(rows, norm).numpy()
    np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-5)
    np.testing.assert_allclose(got[[0, 2]], expected[[0, 2]], rtol=1e-14)  # exact numbers, summed in float64
    assert torch.get_num_threads() == threads
    found = statistics(got, 101)
    for site, x in zip(SITES, map(np.stack, values), strict=True):
        np.testing.assert_allclose(found[f"{site}/mean"], x.mean(axis=0), rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(found[f"{site}/std"], x.std(axis=0), rtol=1e-6)
        np.testing.assert_allclose(found[f"{site}/rms"], np.sqrt((x**2).mean(axis=(0, 2))), rtol=1e-6)


def normed(resid: Tensor, norm: MlpNorm) -> Tensor:
    """[L, D] by the formula of the norm, in float64."""
    x = resid.double()
    if norm.kind == "layer":
        x = x - x.mean(-1, keepdim=True)
    return x / (x.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.gain + norm.bias


def test_the_spread_of_a_dimension_that_never_varies_is_zero() -> None:
    rows = Rows(0, torch.full((50, L, D), 0.1).bfloat16(), torch.full((50, L, D), -3.3).bfloat16())
    std = statistics(sums(rows, FakeModel().mlp_norm()).numpy(), 50)["mlp_out/std"]
    assert (std < 1e-7).all()


def test_sums_do_not_depend_on_the_number_of_threads() -> None:
    rows, norm = random_rows(1000, seed=1), FakeModel().mlp_norm()
    threads = torch.get_num_threads()
    found = []
    for n in (1, 2, 3):
        torch.set_num_threads(n)
        found.append(sums(rows, norm).numpy())
    torch.set_num_threads(threads)
    assert (found[0] == found[1]).all()
    assert (found[0] == found[2]).all()


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_activations_that_are_not_finite_are_refused(wrong: float) -> None:
    rows = random_rows(10, seed=2)
    rows.mlp_out[3, 2, 1] = wrong
    with pytest.raises(UserError, match=r"mlp_out of layer 6 is not finite .* use model\.dtype=float32"):
        finite(sums(rows, FakeModel().mlp_norm()), first_layer=4)
