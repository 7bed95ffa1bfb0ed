"""Edits of features in a model and its replacement, against loops over plain Hugging Face hooks."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from pipeline.arch import table
from pipeline.arch.base import Dims, Transcoder
from pipeline.arch.options import Site
from pipeline.arch.table import ARCHS as ARCHS_TABLE
from pipeline.core.activations import FixedThreshold
from pipeline.data import models
from pipeline.data.models import LanguageModel
from pipeline.data.options import Attention, ModelOptions
from pipeline.errors import UserError
from pipeline.interp.replacement import ReplacementModel
from pipeline.interp.steering import intervene_report
from pipeline.interp.steering.feature_edits import Edit, Where
from pipeline.interp.steering.intervene import intervene
from pipeline.interp.steering.intervene_options import Hold, InterveneOptions, Model, Response
from tests import oracle
from tests.families import D_MODEL, N_LAYERS, Plain

F = 13
ARCHS = ["clt", "per_layer", "skip"]
MODELS = [(Model.original, True), (Model.replacement, True), (Model.replacement, False)]


class Case(NamedTuple):
    model: ReplacementModel
    plain: Plain


def transcoder(arch: str, scale: float = 0.25, d_features: int = F) -> Transcoder:
    generator = torch.Generator().manual_seed(3)
    options, dims = oracle.arch_options(arch, d_features=d_features), Dims(N_LAYERS, D_MODEL)
    threshold = torch.rand(table.n_sources(options, dims), d_features, generator=generator)
    model = table.build(options, dims, FixedThreshold(threshold))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, scale, generator=generator)
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module", params=["GPT2", "Llama", "Gemma2"])
def family(request: pytest.FixtureRequest, family_model: Callable[[str], Path]) -> tuple[LanguageModel, Plain]:
    path = family_model(request.param)
    options = ModelOptions(name="tiny", path=str(path), device="cpu", attention=Attention.eager)
    return models.load(options), Plain(path, request.param, attention="eager")


@pytest.fixture(params=ARCHS)
def case(request: pytest.FixtureRequest, family: tuple[LanguageModel, Plain]) -> Case:
    return Case(ReplacementModel(family[0], transcoder(request.param), Site.mlp_in), family[1])


def tokens(length: int = 9, seed: int = 1) -> Tensor:
    return torch.randint(3, 61, (1, length), generator=torch.Generator().manual_seed(seed))


def busy(model: ReplacementModel, layer: int, position: int, rank: int = 0) -> tuple[int, float]:
    """A feature that is active there, and its activation."""
    dense = model.at_original(model.original(tokens())).features[layer]
    at = dense[0].tokens == position
    order = dense[1][at].argsort(descending=True)[rank]
    return int(dense[0].indices[at][order]), float(dense[1][at][order])


EDITS = [
    [Edit(0, 3, Where((4,)), 0.0, 1.5)],
    [Edit(0, 5, Where((2, 6)), -1.0, 0.5), Edit(1, 7, Where((1, 2, 3, 4, 5, 6, 7, 8)), 2.0, 0.0)],
    [],
    [Edit(1, 2, Where((8,)), 0.0, 0.0), Edit(1, 2, Where((8,)), 1.0, 2.0), Edit(2, 9, Where((3,)), 1.0, -2.0)],
]


def slow(case: Case, edits: list[Edit], options: InterveneOptions) -> Tensor:
    """One intervention with dense features, a layer after the other, by the formulas."""
    clt, plain, ids = case.model.transcoder, case.plain, tokens()
    T = ids.shape[1]
    last = options.until if options.until is not None else N_LAYERS - 1

    def decode(a: list[Tensor], m: int, x: Tensor) -> Tensor:
        y = clt.b_dec[m].expand(T, -1).clone()
        for layer in range(m + 1):
            if m in clt.targets(layer):
                y += a[layer] @ clt.table(layer, m)
        return y if clt.W_skip is None else y + x @ clt.W_skip[m].T

    def run(write: Callable[[int, Tensor, Tensor], Tensor]) -> Tensor:
        read: dict[int, Tensor] = {}
        handles = []
        for layer, (norm, out) in enumerate(zip(plain.norms, plain.outs, strict=True)):

            def keep(module: object, inputs: object, output: Tensor, layer: int = layer) -> None:
                read[layer] = output[0]

            def put(module: object, inputs: object, output: Tensor, layer: int = layer) -> Tensor:
                made = write(layer, read[layer], output[0]).clone()
                made[0] = output[0, 0]
                return made[None]

            handles += [norm.register_forward_hook(keep), out.register_forward_hook(put)]
        with torch.no_grad():
            logits = plain.model(ids).logits[0]
        for handle in handles:
            handle.remove()
        return logits

    def active(layer: int, x: Tensor) -> tuple[Tensor, Tensor]:
        h = x @ clt.encoders[layer].T + clt.b_enc[layer]
        return h, h * (h > clt.activation.threshold[layer])  # type: ignore[index, operator]

    base: list[Tensor] = []
    y_base: list[Tensor] = []
    outs: list[Tensor] = []

    def observe(layer: int, x: Tensor, own: Tensor) -> Tensor:
        base.append(active(layer, x)[1])
        y_base.append(decode(base, layer, x))
        outs.append(own if options.keep_error else y_base[-1])
        return outs[-1]

    run(observe)
    counted: list[Tensor] = []
    edited: list[Tensor] = []

    def change(layer: int, x: Tensor, own: Tensor) -> Tensor:
        h, a = active(layer, x)
        holds = options.layers != Response.open and layer <= last
        if holds:
            a = base[layer] if options.layers == Response.constrained else h * (base[layer] > 0)
        counted.append(a)
        a = a.clone()
        for edit in edits:
            if edit.layer == layer:
                for position in edit.where.positions:
                    a[position, edit.feature] = edit.scale * a[position, edit.feature] + edit.add
        edited.append(a)
        y = decode(edited, layer, x)
        if options.model == Model.original and not holds:
            return own + y - decode(counted, layer, x)
        return outs[layer] + y - y_base[layer]

    return run(change)


@pytest.mark.parametrize("response", list(Response), ids=str)
@pytest.mark.parametrize(("kind", "errors"), MODELS)
def test_many_interventions_in_one_pass_are_those_of_the_formulas(
    case: Case, kind: Model, errors: bool, response: Response
) -> None:
    options = InterveneOptions(model=kind, keep_error=errors, layers=response)
    found = intervene(case.model, tokens(), EDITS, options)
    before = found.before.logits[0]
    for edits, logits in zip(EDITS, found.logits, strict=True):
        torch.testing.assert_close(logits, slow(case, edits, options), atol=3e-4, rtol=1e-4)
        assert ((logits - before).abs().max() > 1e-2) == bool(edits)


def test_layers_are_held_as_far_as_is_said(case: Case) -> None:
    for response in (Response.constrained, Response.gates):
        options = InterveneOptions(layers=response, until=1)
        found = intervene(case.model, tokens(), EDITS, options)
        for edits, logits in zip(EDITS, found.logits, strict=True):
            torch.testing.assert_close(logits, slow(case, edits, options), atol=3e-4, rtol=1e-4)


@pytest.mark.parametrize(("kind", "errors"), MODELS)
def test_without_an_edit_nothing_changes_to_the_bit(case: Case, kind: Model, errors: bool) -> None:
    for response in Response:
        options = InterveneOptions(model=kind, keep_error=errors, layers=response)
        found = intervene(case.model, tokens(), [[]], options)
        if errors:
            assert torch.equal(found.logits, found.before.logits)
            assert torch.equal(found.logits, case.model.lm.logits(tokens()))
        else:
            torch.testing.assert_close(found.logits, case.model.logits(tokens()), atol=2e-5, rtol=0)
        assert intervene_report.features(found, 0) == intervene_report.made(found, 0) == []


def test_how_interventions_are_batched_does_not_matter(case: Case) -> None:
    whole = intervene(case.model, tokens(), EDITS, InterveneOptions())
    for size in (1, 20):
        parts = intervene(case.model, tokens(), EDITS, InterveneOptions(batch_tokens=size))
        torch.testing.assert_close(parts.logits, whole.logits, atol=1e-5, rtol=1e-5)
        for one, other in zip((*parts.read, *parts.edited), (*whole.read, *whole.edited), strict=True):
            assert torch.equal(one[0].offsets, other[0].offsets)
            assert torch.equal(one[0].indices, other[0].indices)
            torch.testing.assert_close(one[1], other[1])


def test_constrained_edits_act_through_the_decoders_of_the_feature_alone(family: tuple[LanguageModel, Plain]) -> None:
    """At the layers' MLP outputs: what is added is the change times the decoder row, and nothing else."""
    lm = family[0]
    model = ReplacementModel(lm, transcoder("clt"), Site.mlp_in)
    feature, value = busy(model, 0, 4)
    seen: list[Tensor] = []
    from pipeline.interp.steering.feature_edits import Compiled
    from pipeline.interp.steering.intervene import Edited, unedited

    options = InterveneOptions(layers=Response.constrained)
    before = unedited(model, tokens(), options)
    made = Edited(model, before, Compiled([[Edit(0, feature, Where((4,)), 0.0, 0.0)]], 9, 0, 9, F), options)

    def note(layer: int, resid: Tensor, own: Tensor) -> Tensor:
        seen.append(made(layer, resid, own))
        return seen[-1]

    lm.logits(tokens(), note)
    for m in range(N_LAYERS):
        change = seen[m][0] - before.outputs[m][0]
        torch.testing.assert_close(change[4], -value * model.transcoder.table(0, m)[feature], atol=1e-5, rtol=1e-4)
        change[4] = 0
        assert change.abs().max() < 1e-5


def test_what_changed_is_reported(family: tuple[LanguageModel, Plain]) -> None:
    lm = family[0]
    model = ReplacementModel(lm, transcoder("clt"), Site.mlp_in)
    feature, value = busy(model, 0, 4)
    edits = [[Edit(0, feature, Where((4,)), 0.0, 0.0)], [Edit(0, feature, Where((4,)), 3.0, 0.0)]]
    found = intervene(model, tokens(), edits, InterveneOptions())
    before, after = found.before.logits[0], found.logits
    for row, factor in enumerate((0.0, 3.0)):
        [made] = intervene_report.made(found, row)
        assert made[:3] == (0, feature, 4)
        assert made.before == pytest.approx(value, rel=1e-5)
        assert made.after == pytest.approx(factor * value, rel=1e-5)
        p, q = before.double().log_softmax(-1), after[row].double().log_softmax(-1)
        expected = (p.exp() * (p - q)).sum(-1)
        torch.testing.assert_close(intervene_report.kl(found)[row], expected, atol=1e-9, rtol=1e-5)
        assert expected[:4].abs().max() < 1e-9
        assert expected[4:].min() > 1e-9
        movers = intervene_report.tokens(found, row, 5, chosen=[17])
        change = (q[-1].exp() - p[-1].exp()).abs()
        assert movers[0]["token"] == 17
        assert {one["token"] for one in movers[1:]} <= set(change.topk(5).indices.tolist())
        for one in movers:
            i = one["token"]
            assert one["logit"] == pytest.approx([float(before[-1, i]), float(after[row, -1, i])])
            assert one["probability"] == pytest.approx([float(p[-1, i].exp()), float(q[-1, i].exp())])


def test_later_features_that_change_are_those_of_the_edited_stream(family: tuple[LanguageModel, Plain]) -> None:
    lm = family[0]
    model = ReplacementModel(lm, transcoder("clt", 0.4), Site.mlp_in)
    feature, _ = busy(model, 0, 4)
    edits = [[], [Edit(0, feature, Where((4,)), -4.0, 0.0), Edit(1, 2, Where((5,)), 1.0, 1.0)]]
    found = intervene(model, tokens(), edits, InterveneOptions(model=Model.replacement))
    changes = intervene_report.features(found, 1)
    sizes = [abs(one.after - one.before) for one in changes]
    assert sizes == sorted(sizes, reverse=True)
    old = torch.stack([_dense(one, 9) for one in found.before.features])
    new = torch.stack([_dense(one, 18) for one in found.read])[:, 9:]
    expected = {
        (layer, i, position)
        for layer in range(N_LAYERS)
        for position in range(1, 9)
        for i in range(F)
        if abs(new[layer, position, i] - old[layer, position, i]) > 1e-3
    } - {(1, 2, 5)}
    assert {one[:3] for one in changes if abs(one.after - one.before) > 1e-3} == expected
    assert all(one.position >= 4 and one.layer >= 1 for one in changes)
    assert {one.kind for one in changes} == {"appears", "vanishes", "changes"}


def _dense(values: tuple, n: int) -> Tensor:  # type: ignore[type-arg]
    pattern, amounts = values
    return torch.zeros(n, F).index_put((pattern.tokens, pattern.indices), amounts)


@pytest.mark.parametrize(("kind", "errors"), MODELS)
@pytest.mark.parametrize(("attention", "norms"), [(True, False), (False, True), (True, True)])
def test_attention_and_norms_are_held_at_those_without_the_edit(
    family: tuple[LanguageModel, Plain], kind: Model, errors: bool, attention: bool, norms: bool
) -> None:
    """Between MLP outputs that stand still everything is linear where both are held, and only there."""
    model = ReplacementModel(family[0], transcoder("clt"), Site.mlp_in)
    held = {"attention": Hold("frozen" if attention else "live"), "norms": Hold("frozen" if norms else "live")}
    options = InterveneOptions(model=kind, keep_error=errors, layers=Response.constrained, **held)
    edits = [[Edit(0, 3, Where((4,)), 1.0, add)] for add in (1.0, -2.0, 0.0)]
    found = intervene(model, tokens(), edits, options)
    torch.testing.assert_close(found.logits[2], found.before.logits[0], atol=3e-5, rtol=0)
    up, down = (logits[-1] for logits in found.logits[:2] - found.logits[2])
    if model.lm.architecture.startswith("Gemma"):  # undo the soft cap
        up, down = (30 * ((found.logits[row, -1] / 30).atanh() - (found.logits[2, -1] / 30).atanh()) for row in (0, 1))
    assert up.abs().max() > 1e-2
    assert torch.allclose(down, -2 * up, atol=2e-4) == (attention and norms)
    live = intervene(
        model, tokens(), edits, InterveneOptions(model=kind, keep_error=errors, layers=Response.constrained)
    )
    assert (live.logits[0] - found.logits[0]).abs().max() > 1e-3


@pytest.mark.parametrize("arch", sorted(ARCHS_TABLE.keys() - {"crosscoder"}))
def test_a_feature_set_to_0_everywhere_is_one_that_never_fires(family: tuple[LanguageModel, Plain], arch: str) -> None:
    """In every architecture that can run live, a MOLT's transforms and an SAE's features among them."""
    clt = transcoder(arch, d_features=12)
    model = ReplacementModel(family[0], clt, clt.options.site)
    everywhere, options = Where(tuple(range(1, 9))), InterveneOptions(Model.replacement, keep_error=False)
    found = intervene(model, tokens(), [[Edit(1, i, everywhere, 0.0, 0.0)] for i in range(12)], options)
    changes = (found.logits - found.before.logits).abs().amax(dim=(1, 2))
    feature = int(changes.argmax())
    assert changes[feature] > 1e-2
    never = copy.deepcopy(clt)
    never.activation.threshold[1, feature] = torch.inf  # type: ignore[index, operator]
    expected = ReplacementModel(family[0], never, clt.options.site).logits(tokens())
    torch.testing.assert_close(found.logits[feature][None], expected, atol=2e-4, rtol=1e-4)


def test_an_acausal_architecture_is_refused_with_the_reason(family: tuple[LanguageModel, Plain]) -> None:
    with pytest.raises(UserError, match=r"arch=crosscoder reads all layers at once"):
        ReplacementModel(family[0], transcoder("crosscoder"), Site.mlp_in)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (InterveneOptions(until=1), r"until=1 says how far layers are held; add intervene.layers=constrained"),
        (InterveneOptions(until=3, layers=Response.gates), r"until=3: layers are 0 to 2; name"),
        (InterveneOptions(keep_error=False), r"keep_error=false .*; add intervene.model=replacement"),
        (InterveneOptions(top=0), r"intervene.top .*; give such numbers"),
    ],
    ids=str,
)
def test_settings_that_mean_nothing_are_refused(
    family: tuple[LanguageModel, Plain], options: InterveneOptions, says: str
) -> None:
    with pytest.raises(UserError, match=says):
        intervene(ReplacementModel(family[0], transcoder("clt"), Site.mlp_in), tokens(), [[]], options)
