"""eval/contexts.npz: what is written is read, and two runs are compared on the contexts that they share."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.core.bootstrap import paired_interval, ratio_interval
from pipeline.errors import UserError
from pipeline.interp import contexts
from pipeline.interp.contexts import Contexts
from tests import oracle

C, T, L, S = 6, 5, 3, 2
FIT = ("error", "error_centred", "variance", "cosine_sum", "cosine_n", "norm_y_hat", "norm_y")
PREDICTED = ("kl", "top1", "top5", "ce_original", "ce_replaced")


def some_sums(seed: int, n_sources: int = S, replaced: bool = True) -> dict[str, dict[str, Tensor]]:
    def positive(*shape: int, more: int = 0) -> Tensor:
        return oracle.normal(*shape, seed=100 * seed + more).abs() + 0.1

    def predicted(more: int) -> dict[str, Tensor]:
        shared = {"n_tokens": torch.tensor([4.0] * 5 + [2.0], dtype=torch.float64)}
        shared["n_next"] = shared["n_tokens"] - 1
        positions = {"kl_position": positive(C, T - 1, more=more), "n_position": torch.ones(C, T - 1).double()}
        return shared | positions | {f"{name}_sum": positive(C, more=more + i) for i, name in enumerate(PREDICTED)}

    own = predicted(0) if replaced else {name: predicted(0)[name] for name in ("n_tokens",)}
    own |= {name: positive(C, L, more=20 + i) for i, name in enumerate(FIT)}
    own["l0_sum"] = positive(C, n_sources, more=40)
    ablated = {"zero_ablation": predicted(60), "mean_ablation": predicted(80)}
    for sums in ablated.values():
        sums["ce_replaced_sum"] += 10  # an ablation does harm
    return {"threshold": own, **ablated}


HASHES = np.arange(10, 10 + C, dtype=np.uint64)


def same(found: dict[str, dict[str, Tensor]], wanted: dict[str, dict[str, Tensor]]) -> bool:
    return found.keys() == wanted.keys() and all(
        own.keys() == wanted[rule].keys() and all(torch.equal(own[name], wanted[rule][name]) for name in own)
        for rule, own in found.items()
    )


def test_what_is_written_is_read(tmp_path: Path) -> None:
    sums = some_sums(1)
    contexts.write(tmp_path / "contexts.npz", Contexts(HASHES, sums))
    found = contexts.read(tmp_path / "contexts.npz")
    assert found.context_hash.tolist() == HASHES.tolist()
    assert same(found.sums, sums)
    with np.load(tmp_path / "contexts.npz", allow_pickle=False) as arrays:
        names = set(arrays.files)
    assert {
        "n_tokens",
        "n_next",
        "context_hash",
        "threshold/kl_sum",
        "threshold/error",
        "mean_ablation/kl_sum",
    } <= names


def test_a_run_measured_before_there_was_such_a_file_is_named_with_the_command_that_makes_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"measure the run again with clt eval run=.*old"):
        contexts.read(tmp_path / "old" / "eval" / "contexts.npz")


def test_a_hash_is_of_the_text_alone() -> None:
    tokens = np.array([[0, 5, 6, 7], [0, 5, 6, 7], [0, 5, 6, 8], [0, 5, 6, 7]], dtype=np.int32)
    one, again, other, shorter = contexts.hashes(tokens, np.array([3, 3, 3, 2])).tolist()
    assert one == again
    assert len({one, other, shorter}) == 3
    padded = contexts.hashes(np.array([[0, 5, 6, 0]], dtype=np.int32), np.array([2])).tolist()
    assert padded == [shorter], "padding is no text"


def test_numbers_of_a_file_are_the_ratios_of_its_sums() -> None:
    sums = some_sums(1)
    found = contexts.numbers(contexts.totals(sums), "threshold")
    own, zero = sums["threshold"], sums["zero_ablation"]
    assert float(found["fvu"]["pooled"]) == pytest.approx(float(own["error"].sum() / own["variance"].sum()))
    assert float(found["l0"]["total"]) == pytest.approx(float(own["l0_sum"].sum()) / 22)
    recovered = 1 - float(own["kl_sum"].sum() / zero["kl_sum"].sum())
    assert float(found["replacement"]["kl_recovered_zero_ablation"]) == pytest.approx(recovered)
    assert contexts.numbers(contexts.totals(some_sums(1, replaced=False)), "threshold")["replacement"] is None


def test_intervals_stand_where_the_numbers_stand() -> None:
    sums = some_sums(1)
    numbers = contexts.numbers(contexts.totals(sums), "threshold")
    found = contexts.intervals(contexts.numbers(contexts.resample(sums, 2000), "threshold"))

    def check(number: Any, ends: Any) -> int:
        if isinstance(number, dict):
            assert number.keys() == ends.keys()
            return sum(check(value, ends[key]) for key, value in number.items())
        if number.ndim:
            assert len(number) == len(ends)
            return sum(check(value, ends[i]) for i, value in enumerate(number))
        assert ends[0] <= float(number) <= ends[1]
        return 1

    assert check(numbers, found) > 40
    own = sums["threshold"]
    assert found["replacement"]["kl"] == pytest.approx(ratio_interval(own["kl_sum"], own["n_tokens"]), rel=1e-12)
    ends = ratio_interval(own["error"].sum(dim=1), own["variance"].sum(dim=1))
    assert tuple(found["fvu"]["pooled"]) == pytest.approx(ends, rel=1e-12)


def test_runs_are_compared_on_the_contexts_that_both_have_whatever_their_order() -> None:
    first, second = some_sums(1), some_sums(2)
    mixed = [5, 2, 0, 3, 1]  # and without context 4
    other = {rule: {name: values[mixed] for name, values in own.items()} for rule, own in second.items()}
    found = contexts.paired(Contexts(HASHES, first), Contexts(HASHES[mixed], other))
    assert found["n_contexts"] == 5
    kept = [0, 1, 2, 3, 5]
    sides = [(own["threshold"]["kl_sum"][kept], own["threshold"]["n_tokens"][kept]) for own in (first, second)]
    difference = float(sides[1][0].sum() / sides[1][1].sum() - sides[0][0].sum() / sides[0][1].sum())
    assert found["difference"]["replacement"]["kl"] == pytest.approx(difference, rel=1e-12)
    assert found["ci95"]["replacement"]["kl"] == pytest.approx(paired_interval(*sides), rel=1e-9)


def test_a_run_compared_with_itself_differs_by_nothing() -> None:
    run = Contexts(HASHES, some_sums(1))
    found = contexts.paired(run, run)
    assert found["difference"]["fvu"] == {"pooled": 0, "per_layer": [0] * L}
    assert found["ci95"]["fvu"]["pooled"] == [0, 0]


def test_what_one_of_two_runs_does_not_have_is_left_out() -> None:
    crosscoder = Contexts(HASHES, some_sums(2, n_sources=1, replaced=False))
    found = contexts.paired(Contexts(HASHES, some_sums(1)), crosscoder)
    for tree in (found["difference"], found["ci95"]):
        assert "replacement" not in tree
        assert tree["l0"].keys() == {"total"}
        assert "per_layer" in tree["fvu"]


def test_a_context_that_occurs_twice_is_paired_as_often_as_the_other_has_it() -> None:
    here = np.array([7, 7, 8, 9], dtype=np.uint64)
    there = np.array([9, 7, 8, 8], dtype=np.uint64)
    first, second = contexts._shared(here, there)
    assert list(zip(first.tolist(), second.tolist(), strict=True)) == [(0, 1), (2, 2), (3, 0)]


def test_runs_that_share_no_text_cannot_be_compared() -> None:
    first, second = (Contexts(HASHES + np.uint64(shift), some_sums(1)) for shift in (0, 5))
    with pytest.raises(UserError, match="share 1 contexts"):
        contexts.paired(first, second)
    with pytest.raises(UserError, match="under the rule exact"):
        contexts.paired(first, first, "exact")
