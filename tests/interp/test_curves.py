"""Curves of transcoders that are not live ones. The live ones: test_replacement_of_families.py."""

from pathlib import Path
from typing import Any

import pytest

from pipeline.arch.options import Site
from pipeline.data import models
from pipeline.data.models import LanguageModel
from pipeline.data.options import ModelOptions
from pipeline.errors import UserError
from pipeline.interp import curves
from pipeline.interp.evaluation import divergences
from pipeline.interp.replacement import replacement
from tests.interp.test_replacement import L, random, tokens


@pytest.fixture(scope="module")
def lm(tiny_gpt2: Path) -> LanguageModel:
    return models.load(ModelOptions(name="local", path=str(tiny_gpt2), device="cpu"))


def measured(lm: LanguageModel, name: str, **options: Any) -> tuple[dict[str, Any], dict[str, float]]:
    """The curves, and the numbers of all layers replaced as `clt eval` does it."""
    model = random(name, 0.2, **options)
    contexts, n_rows = tokens().numpy(), 4 * 8
    whole = divergences(lm, {"all": replacement(lm, model).logits}, contexts, n_rows, batch_tokens=18)["all"]
    found = curves.measure(lm, model, contexts, n_rows, batch_tokens=18, n_contexts=99)
    assert (found["n_tokens"], found["n_contexts"]) == (n_rows, 4)
    return found, {"kl": whole.kl, "top1": whole.top1, "delta_ce": whole.delta_ce}


def test_a_crosscoder_has_teacher_forced_curves_alone(lm: LanguageModel) -> None:
    found, whole = measured(lm, "crosscoder")
    assert found["live"] is None
    forced = found["teacher_forced"]
    assert {which: len(points) for which, points in forced.items()} == {"only": L, "up_to": L, "from": L}
    assert forced["from"][0] == forced["up_to"][-1] == pytest.approx(whole, rel=1e-5)
    assert forced["only"][0] == forced["up_to"][0]
    assert forced["only"][-1] == forced["from"][-1]
    assert forced["only"][0]["kl"] != forced["only"][1]["kl"]


def test_an_sae_of_the_output_has_both(lm: LanguageModel) -> None:
    found, whole = measured(lm, "sae", site=Site.mlp_out)
    assert found["live"]["from"][0] == pytest.approx(whole, rel=1e-5)
    assert found["live"]["only"] == found["teacher_forced"]["only"]
    assert found["live"]["from"][0]["kl"] != found["teacher_forced"]["from"][0]["kl"]


def test_what_replaces_nothing_has_no_curves(lm: LanguageModel) -> None:
    with pytest.raises(UserError, match="arch=sae reconstructs mlp_in"):
        measured(lm, "sae")


@pytest.mark.parametrize("n_layers", [1, 2, 5])
def test_equal_replacements_are_measured_once(n_layers: int) -> None:
    plans = [curves.plan(n_layers, forced) for forced in (False, True)]
    keys = {key for plan in plans for points in plan.values() for key in points}
    assert len(keys) == max(1, 5 * n_layers - 6)
