"""What is stored wrongly is found before the cache is called finished."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.config import compose
from pipeline.data import models
from pipeline.data.models import LanguageModel
from pipeline.data.plan import Plan
from pipeline.data.shuffle import Permutation
from pipeline.data.tokens import Split
from pipeline.errors import UserError
from pipeline.stages import extract
from pipeline.stages.options import ExtractConfig


@pytest.fixture
def cfg(tiny_gpt2: Path, english: Path, tmp_path: Path) -> ExtractConfig:
    words = ["model=local", f"model.path={tiny_gpt2}", "model.device=cpu", "dataset=text", f"dataset.path={english}"]
    words += ["dataset.n_tokens=3000", "dataset.context=19", "dataset.held_out=3", "cache.shard_mb=0.1"]
    asked = compose("extract", [*words, f"cache.dir={tmp_path / 'cache'}"])
    assert isinstance(asked, ExtractConfig)
    return asked


def rows_of(plan: Plan, name: str) -> np.ndarray:
    """The first shard of an array, to write to."""
    spec = plan.specs[name]
    return np.memmap(spec.file(plan.path, name, 0), "<u2", "r+", shape=spec.chunk_shape)


def nudge(plan: Plan) -> None:
    """One layer of one context, by a tenth."""
    row = Permutation(plan.packed[Split.train].n_rows, plan.about["seed"]).forward(np.arange(18))
    inside = row[row < plan.specs["mlp_out"].chunk_rows]
    rows = rows_of(plan, "mlp_out")
    values = torch.from_numpy(rows[inside][:, 2].copy()).view(torch.bfloat16)
    rows[inside, 2] = (values * 1.1).view(torch.uint16).numpy()


def swap(plan: Plan) -> None:
    rows = rows_of(plan, "resid_mid")
    rows[:] = rows[::-1].copy()


def zero(plan: Plan) -> None:
    rows_of(plan, "evaluation/mlp_out")[:] = 0


def poison(plan: Plan) -> None:
    rows_of(plan, "evaluation/resid_mid")[0] = 0x7FC0  # NaN


@pytest.mark.parametrize(
    ("spoil", "where"),
    [(nudge, "mlp_out of layer 2"), (swap, "resid_mid of layer"), (zero, "mlp_out of layer"), (poison, "resid_mid of")],
)
def test_rows_that_are_not_what_the_model_computes_are_refused(
    cfg: ExtractConfig, monkeypatch: pytest.MonkeyPatch, spoil: Callable[[Plan], None], where: str
) -> None:
    check = extract.spot_check

    def spoilt(model: LanguageModel, plan: Plan) -> object:
        spoil(plan)
        return check(model, plan)

    monkeypatch.setattr(extract, "spot_check", spoilt)
    with pytest.raises(UserError, match=rf"{where}.*computed again, differs by .* the cache was not finished. Remove"):
        extract.run(cfg)
    assert not list(Path(cfg.cache.dir).glob("*/zarr.json"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rounding_alone_is_far_within_the_tolerance(
    cfg: ExtractConfig, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    found = []
    check = extract.spot_check
    monkeypatch.setattr(extract, "spot_check", lambda model, plan: found.append(check(model, plan)) or found[0])
    cfg.model.dtype = models.resolve_dtype.__annotations__["dtype"](dtype)
    extract.run(cfg)
    (result,) = found
    assert result.n_rows == 18 + 18 + (3000 - 166 * 18) + 18  # the last training context is not full
    limit = 2**-9 if dtype == "float32" else 2**-6
    assert max(result.resid_mid, result.mlp_out) < limit
    assert 0 < result.mlp_in < 2 * limit
    assert 0 <= result.kl < 1e-4


def test_layers_are_named_as_the_base_model_counts_them(cfg: ExtractConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg.model.layers = [1, 3]
    check = extract.spot_check

    def spoilt(model: LanguageModel, plan: Plan) -> object:
        rows_of(plan, "evaluation/mlp_out")[:, 1] = 0
        return check(model, plan)

    monkeypatch.setattr(extract, "spot_check", spoilt)
    with pytest.raises(UserError, match="mlp_out of layer 2, computed again, differs by 1 of its norm"):
        extract.run(cfg)
