"""Every number of metrics.json against `tests/slow_metrics.py`, on inputs where a shortcut shows."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.core.metrics import Firing, Reconstruction, as_plain
from pipeline.core.metrics_predictions import Divergence
from pipeline.core.metrics_weights import decoder_norm_histogram, threshold_histogram
from pipeline.core.sparse import sparsify
from pipeline.interp import contexts as by_context
from pipeline.interp.evaluation import Fit, rule_metrics, valid_positions, worst_contexts
from pipeline.interp.replacement import Basis
from tests import oracle, slow_metrics

C, T, L, D, S, F, V = 4, 6, 3, 5, 2, 7, 9
N = 17
"""Rows: the fourth context has two positions of text and three of padding."""


class Case:
    """Random rows, features and logits of four contexts."""

    def __init__(self, n_rows: int = N) -> None:
        self.n_rows = n_rows
        scale = torch.tensor([1.0, 5.0, 0.2])[:, None]
        self.y = oracle.normal(N, L, D)[:n_rows] * scale + oracle.normal(L, D, seed=2)
        self.y_hat = self.y + 0.3 * oracle.normal(N, L, D, seed=3)[:n_rows]
        self.features = (oracle.normal(N, S, F, seed=4) - torch.linspace(-1, 2.5, F)).relu()[:n_rows]
        self.features[:, 0, 0] = 1.0
        names = ("original", "threshold", "zero_ablation", "mean_ablation")
        self.logits = {name: 2 * oracle.normal(C, T, V, seed=5 + i) for i, name in enumerate(names)}
        self.logits["threshold"] = self.logits["original"] + 0.3 * self.logits["threshold"]
        self.contexts = np.random.default_rng(0).integers(0, V, (C, T), dtype=np.int32)


def constant_offset(case: Case) -> None:
    case.y_hat = case.y + oracle.normal(L, D, seed=9)


def constant_targets(case: Case) -> None:
    case.y[:, 1] = 0.1  # not exact in binary


def targets_of_zero(case: Case) -> None:
    case.y[:, 2] = 0
    case.y[3] = 0
    case.y_hat[5] = 0


def nothing_fires(case: Case) -> None:
    case.features[:] = 0
    case.y_hat = oracle.normal(L, D, seed=9).expand_as(case.y)


def far_from_zero(case: Case) -> None:
    case.y, case.y_hat = case.y + 1000, case.y_hat + 1000
    case.logits = {name: logits + 300 * i for i, (name, logits) in enumerate(case.logits.items())}


def low_precision(case: Case) -> None:
    case.y, case.y_hat, case.features = case.y.bfloat16(), case.y_hat.bfloat16(), case.features.bfloat16()
    # A quarter of a unit apart, so that the most likely tokens come in ties.
    case.logits = {name: (4 * logits).round().bfloat16() / 4 for name, logits in case.logits.items()}


def own_predictions(case: Case) -> None:
    case.logits["threshold"] = case.logits["original"]


def harmless_ablation(case: Case) -> None:
    case.logits["zero_ablation"] = case.logits["original"]


CHANGES = [
    lambda case: None,
    constant_offset,
    constant_targets,
    targets_of_zero,
    nothing_fires,
    far_from_zero,
    low_precision,
    own_predictions,
    harmless_ablation,
]

SPLITS = {"at once": [N], "unevenly": [1, 9, 2, 5], "one by one": [1] * N}


def expected(case: Case) -> dict[str, Any]:
    rows = [t.double().numpy() for t in (case.y_hat, case.y, case.features)]
    logits = {name: values.double().numpy() for name, values in case.logits.items()}
    original = logits.pop("original")
    found = {
        name: slow_metrics.divergence(original, values, case.contexts, case.n_rows) for name, values in logits.items()
    }
    own = found["threshold"]
    for name in ("zero_ablation", "mean_ablation"):
        own = own | slow_metrics.against_ablation(found["threshold"], found[name], name)
    return slow_metrics.fit(*rows) | {"replacement": own}


def batches(case: Case, sizes: list[int], shuffled: bool) -> Iterator[Tensor]:
    rows = torch.randperm(N, generator=torch.Generator().manual_seed(1)) if shuffled else torch.arange(N)
    yield from rows[: case.n_rows].split(sizes) if case.n_rows == N else [torch.arange(case.n_rows)]


def measured(case: Case, sizes: list[int], shuffled: bool = False, sparse: bool = False) -> dict[str, Any]:
    firing, reconstruction = Firing(S, F, C), Reconstruction(L, D, C)
    for rows in batches(case, sizes, shuffled):
        context, features = rows // (T - 1), case.features[rows]
        firing.update(sparsify(features) if sparse else features, context)
        reconstruction.update(case.y_hat[rows], case.y[rows], context)
    results = divergences(case, [1, 3] if len(sizes) > 1 else [C])
    fit = Fit(firing, reconstruction)
    sums = {name: result.sums() for name, result in results.items()}
    sums["threshold"] |= fit.sums()
    numbers = by_context.numbers(by_context.totals(sums), "threshold")
    return rule_metrics(fit, results["threshold"], Basis.live, numbers, None)


def divergences(case: Case, sizes: list[int]) -> dict[str, Divergence]:
    tokens = torch.from_numpy(case.contexts).long()
    scored = valid_positions(C, T, case.n_rows)
    has_next = scored & torch.cat([scored[:, 1:], torch.zeros(C, 1, dtype=torch.bool)], dim=1)
    original = case.logits["original"]
    results = {name: Divergence() for name in case.logits if name != "original"}
    for name, result in results.items():
        parts = (original, case.logits[name], scored, tokens.roll(-1, dims=1), has_next)
        for part in zip(*(t.split(sizes) for t in parts), strict=True):
            result.update(*part)
    return results


def assert_equal(found: Any, wanted: Any, path: str = "") -> None:
    if isinstance(wanted, dict):
        for key, value in wanted.items():
            assert_equal(found[key], value, f"{path}.{key}")
    elif isinstance(wanted, list):
        assert len(found) == len(wanted), path
        for i, (one, other) in enumerate(zip(found, wanted, strict=True)):
            assert_equal(one, other, f"{path}[{i}]")
    elif wanted is None or isinstance(wanted, int):
        assert found == wanted, path
    else:
        assert found == pytest.approx(wanted, rel=1e-11, abs=1e-12), path


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__.strip("<>"))
def test_every_number_equals_its_formula(change: Any, split: str) -> None:
    case = Case()
    change(case)
    wanted = expected(case)
    for shuffled in (False, True):
        for sparse in (False, True):
            assert_equal(measured(case, SPLITS[split], shuffled, sparse), wanted)


@pytest.mark.parametrize("n_rows", [1, 2, 5, 6])
def test_so_do_those_of_very_few_tokens(n_rows: int) -> None:
    """One token has no variance and no next token; five fill the first context."""
    case = Case(n_rows)
    found = measured(case, [n_rows])
    assert_equal(found, expected(case))
    assert (found["fvu"]["pooled"] is None) == (n_rows == 1)
    assert (found["replacement"]["delta_ce"] is None) == (n_rows == 1)


def test_how_the_tokens_are_batched_moves_no_number_by_more_than_rounding() -> None:
    def numbers(tree: Any) -> list[float]:
        if isinstance(tree, dict | list):
            return [x for value in (tree.values() if isinstance(tree, dict) else tree) for x in numbers(value)]
        return [] if isinstance(tree, str | None) else [tree]

    case = Case()
    at_once = numbers(measured(case, [N]))
    for sizes, shuffled in (([3, 14], False), ([1] * N, True)):
        assert numbers(measured(case, sizes, shuffled)) == pytest.approx(at_once, rel=1e-12, abs=1e-14)


def test_fvu_is_the_centred_error_and_the_bias_together() -> None:
    case = Case()
    case.y_hat = case.y_hat + 0.2
    found = measured(case, [N])
    for key in range(L):
        fvu, centred, bias = (found[name]["per_layer"][key] for name in ("fvu", "explained_variance_centred", "bias"))
        assert fvu == pytest.approx(1 - centred + bias, rel=1e-12)
    assert found["bias"]["pooled"] > 0


def test_sums_of_contexts_are_those_of_their_own_tokens() -> None:
    case = Case()
    results = divergences(case, [C])
    reconstruction, firing = Reconstruction(L, D, C), Firing(S, F, C)
    for rows in batches(case, [4, 13], shuffled=True):
        firing.update(case.features[rows], rows // (T - 1))
        reconstruction.update(case.y_hat[rows], case.y[rows], rows // (T - 1))
    sums = results["threshold"].sums() | Fit(firing, reconstruction).sums()
    rows = torch.arange(N)
    mean = case.y.mean(dim=0)
    for c in range(C):
        own = rows[rows // (T - 1) == c]
        assert sums["n_tokens"][c] == len(own)
        assert sums["l0_sum"][c].tolist() == (case.features[own] > 0).sum(dim=(0, 2)).tolist()
        error, variance = (case.y_hat - case.y)[own].square(), (case.y - mean)[own].square()
        assert sums["error"][c].tolist() == pytest.approx(error.sum(dim=(0, 2)).tolist(), rel=1e-12)
        assert sums["variance"][c].tolist() == pytest.approx(variance.sum(dim=(0, 2)).tolist(), rel=1e-12)
        kl = [
            oracle.kl(case.logits["original"][c, t].tolist(), case.logits["threshold"][c, t].tolist())
            for t in (1 + own % (T - 1)).tolist()
        ]
        assert float(sums["kl_sum"][c]) == pytest.approx(sum(kl), rel=1e-12)
    assert sums["n_next"].tolist() == [4, 4, 4, 1], "the last row of a context has no next"


class Letters:
    """A tokenizer of one letter a token."""

    def decode(self, tokens: list[int]) -> str:
        return "".join("abcdefghi"[token] for token in tokens)


def test_the_worst_contexts_come_first_with_their_text_and_no_padding() -> None:
    case = Case()
    result = divergences(case, [C])["zero_ablation"]
    found = worst_contexts(result, case.contexts, Letters(), n=3)  # type: ignore[arg-type]
    kl, scored = result.per_token()
    mean = {c: float(kl[c][scored[c]].mean()) for c in range(C)}
    assert [context["context"] for context in found] == sorted(mean, key=lambda c: -mean[c])[:3]
    every = {context["context"]: context for context in worst_contexts(result, case.contexts, Letters())}  # type: ignore[arg-type]
    assert len(every) == C
    for c, context in every.items():
        length = T if c < C - 1 else 3
        assert context["kl"] == pytest.approx(mean[c], rel=1e-12)
        assert context["tokens"] == ["abcdefghi"[token] for token in case.contexts[c][:length]]
        assert context["kl_per_token"] == [None, *kl[c, 1:length].tolist()]


def test_every_feature_is_in_one_bin_of_its_decoder_norm() -> None:
    norms = torch.tensor([[0.0, 1e-9, 1.0, 1.1, 1e7], [0.5, 0.5, 0.0, 0.0, 2.0]])
    found = decoder_norm_histogram(norms)
    edges = found["log10_edges"]
    assert (edges[0], edges[-1], edges[1] - edges[0]) == (-6, 4, 0.125)
    assert found["zero"] == [1, 2]
    counts = [{edges[i]: n for i, n in enumerate(layer) if n} for layer in found["per_layer"]]
    assert counts == [{-6: 1, 0: 2, 3.875: 1}, {-0.375: 2, 0.25: 1}], "beyond the edges: the first and the last bin"


def test_thresholds_are_counted_from_zero_to_the_largest_and_relu_has_none() -> None:
    found = threshold_histogram(torch.tensor([[0.0, 0.5, 1.0], [0.99, 1.0, 1.0]]))
    assert found is not None
    assert (found["edges"][0], found["edges"][-1]) == (0, 1)
    assert [{i: n for i, n in enumerate(layer) if n} for layer in found["per_layer"]] == [{0: 1, 25: 1, 49: 1}, {49: 3}]
    assert threshold_histogram(torch.zeros(2, 3)) is None


def test_what_has_no_value_is_null_in_the_file() -> None:
    tree = as_plain({"a": torch.tensor([1.0, torch.nan]), "b": {"c": torch.tensor(torch.nan)}, "d": None, "e": "x"})
    assert tree == {"a": [1.0, None], "b": {"c": None}, "d": None, "e": "x"}
