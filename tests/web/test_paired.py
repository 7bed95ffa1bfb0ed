"""Differences between runs: on the same contexts, with the interval of the difference itself."""

from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.core import bootstrap
from pipeline.interp import contexts
from pipeline.web import report
from tests.web.made import make_run, measured
from tests.web.reading import Page

C, L = 40, 3


def evaluated(directory: Path, scale: float, lr: float, context: np.ndarray | None = None, basis: str = "live") -> Path:
    """A run whose error in each context is `scale` times that of another; hard contexts are hard for both."""
    make_run(directory, {"optim": {"lr": lr}}, measured(scale, basis))
    draw = np.random.default_rng(0)
    hard, own = draw.lognormal(0, 2, C), np.random.default_rng(int(100 * scale)).lognormal(0, 0.05, C)
    sums = {
        "n_tokens": torch.full((C,), 23.0, dtype=torch.float64),
        "n_next": torch.full((C,), 22.0, dtype=torch.float64),
        "kl_sum": torch.tensor(scale * hard * own),
    }
    hashes = np.arange(C, dtype=np.uint64) if context is None else context
    arrays = {f"threshold/{name}": values.numpy() for name, values in sums.items() if not name.startswith("n_")}
    shared = {name: sums[name].numpy() for name in ("n_tokens", "n_next")}
    np.savez(directory / "eval" / contexts.NAME, context_hash=hashes, **arrays, **shared)
    return directory


@pytest.fixture
def numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """KL alone, of what this file's contexts hold."""

    def kl(sums: dict[str, dict[str, torch.Tensor]], rule: str) -> contexts.Tree:
        own = sums[rule]
        return {"replacement": {"kl": own["kl_sum"] / own["n_tokens"]}}

    monkeypatch.setattr(contexts, "numbers", kl)


@pytest.mark.usefixtures("numbers")
def test_a_difference_that_single_intervals_would_hide_is_seen(tmp_path: Path) -> None:
    runs = [evaluated(tmp_path / "good", 1.0, 0.1), evaluated(tmp_path / "bad", 1.1, 0.2)]
    page = Page(report.build(runs, tmp_path / "report.html").read_text())
    assert "Differences from good" in page.text
    [_, row] = next(table for table in page.tables if [head[0] for head in table[0]] == ["run", "KL"])
    assert row[0][0] == "bad"
    value = row[1][1]
    assert value is not None
    low, high = map(float, row[1][0].split("[")[1].strip("]").split(", "))
    assert 0 < low < value < high
    sums = np.load(runs[0] / "eval" / contexts.NAME)
    alone = bootstrap.ratio_interval(torch.tensor(sums["threshold/kl_sum"]), torch.tensor(sums["n_tokens"]))
    assert alone is not None
    assert high - low < (alone[1] - alone[0]) / 5
    [best] = page.table("L0")[1:]
    assert "more than the choice of contexts explains (one seed)" in best[1][0]


@pytest.mark.usefixtures("numbers")
def test_the_baseline_can_be_chosen(tmp_path: Path) -> None:
    runs = [evaluated(tmp_path / "good", 1.0, 0.1), evaluated(tmp_path / "bad", 1.5, 0.2)]
    page = Page(report.build(runs, tmp_path / "report.html", baseline=runs[1]).read_text())
    [_, row] = next(table for table in page.tables if [head[0] for head in table[0]] == ["run", "KL"])
    assert row[0][0] == "good"
    assert row[1][1] is not None
    assert row[1][1] < 0
    assert row[1][0].startswith("−")


@pytest.mark.usefixtures("numbers")
def test_runs_on_other_contexts_or_of_another_kind_have_no_difference(tmp_path: Path) -> None:
    runs = [
        evaluated(tmp_path / "good", 1.0, 0.1),
        evaluated(tmp_path / "elsewhere", 1.2, 0.2, context=np.arange(1, C + 1, dtype=np.uint64)),
        evaluated(tmp_path / "alone", 1.2, 0.3, basis="teacher_forced"),
        make_run(tmp_path / "before", {"optim": {"lr": 0.4}}, measured(2.0)),
    ]
    text = Page(report.build(runs, tmp_path / "report.html").read_text()).text
    assert "No difference for elsewhere: measured on other contexts than good." in text
    assert "No difference for alone: the two have no number that can be compared." in text
    assert "No difference for before: before has no contexts.npz; run clt eval." in text


@pytest.mark.usefixtures("numbers")
def test_without_resamples_no_difference_is_drawn(tmp_path: Path) -> None:
    runs = [evaluated(tmp_path / "good", 1.0, 0.1), evaluated(tmp_path / "bad", 1.5, 0.2)]
    page = Page(report.build(runs, tmp_path / "report.html", resamples=0).read_text())
    assert "paired" not in page.ids
    assert "one seed, no interval" in page.text


@pytest.mark.usefixtures("numbers")
def test_a_recipe_with_seeds_and_one_without_are_compared_by_their_first_runs(tmp_path: Path) -> None:
    runs = [evaluated(tmp_path / "good-0", 1.0, 0.1), evaluated(tmp_path / "bad-0", 1.1, 0.2)]
    runs.append(make_run(tmp_path / "good-1", {"optim": {"lr": 0.1}, "train": {"seed": 1}}, measured(1.01)))
    [best] = Page(report.build(runs, tmp_path / "report.html").read_text()).table("L0")[1:]
    assert best[1][0].startswith("good 0.0314")
    assert best[1][0].endswith("more than the choice of contexts explains (first seeds)")
