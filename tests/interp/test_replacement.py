"""A transcoder in place of a model's MLPs, against a slow version written with plain Hugging Face hooks."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from pipeline.arch.base import Dims, Transcoder
from pipeline.arch.clt import CLT
from pipeline.arch.options import ArchOptions, Site
from pipeline.core import activations
from pipeline.core.activations import Activation, FixedThreshold
from pipeline.core.options import ActivationOptions
from pipeline.data import models
from pipeline.data.models import LanguageModel
from pipeline.data.options import ModelOptions
from pipeline.errors import UserError
from pipeline.interp.replacement import ReplacementModel, ablated_logits

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
