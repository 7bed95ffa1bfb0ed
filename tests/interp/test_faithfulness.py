"""What `faithfulness` of metrics.json holds, by what the transcoder allows."""

from pathlib import Path

import pytest
import torch

from pipeline.arch.base import Transcoder
from pipeline.arch.options import Site
from pipeline.data import models
from pipeline.data.models import LanguageModel
from pipeline.data.options import ModelOptions
from pipeline.interp import decoder_mass, faithfulness
from pipeline.interp.edits import Sides
from pipeline.interp.faithfulness import Measured
from pipeline.interp.replacement import NOTES, Basis
from tests.interp.test_interventions import text
from tests.interp.test_replacement import random


@pytest.fixture(scope="module")
def lm(tiny_gpt2: Path) -> LanguageModel:
    return models.load(ModelOptions(name="local", path=str(tiny_gpt2)))


def measured(lm: LanguageModel, model: Transcoder, resamples: int = 0) -> Measured:
    contexts, scored = text()
    x = Sides(lm, model).state(torch.from_numpy(contexts).long()).x[scored]
    return faithfulness.measure(lm, model, contexts, lambda rows: x[rows], scored, 30, resamples)


@pytest.mark.slow
def test_a_clt_has_both_and_intervals_where_they_are_asked_for(lm: LanguageModel) -> None:
    model = random("clt", 0.3)
    plain, drawn = measured(lm, model), measured(lm, model, resamples=50)
    assert plain.ci95 == {}
    assert plain.values == drawn.values
    assert plain.values["interventions"]["basis"] == "live"
    own, (low, high) = plain.values["decoder_mass"]["written"]["own"], drawn.ci95["decoder_mass"]["written"]["own"]
    assert 0 < low < own < high < 1
    assert set(drawn.ci95["interventions"]["mediated"]) == {"cosine", "slope", "r2", "shuffled"}


def test_rows_belong_to_their_contexts(lm: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last context has four rows only."""
    seen: list[list[int]] = []

    def by_context(model: Transcoder, x: torch.Tensor, context: torch.Tensor, *rest: int) -> torch.Tensor:
        seen.append(context.tolist())
        return torch.ones(6, 3, 3)

    monkeypatch.setattr(decoder_mass, "by_context", by_context)
    measured(lm, random("clt", 0.3))
    assert seen == [[c for c in range(6) for _ in range(11 if c < 5 else 4)]]


def test_an_sae_of_the_output_is_labelled(lm: LanguageModel) -> None:
    found = measured(lm, random("sae", 0.3, site=Site.mlp_out)).values
    assert found["decoder_mass"]["written"]["own"] == 1
    assert found["interventions"]["note"] == NOTES[Basis.runs_the_mlp]


@pytest.mark.parametrize(("name", "why"), [("crosscoder", "reads all layers at once"), ("sae", "reconstructs mlp_in")])
def test_what_cannot_run_live_says_why(lm: LanguageModel, name: str, why: str) -> None:
    found = measured(lm, random(name, 0.3), resamples=20)
    assert found.values["interventions"] is None
    assert why in found.values["no_interventions"]
    assert "interventions" not in found.ci95
    if name == "crosscoder":
        mass = found.values["decoder_mass"]
        assert (mass["written"], mass["decoders"]) == (None, None)
        assert "no feature has a layer of its own" in mass["no_matrix"]
