"""`clt weights` on a small run."""

import csv
import logging
from pathlib import Path

import pytest
import torch
from pyarrow import parquet  # type: ignore[import-untyped]

import pipeline
from pipeline.config import Request, compose, launch
from pipeline.data import caches
from pipeline.data.tokens import Split
from pipeline.errors import UserError
from pipeline.interp.circuits import global_weights
from pipeline.interp.edits import Sides
from pipeline.stages import weights
from pipeline.train import artifact

FEATURE = (1, 4)


def expected(count: bool) -> global_weights.Strongest:
    model = pipeline.replace("runs/batchtopk", device="cpu")
    config = artifact.read("runs/batchtopk").config["cache"]
    cache = caches.with_key(Path("cache"), config["key"], config["request"])
    contexts, resid_mid, _ = cache.held_out(Split.evaluation)
    gates = global_weights.typical(model.lm, torch.from_numpy(contexts[:8]).long())
    x = Sides(model.lm, model.transcoder).norm(resid_mid.float())
    together = global_weights.count(model.transcoder, [x], *FEATURE) if count else None
    return global_weights.strongest(model, gates, *FEATURE, n=3, together=together)


@pytest.mark.parametrize("count", [True, False])
def test_the_strongest_weights_are_shown_and_written(
    finished: Path, count: bool, caplog: pytest.LogCaptureFixture
) -> None:
    words = ("run=batchtopk", "feature=1/4", "weights.n=3", f"weights.count={str(count).lower()}")
    with caplog.at_level(logging.INFO, "pipeline"):
        for file in ("out/w.csv", "out/w.parquet"):
            assert launch("weights", Request(overrides=(*words, f"to={file}"))) == 0
    found = expected(count)
    rows = parquet.read_table("out/w.parquet").to_pylist()
    assert [row["direction"] for row in rows] == ["input"] * len(found.inputs) + ["output"] * len(found.outputs)
    for row, own in zip(rows, [*found.inputs, *found.outputs], strict=True):
        assert (row["path"], row["layer"], row["feature"], row["tokens"]) == (own[0], own[1], own[2], own.tokens)
        assert row["weight"] == pytest.approx(own.weight, rel=1e-4, abs=1e-7)
        assert row["twera"] == (None if own.twera is None else pytest.approx(own.twera, rel=1e-4, abs=1e-9))
    table = list(csv.DictReader(Path("out/w.csv").read_text().splitlines()))
    assert [row["path"] for row in table] == [row["path"] for row in rows]
    lines = [record.getMessage() for record in caplog.records]
    assert any(line.startswith("feature 1/4") for line in lines)
    first = found.inputs[0]
    assert any(line.startswith(f"{first.layer}/{first.feature}") and "residual" in line for line in lines)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run=batchtopk"], "no feature is named; add feature=LAYER/INDEX"),
        (["run=batchtopk", "feature=17"], "feature=17 names no feature; write LAYER/INDEX"),
        (["run=batchtopk", "feature=1/99"], "no feature 1/99; layers are 0 to 2, features 0 to 32"),
        (["run=batchtopk", "feature=1/4", "to=w.xlsx"], r"ends neither in \.csv nor in \.parquet"),
        (["run=batchtopk", "feature=1/4", "weights.n=0"], r"weights\.n=0 must be 1 or more"),
    ],
)
def test_what_cannot_be_is_refused(finished: Path, words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        weights.run(compose("weights", words))
