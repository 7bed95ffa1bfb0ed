"""Features take the values of another place, and continuations under edits."""

from pathlib import Path

import pytest
import torch

from pipeline.arch.options import Site
from pipeline.data import models
from pipeline.data.options import ModelOptions
from pipeline.errors import UserError
from pipeline.interp.generation import edited_steps, original_steps, under
from pipeline.interp.naming import Place
from pipeline.interp.replacement import ReplacementModel
from pipeline.interp.steering.feature_edits import Edit, Where, where
from pipeline.interp.steering.intervene import intervene
from pipeline.interp.steering.intervene_options import InterveneOptions, Model, Response, SwapOptions
from pipeline.interp.steering.swaps import swap
from tests.interp.test_intervene import MODELS, transcoder


@pytest.fixture(scope="module", params=["clt", "skip"])
def model(tiny_gpt2: Path, request: pytest.FixtureRequest) -> ReplacementModel:
    lm = models.load(ModelOptions(name="tiny", path=str(tiny_gpt2), device="cpu"))
    found = ReplacementModel(lm, transcoder(request.param, 0.4), Site.mlp_in)
    found.bos_token_id = 1
    return found


def dense(model: ReplacementModel, prompt: str, how: InterveneOptions) -> torch.Tensor:
    """[T, L, F] of a run of its own."""
    if how.model == Model.original:
        live = model.at_original(model.original(model.tokens(prompt)))
        made = [torch.zeros(p.n_tokens, 13).index_put((p.tokens, p.indices), v) for p, v in live.features]
        return torch.stack(made, dim=1)
    return model.run(prompt).dense()[0]


@pytest.mark.parametrize("how", [InterveneOptions(), InterveneOptions(model=Model.replacement, keep_error=False)])
def test_swapped_features_have_the_values_of_the_other_place(model: ReplacementModel, how: InterveneOptions) -> None:
    groups = {"some": [Place(0, 2), Place(2, 7, 1)]}
    here, there = dense(model, "abcde", how), dense(model, "fghijk", how)
    options = SwapOptions(features="all", from_prompt="fghijk", at="-2", from_at="3")
    edits = swap(model, "abcde", options, how)
    active = ((here[4] > 0) | (there[3] > 0)).nonzero().tolist()
    assert [[edit.layer, edit.feature] for edit in edits] == active
    assert {(edit.where, edit.scale) for edit in edits} == {(Where((4,)), 0.0)}
    expected = [float(there[3, layer, i]) for layer, i in active]
    assert [edit.add for edit in edits] == pytest.approx(expected, rel=1e-4)
    assert 0 in expected
    chosen = swap(model, "abcde", SwapOptions(features="some,1/5", from_prompt="fghijk", at="4"), how, groups)
    assert [(edit.layer, edit.feature) for edit in chosen] == [(0, 2), (2, 7), (1, 5)]
    expected = [float(there[4, edit.layer, edit.feature]) for edit in chosen]
    assert [edit.add for edit in chosen] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (SwapOptions(features="all"), r"the same place; add swap.from_prompt"),
        (SwapOptions(from_prompt="abc"), r"add swap.features=all"),
        (SwapOptions(features="all", from_prompt="ab", at="5"), r"@5: the prompt has 3 tokens"),
        (SwapOptions(features="all", at="0", from_at="2"), r"position 0 has no features"),
        (SwapOptions(features="say Paris", from_at="2"), r"names no feature"),
    ],
)
def test_a_swap_that_means_nothing_is_refused(model: ReplacementModel, options: SwapOptions, says: str) -> None:
    with pytest.raises(UserError, match=says):
        swap(model, "abcde", options, InterveneOptions())


EDITS = [
    Edit(0, 4, where("2,new", 6), -2.0, 1.0),
    Edit(1, 7, Where((3, 5)), 0.0, 2.0),
    Edit(2, 1, where("all", 6), 1.0, 1.5),
]


@pytest.mark.parametrize("response", list(Response), ids=str)
@pytest.mark.parametrize(("kind", "errors"), MODELS)
def test_a_continuation_under_edits_is_the_same_with_and_without_a_cache(
    model: ReplacementModel, kind: Model, errors: bool, response: Response
) -> None:
    prompt = model.tokens("abcde")
    logits = {}
    for kv_cache in (True, False):
        options = InterveneOptions(kind, errors, response, n_tokens=5, kv_cache=kv_cache)
        step = edited_steps(model, EDITS, 6, options)
        parts = [step(prompt), *(step(torch.tensor([[token]])) for token in (9, 30, 12, 7))]
        logits[kv_cache] = torch.cat(parts, dim=1)
        before, after = under(model, prompt, EDITS, options)
        assert len(after.kl) == len(after.tokens) >= 1
        if kv_cache:
            kept = before, after
    torch.testing.assert_close(logits[True], logits[False], atol=2e-4, rtol=1e-4)
    assert (kept[0].tokens, kept[1].tokens) == (before.tokens, after.tokens)
    assert kept[1].kl == pytest.approx(after.kl, abs=1e-4)
    whole = torch.cat([prompt, torch.tensor([[9, 30, 12, 7]])], dim=1)
    spelled_out = [edit._replace(where=_spelled(edit.where)) for edit in EDITS]
    at_once = intervene(model, whole, [spelled_out], InterveneOptions(kind, errors, response)).logits
    torch.testing.assert_close(logits[True], at_once, atol=2e-4, rtol=1e-4)
    prompt_alone = [edit._replace(where=Where(edit.where.positions)) for edit in EDITS]
    other = intervene(model, whole, [prompt_alone], InterveneOptions(kind, errors, response)).logits
    assert (other - at_once).abs().max() > 1e-2, "the edits of generated tokens count"


def _spelled(at: Where) -> Where:
    return Where((*at.positions, *(range(6, 10) if at.new else ())))


def test_without_edits_both_continuations_are_the_models(model: ReplacementModel) -> None:
    options = InterveneOptions(n_tokens=6)
    prompt = model.tokens("abcde")
    before, after = under(model, prompt, [], options)
    assert (before.tokens, before.ended) == (after.tokens, after.ended)
    assert max(before.kl + after.kl) < 1e-9
    whole = torch.cat([prompt, torch.tensor([before.tokens])], dim=1)
    logits = original_steps(model.lm, kv_cache=False)(whole)[0]
    assert before.tokens == logits[5:-1].argmax(-1).tolist()


def test_tokens_that_are_not_there_before_cannot_be_held(model: ReplacementModel) -> None:
    options = InterveneOptions(n_tokens=3, attention="frozen")  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"n_tokens: .*; use intervene.attention=live"):
        intervene(model, "abcde", [EDITS], options)
