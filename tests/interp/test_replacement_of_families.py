"""What a replacement must do whatever the transcoder, in every architecture of base models."""

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from pipeline.arch.base import Dims, Transcoder
from pipeline.arch.clt import CLT
from pipeline.arch.options import ArchOptions, Site
from pipeline.core.activations import FixedThreshold
from pipeline.core.metrics import as_plain
from pipeline.core.metrics_predictions import replacement_numbers
from pipeline.data import models
from pipeline.data.models import LanguageModel
from pipeline.data.options import ModelOptions
from pipeline.interp import contexts, curves
from pipeline.interp.evaluation import divergences
from pipeline.interp.generation import continuation, given, original_steps, replacement_steps
from pipeline.interp.options import GenerateOptions
from pipeline.interp.replacement import ReplacementModel, TeacherForced, ablated_logits
from tests.families import D_MODEL, FAMILIES, N_CONTEXT, N_LAYERS

F = 13
SUBSETS = [None, [1], [0, 2], []]


class Case(NamedTuple):
    lm: LanguageModel
    replaced: ReplacementModel


@pytest.fixture(scope="module", params=FAMILIES)
def case(request: pytest.FixtureRequest, family_model: Callable[[str], Path]) -> Case:
    lm = models.load(ModelOptions(name="tiny", path=str(family_model(request.param)), device="cpu"))
    return Case(lm, ReplacementModel(lm, random_clt(), Site.mlp_in))


def random_clt() -> Transcoder:
    generator = torch.Generator().manual_seed(3)
    threshold = torch.rand(N_LAYERS, F, generator=generator)
    clt = CLT(ArchOptions("clt", d_features=F), Dims(N_LAYERS, D_MODEL), FixedThreshold(threshold))
    with torch.no_grad():
        for parameter in clt.parameters():
            parameter.normal_(0, 0.3, generator=generator)
    return clt.eval().requires_grad_(False)


def tokens(n: int = 4, context: int = 9) -> Tensor:
    return torch.randint(3, 61, (n, context), generator=torch.Generator().manual_seed(1))


def test_exact_outputs_in_the_mlps_place_lose_nothing(case: Case) -> None:
    lm = case.lm

    def exact(ids: Tensor) -> Tensor:
        mlp_out = lm.collect(ids)[1]
        return lm.logits(ids, lambda layer, resid, own: mlp_out[:, :, layer].clone())

    mean = lm.collect(tokens())[1][:, 1:].mean(dim=(0, 1))
    baselines = {
        name: lambda ids, put=put: ablated_logits(lm, put, ids)
        for name, put in (("zero_ablation", torch.zeros_like(mean)), ("mean_ablation", mean))
    }
    results = divergences(lm, {"exact": exact, **baselines}, tokens().numpy(), 4 * 8, batch_tokens=18)
    sums = contexts.totals({name: result.sums() for name, result in results.items()})
    found = as_plain(replacement_numbers(sums.pop("exact"), sums))
    assert found["kl"] == pytest.approx(0, abs=1e-9)
    assert found["top1"] == found["top5"] == 1
    assert found["delta_ce"] == pytest.approx(0, abs=1e-6)
    for baseline in baselines:
        assert found[f"kl_{baseline}"] > 0.01
        assert found[f"kl_recovered_{baseline}"] == pytest.approx(1, abs=1e-6)


def test_a_transcoder_without_decoders_is_the_zero_or_the_mean_ablation(case: Case) -> None:
    clt, lm = random_clt(), case.lm
    for table in clt.decoders.parameters():
        table.zero_()
    clt.b_dec.zero_()
    model = ReplacementModel(lm, clt, Site.mlp_in)
    assert model.run(tokens()).dense().any(), "features are active, and write nothing"
    zero = ablated_logits(lm, torch.zeros(N_LAYERS, D_MODEL), tokens())
    torch.testing.assert_close(model.logits(tokens()), zero)
    torch.testing.assert_close(TeacherForced(lm, clt, Site.mlp_in).logits(tokens()), zero)
    mean = lm.collect(tokens())[1][:, 1:].mean(dim=(0, 1))
    clt.b_dec.copy_(mean)
    of_mean = ablated_logits(lm, mean, tokens())
    assert not torch.allclose(of_mean, zero, atol=1e-3)
    torch.testing.assert_close(model.logits(tokens()), of_mean)
    torch.testing.assert_close(TeacherForced(lm, clt, Site.mlp_in).logits(tokens()), of_mean)


@pytest.mark.parametrize("layers", SUBSETS, ids=str)
def test_with_its_errors_the_replacement_is_the_original(case: Case, layers: list[int] | None) -> None:
    kept = case.replaced.run(tokens(), keep_error=True, layers=layers)
    torch.testing.assert_close(kept.logits, case.lm.logits(tokens()), rtol=0, atol=1e-6)
    torch.testing.assert_close(case.replaced.logits(tokens(), layers, keep_error=True), kept.logits)
    without = case.replaced.logits(tokens(), layers)
    assert torch.allclose(without, kept.original_logits, atol=1e-6) == (layers == [])


@pytest.mark.parametrize("layers", SUBSETS, ids=str)
def test_a_later_token_changes_nothing_before_it(case: Case, layers: list[int] | None) -> None:
    changed = tokens()
    changed[:, 6] = 3 + (changed[:, 6] - 2) % 58
    live, forced = case.replaced, TeacherForced(case.lm, case.replaced.transcoder, Site.mlp_in)
    for logits in (live.logits, forced.logits):
        before, after = logits(tokens(), layers), logits(changed, layers)
        torch.testing.assert_close(before[:, :6], after[:, :6], atol=1e-5, rtol=0)
        assert not torch.allclose(before[:, 6:], after[:, 6:], atol=1e-3)


@pytest.mark.parametrize("layers", SUBSETS, ids=str)
def test_only_the_layers_that_are_asked_for_are_replaced(case: Case, layers: list[int] | None) -> None:
    """Against reconstructions that are computed outside: of the original's activations, and of the live stream's."""
    lm, clt, norm = case.lm, case.replaced.transcoder, case.lm.mlp_norm()
    chosen = range(N_LAYERS) if layers is None else layers
    at_original = clt(norm(lm.collect(tokens())[0].flatten(0, 1))).y_hat.view(4, 9, N_LAYERS, D_MODEL)
    stream = torch.zeros(4 * 9, N_LAYERS, D_MODEL)

    def put(layer: int, y_hat: Tensor, own: Tensor) -> Tensor:
        return torch.cat([own[:, :1], y_hat[:, 1:]], dim=1) if layer in chosen else own

    def live(layer: int, resid: Tensor, own: Tensor) -> Tensor:
        stream[:, layer] = norm.layer(resid, layer).flatten(0, 1)
        return put(layer, clt(stream).y_hat[:, layer].view(own.shape), own)

    expected = lm.logits(tokens(), live)
    for got in (case.replaced.logits(tokens(), layers), case.replaced.run(tokens(), layers=layers).logits):
        torch.testing.assert_close(got, expected, atol=2e-4, rtol=1e-4)
    forced = lm.logits(tokens(), lambda layer, resid, own: put(layer, at_original[:, :, layer], own))
    got = TeacherForced(lm, clt, Site.mlp_in).logits(tokens(), layers)
    torch.testing.assert_close(got, forced, atol=2e-4, rtol=1e-4)
    alone = layers is not None and len(layers) < 2
    assert torch.allclose(expected, forced, atol=1e-3) == alone, "one layer alone is the same live and teacher-forced"


def test_the_curves_are_the_replacements_of_the_layers_that_they_name(case: Case) -> None:
    lm, clt, n_rows = case.lm, case.replaced.transcoder, 3 * 8
    found = curves.measure(lm, clt, tokens(5).numpy(), 5 * 8, batch_tokens=20, n_contexts=3)
    assert (found["n_tokens"], found["n_contexts"]) == (n_rows, 3)
    kinds = {"live": case.replaced.logits, "teacher_forced": TeacherForced(lm, clt, Site.mlp_in).logits}
    for kind, logits in kinds.items():
        for l in range(N_LAYERS):
            subsets = {"only": [l], "up_to": range(l + 1), "from": range(l, N_LAYERS)}
            calls = {which: partial(logits, layers=layers) for which, layers in subsets.items()}
            apart = divergences(lm, calls, tokens(5)[:3].numpy(), n_rows, batch_tokens=100)
            for which, expected in apart.items():
                point = found[kind][which][l]
                assert point == pytest.approx(
                    {"kl": expected.kl, "top1": expected.top1, "delta_ce": expected.delta_ce}, rel=2e-3, abs=1e-4
                ), (kind, which, l)
    assert found["live"]["from"][0]["kl"] != found["teacher_forced"]["from"][0]["kl"]


@pytest.mark.parametrize("sampled", [False, True], ids=["greedy", "sampled"])
@pytest.mark.parametrize("keep_error", [False, True], ids=["", "with errors"])
def test_a_continuation_is_the_same_with_and_without_a_kv_cache(case: Case, sampled: bool, keep_error: bool) -> None:
    lm, options = case.lm, GenerateOptions(n_tokens=11, keep_error=keep_error)
    if sampled:
        options.temperature, options.top_k, options.top_p, options.seed = 1.5, 40, 0.98, 7
    found = {}
    for kv_cache in (True, False):
        options.kv_cache = kv_cache
        for name in ("replacement", "original"):

            def steps(name: str = name) -> Callable[[Tensor], Tensor]:
                if name == "original":
                    return original_steps(lm, options.kv_cache)
                return replacement_steps(case.replaced, options)

            one = continuation(steps(), tokens(1, 5), lm, options)
            again = given(steps(), tokens(1, 5), one.tokens)
            torch.testing.assert_close(again, one.logits, atol=2e-5, rtol=1e-5)
            found[name, kv_cache] = one
    for name in ("replacement", "original"):
        cached, recomputed = found[name, True], found[name, False]
        assert cached.tokens == recomputed.tokens
        assert cached.ended == recomputed.ended
        torch.testing.assert_close(cached.logits, recomputed.logits, atol=2e-5, rtol=1e-5)
    same = torch.allclose(found["replacement", True].logits[0], found["original", True].logits[0], atol=1e-4)
    assert same == keep_error


def test_a_sliding_window_slides_in_the_kv_cache_too(family_model: Callable[[str], Path], tmp_path: Path) -> None:
    path = Path(shutil.copytree(family_model("Gemma2"), tmp_path / "model"))
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"sliding_window": 4}))
    lm = models.load(ModelOptions(name="tiny", path=str(path), device="cpu"))
    model, found = ReplacementModel(lm, random_clt(), Site.mlp_in), []
    for kv_cache in (True, False):
        options = GenerateOptions(n_tokens=12, kv_cache=kv_cache)
        found.append(continuation(replacement_steps(model, options), tokens(1, 7), lm, options))
    assert found[0].tokens == found[1].tokens
    torch.testing.assert_close(found[0].logits, found[1].logits, atol=2e-5, rtol=1e-5)


def test_the_originals_greedy_continuation_is_the_one_of_transformers(case: Case) -> None:
    lm, options = case.lm, GenerateOptions(n_tokens=N_CONTEXT - 5)
    expected = lm.weights.generate(tokens(1, 5), do_sample=False, max_new_tokens=options.n_tokens, pad_token_id=0)
    found = continuation(original_steps(lm, True), tokens(1, 5), lm, options)
    assert found.tokens == expected[0, 5:].tolist()
