"""`clt eval`: what it reads of the cache, how much of it at a time, and parts of the held-out text."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.config import compose
from pipeline.data.cache import Cache
from pipeline.data.layout import prefix
from pipeline.data.tokens import Split
from pipeline.interp import contexts
from pipeline.stages import evaluate

WORDS = ["run=runs/batchtopk", "eval.curves=false", "eval.faithfulness=false", "eval.bootstrap=0"]
OTHER = ["dataset=text", "dataset.context=24", "eval.documents=all", "eval.batch_tokens=72"]


def measured(*words: str) -> dict[str, Any]:
    return dict(json.loads(evaluate.run(compose("eval", [*WORDS, *words])).read_text()))


def made(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many stored rows become floats at a time: those of either site."""
    sizes: list[int] = []
    to_float = Tensor.float

    def noted(values: Tensor) -> Tensor:
        if values.dtype == torch.bfloat16:
            sizes.append(len(values))
        return to_float(values)

    monkeypatch.setattr(Tensor, "float", noted)
    return sizes


def test_rows_are_floats_a_batch_at_a_time(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """460 rows under two rules, 128 at a time, as they were trained on."""
    sizes = made(monkeypatch)
    assert measured()["n_tokens"] == 460
    assert sizes == 2 * [128, 128, 128, 128, 128, 128, 76, 76]


def test_only_the_contexts_asked_for_are_read(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever else the cache holds."""
    asked: list[int | None] = []
    chunks: set[str] = set()
    held_out_rows, read_chunk = Cache.held_out_rows, Cache.read_chunk

    def rows(cache: Cache, split: Split, n: int | None = None) -> tuple[Tensor, Tensor]:
        asked.append(n)
        return held_out_rows(cache, split, n)

    def chunk(cache: Cache, name: str, *rest: Any) -> Any:
        chunks.add(name)
        return read_chunk(cache, name, *rest)

    monkeypatch.setattr(Cache, "held_out_rows", rows)
    monkeypatch.setattr(Cache, "read_chunk", chunk)
    sizes = made(monkeypatch)
    assert measured("eval.n_contexts=3")["n_tokens"] == 69
    assert asked == [69]
    assert sizes == 4 * [69]
    own = prefix(Split.evaluation)
    assert {name for name in chunks if not name.startswith(("norm/", "stats/"))} == {
        own + name for name in ("tokens", "resid_mid", "mlp_out")
    }


@pytest.mark.parametrize("other", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_some_contexts_give_what_they_give_in_the_whole(finished: Path, english: Path, other: bool) -> None:
    words = [*OTHER, f"dataset.path={english}", "dataset.n_tokens=1k"] if other else []
    suffix = "-text" if other else ""
    whole = measured(*words)
    all_sums = contexts.read(Path(f"runs/batchtopk/eval/contexts{suffix}.npz"))
    some = measured(*words, "eval.n_contexts=5")
    few = contexts.read(Path(f"runs/batchtopk/eval/contexts{suffix}.npz"))
    assert (some["n_contexts"], some["n_tokens"]) == (5, 115)
    assert whole["n_tokens"] > 400
    assert few.context_hash.tolist() == all_sums.context_hash[:5].tolist()
    for name in ("error", "l0_sum", "kl_sum", "ce_replaced_sum"):
        torch.testing.assert_close(
            few.sums["threshold"][name], all_sums.sums["threshold"][name][:5], rtol=1e-5, atol=1e-7
        )
