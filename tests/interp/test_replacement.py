"""A transcoder in place of a model's MLPs, against a slow version written with plain Hugging Face hooks."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.arch import table
from pipeline.arch.base import Dims, Transcoder
from pipeline.arch.clt import CLT
from pipeline.arch.options import ArchOptions, Site, Target, Tie
from pipeline.core import activations
from pipeline.core.activations import Activation, FixedThreshold
from pipeline.core.options import ActivationOptions
from pipeline.core.sparse import Sparse
from pipeline.data import models
from pipeline.data.models import LanguageModel
from pipeline.data.options import Dtype, ModelOptions
from pipeline.errors import UserError
from pipeline.interp.replacement import Basis, ReplacementModel, TeacherForced, ablated_logits, basis, replacement
from tests import oracle

L, D, F = 3, 20, 13


@pytest.fixture(scope="module")
def lm(tiny_gpt2: Path) -> LanguageModel:
    return models.load(ModelOptions(name="local", path=str(tiny_gpt2)))


def random_clt(rule: Activation | None = None) -> Transcoder:
    generator = torch.Generator().manual_seed(3)
    threshold = torch.rand(L, F, generator=generator)
    clt = CLT(ArchOptions("clt", d_features=F), Dims(L, D), rule or FixedThreshold(threshold))
    with torch.no_grad():
        for parameter in clt.parameters():
            parameter.normal_(0, 0.4, generator=generator)
    return clt.eval().requires_grad_(False)


def random(name: str, scale: float = 0.4, **options: Any) -> Transcoder:
    """Any architecture with random weights and fixed thresholds."""
    chosen = oracle.arch_options(name, d_features=F, **options)
    generator = torch.Generator().manual_seed(3)
    threshold = torch.rand(table.n_sources(chosen, Dims(L, D)), F, generator=generator)
    model = table.build(chosen, Dims(L, D), FixedThreshold(threshold))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, scale, generator=generator)
    return model.eval().requires_grad_(False)


def slow_hooks(tiny_gpt2: Path, ids: Tensor, write: Callable[[int, Tensor, Tensor, Tensor], Tensor]) -> Tensor:
    """Logits with each MLP's output replaced by write(layer, residual, normed, own output) but at position 0."""
    from transformers import GPT2LMHeadModel

    hf = GPT2LMHeadModel.from_pretrained(tiny_gpt2).eval()
    resid: dict[int, Tensor] = {}
    for layer, block in enumerate(hf.transformer.h):

        def read(module: object, args: tuple[Tensor], layer: int = layer) -> None:
            resid[layer] = args[0]

        def replace(module: object, args: tuple[Tensor], out: Tensor, layer: int = layer) -> Tensor:
            y = write(layer, resid[layer], args[0], out).clone()
            y[:, 0] = out[:, 0]
            return y

        block.ln_2.register_forward_pre_hook(read)
        block.mlp.register_forward_hook(replace)
    with torch.no_grad():
        return hf(ids).logits


def tokens(n: int = 4, context: int = 9) -> Tensor:
    return torch.randint(3, 60, (n, context), generator=torch.Generator().manual_seed(1))


def slow_logits(tiny_gpt2: Path, clt: Transcoder, ids: Tensor, site: Site) -> Tensor:
    """Layer by layer with dense features; the first position keeps its own MLP output."""
    from transformers import GPT2LMHeadModel

    hf = GPT2LMHeadModel.from_pretrained(tiny_gpt2).eval()
    features: list[Tensor] = []
    assert isinstance(clt.activation, FixedThreshold)
    threshold = clt.activation.threshold
    resid: dict[int, Tensor] = {}
    for layer, block in enumerate(hf.transformer.h):

        def read(module: object, args: tuple[Tensor], layer: int = layer) -> None:
            resid[layer] = args[0]

        def write(module: object, args: tuple[Tensor], out: Tensor, layer: int = layer) -> Tensor:
            x = args[0] if site == Site.mlp_in else resid[layer]
            h = x @ clt.W_enc[layer].T + clt.b_enc[layer]
            features.append(h * (h > threshold[layer]))
            y = clt.b_dec[layer] + sum(a @ clt.W_dec[s][:, layer - s] for s, a in enumerate(features))
            y[:, 0] = out[:, 0]
            return y

        block.ln_2.register_forward_pre_hook(read)
        block.mlp.register_forward_hook(write)
    with torch.no_grad():
        return hf(ids).logits


@pytest.mark.parametrize("site", [Site.mlp_in, Site.resid_mid])
def test_live_replacement_equals_the_slow_one(lm: LanguageModel, tiny_gpt2: Path, site: Site) -> None:
    clt = random_clt()
    expected = slow_logits(tiny_gpt2, clt, tokens(), site)
    got = ReplacementModel(lm, clt, site).logits(tokens())
    assert not torch.allclose(expected, lm.logits(tokens()), atol=1e-2), "the transcoder changes the model"
    torch.testing.assert_close(got, expected, atol=2e-4, rtol=1e-4)


def test_a_transcoder_without_features_is_an_ablation(lm: LanguageModel) -> None:
    clt = random_clt()
    for parameter in clt.parameters():
        parameter.zero_()
    model = ReplacementModel(lm, clt, Site.mlp_in)
    torch.testing.assert_close(model.logits(tokens()), ablated_logits(lm, torch.zeros(L, D), tokens()))
    mean = torch.randn(L, D, generator=torch.Generator().manual_seed(2))
    clt.b_dec.copy_(mean)
    torch.testing.assert_close(model.logits(tokens()), ablated_logits(lm, mean, tokens()))


def test_later_tokens_do_not_reach_back(lm: LanguageModel) -> None:
    model = ReplacementModel(lm, random_clt(), Site.mlp_in)
    changed = tokens()
    changed[:, 6] = (changed[:, 6] + 1) % 60
    before, after = model.logits(tokens()), model.logits(changed)
    torch.testing.assert_close(before[:, :6], after[:, :6], atol=1e-6, rtol=0)
    assert not torch.allclose(before[:, 6:], after[:, 6:], atol=1e-3)


def test_the_first_position_keeps_its_own_output(lm: LanguageModel) -> None:
    model = ReplacementModel(lm, random_clt(), Site.mlp_in)
    torch.testing.assert_close(model.logits(tokens())[:, 0], lm.logits(tokens())[:, 0])


def test_another_models_transcoder_is_refused(lm: LanguageModel) -> None:
    other = CLT(ArchOptions("clt", d_features=F), Dims(L, D + 1), FixedThreshold(torch.zeros(L, F)))
    with pytest.raises(UserError, match=r"\(3, 21\).*\(3, 20\)"):
        ReplacementModel(lm, other, Site.mlp_in)


@pytest.mark.parametrize("name", ["batchtopk", "batchtopk_across"])
def test_a_rule_that_looks_at_other_tokens_cannot_run_live(lm: LanguageModel, name: str) -> None:
    rule = activations.build(ActivationOptions(name=name, k=2), L, F)
    with pytest.raises(UserError, match="cannot run live"):
        ReplacementModel(lm, random_clt(rule), Site.mlp_in)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("skip", {}),
        ("clt", {"max_reach": 1, "skip": True}),
        ("tied", {"offset": True, "skip": True}),
        ("tied", {"tie": Tie.target}),
        ("per_layer", {}),
    ],
)
def test_live_replacement_reads_the_live_stream_in_every_causal_architecture(
    lm: LanguageModel, tiny_gpt2: Path, name: str, options: dict[str, Any]
) -> None:
    """Against the whole transcoder applied to what was read so far, zeros in place of the layers that come later."""
    model = random(name, **options)
    so_far: list[Tensor] = []

    def write(layer: int, resid: Tensor, normed: Tensor, own: Tensor) -> Tensor:
        so_far.append(normed.flatten(0, 1))
        x = torch.stack([*so_far, *([torch.zeros_like(so_far[0])] * (L - layer - 1))], dim=1)
        return model(x).y_hat[:, layer].view(own.shape)

    expected = slow_hooks(tiny_gpt2, tokens(), write)
    assert basis(model) == Basis.live
    replaced = replacement(lm, model)
    assert isinstance(replaced, ReplacementModel)
    torch.testing.assert_close(replaced.logits(tokens()), expected, atol=5e-4, rtol=1e-4)


@pytest.mark.parametrize("site", [Site.mlp_in, Site.resid_mid, Site.mlp_out])
def test_teacher_forced_features_are_those_of_the_original_model_at_all_layers(
    lm: LanguageModel, tiny_gpt2: Path, site: Site
) -> None:
    options = {"target": Target.site} if site == Site.mlp_out else {}
    model, read = random("crosscoder", 0.2, site=site, **options), []

    def collect(layer: int, resid: Tensor, normed: Tensor, own: Tensor) -> Tensor:
        read.append({Site.mlp_in: normed, Site.resid_mid: resid, Site.mlp_out: own}[site].flatten(0, 1))
        return own

    original = slow_hooks(tiny_gpt2, tokens(), collect)
    y_hat = model(torch.stack(read, dim=1)).y_hat
    expected = slow_hooks(tiny_gpt2, tokens(), lambda layer, resid, normed, own: y_hat[:, layer].view(own.shape))
    assert basis(model) == Basis.teacher_forced
    replaced = replacement(lm, model)
    assert isinstance(replaced, TeacherForced)
    got = replaced.logits(tokens())
    assert not torch.allclose(got, original, atol=1e-2)
    torch.testing.assert_close(got, expected, atol=5e-4, rtol=1e-4)


def test_an_sae_of_the_output_runs_the_mlp_on_the_live_stream(lm: LanguageModel, tiny_gpt2: Path) -> None:
    model = random("sae", site=Site.mlp_out)

    def write(layer: int, resid: Tensor, normed: Tensor, own: Tensor) -> Tensor:
        x = torch.zeros(own.shape[0] * own.shape[1], L, D)
        x[:, layer] = own.flatten(0, 1)
        return model(x).y_hat[:, layer].view(own.shape)

    expected = slow_hooks(tiny_gpt2, tokens(), write)
    assert basis(model) == Basis.runs_the_mlp
    torch.testing.assert_close(replacement(lm, model).logits(tokens()), expected, atol=5e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("sae", {}),
        ("sae", {"site": Site.resid_mid}),
        ("crosscoder", {"target": Target.site}),
        ("crosscoder", {"target": Target.site, "site": Site.resid_mid}),
    ],
)
def test_what_does_not_reconstruct_mlp_outputs_replaces_nothing(
    lm: LanguageModel, name: str, options: dict[str, Any]
) -> None:
    model = random(name, **options)
    assert basis(model) is None
    with pytest.raises(UserError, match=rf"arch={name} reconstructs {model.options.site}, not the MLPs' outputs.*;"):
        replacement(lm, model)


def test_an_acausal_architecture_cannot_run_live(lm: LanguageModel) -> None:
    with pytest.raises(UserError, match=r"arch=crosscoder reads all layers at once.*;"):
        ReplacementModel(lm, random("crosscoder"), Site.mlp_in)


@pytest.mark.parametrize("keep_error", [False, True])
@pytest.mark.parametrize("name", ["clt", "per_layer", "tied"])
def test_a_prompt_gives_features_reconstructions_and_errors(lm: LanguageModel, name: str, keep_error: bool) -> None:
    """With error terms the live stream is the original's, so that everything is known from its activations."""
    model = random(name, 0.2)
    found = ReplacementModel(lm, model, Site.mlp_in).run(tokens(2, 5), keep_error=keep_error)
    resid_mid, mlp_out = lm.collect(tokens(2, 5))
    at_original = model(lm.mlp_norm()(resid_mid.flatten(0, 1)))
    features = at_original.features.dense() if isinstance(at_original.features, Sparse) else at_original.features
    features, y_hat = features.unflatten(0, (2, 5)).clone(), at_original.y_hat.unflatten(0, (2, 5)).clone()
    features[:, 0], y_hat[:, 0] = 0, mlp_out[:, 0]
    torch.testing.assert_close(found.original_logits, lm.logits(tokens(2, 5)))
    torch.testing.assert_close(found.mlp_out, mlp_out)
    torch.testing.assert_close(found.error, mlp_out - y_hat, atol=1e-5, rtol=1e-4)
    assert torch.equal(found.tokens, tokens(2, 5))
    assert found.dense().shape == (2, 5, L, model.d_features)
    assert not found.dense()[:, 0].any()
    assert found.dense()[:, 1:].any()
    assert torch.allclose(found.dense(), features, atol=1e-5) == keep_error
    assert torch.allclose(found.y_hat, y_hat, atol=1e-5) == keep_error
    assert torch.allclose(found.logits, found.original_logits, atol=1e-5) == keep_error
    decoded = model.decode(found.features, torch.zeros(10, L, D)).unflatten(0, (2, 5))
    torch.testing.assert_close(decoded[:, 1:], found.y_hat[:, 1:], atol=1e-5, rtol=1e-4)


def test_prompts_are_texts_or_ids(lm: LanguageModel) -> None:
    model = ReplacementModel(lm, random_clt(), Site.mlp_in)
    assert (
        model.tokens("ab").tolist() == model.tokens(["ab"]).tolist() == model.tokens([1, 3, 4]).tolist() == [[1, 3, 4]]
    )
    assert model.tokens(["ab", "ba"]).tolist() == [[1, 3, 4], [1, 4, 3]]
    assert model.tokens(torch.tensor([5, 6])).tolist() == [[5, 6]]
    whole = model.run(["ab", "ba"])
    torch.testing.assert_close(model.run("ba").logits[0], whole.logits[1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [Dtype.float32, Dtype.bfloat16])
def test_error_terms_leave_no_bit_of_the_original_changed(tiny_gpt2: Path, dtype: Dtype) -> None:
    lm = models.load(ModelOptions(name="local", path=str(tiny_gpt2), dtype=dtype, device="cpu"))
    found = ReplacementModel(lm, random_clt(), Site.resid_mid).run(tokens(), keep_error=True)
    assert torch.equal(found.logits, found.original_logits)
    assert found.error[:, 1:].abs().mean() > 0.1


def test_tokens_that_do_not_fit_a_past_are_refused(lm: LanguageModel) -> None:
    model = ReplacementModel(lm, random_clt(), Site.mlp_in)
    past = model.new_past()
    model.logits(tokens(1, 30), past=past)
    with pytest.raises(UserError, match=r"41 tokens in all, model=local has 40 positions; take fewer"):
        model.logits(tokens(1, 11), past=past)
    with pytest.raises(UserError, match=r"the errors of the past were not kept; give keep_error from its first"):
        model.logits(tokens(1, 2), keep_error=True, past=past)
    together = model.logits(torch.cat([tokens(1, 30), tokens(1, 10)], dim=1))
    torch.testing.assert_close(model.logits(tokens(1, 10), past=past), together[:, 30:], atol=2e-5, rtol=1e-5)
