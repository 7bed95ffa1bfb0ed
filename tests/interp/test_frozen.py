from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pipeline.data import models
from pipeline.data.models import LanguageModel
from pipeline.data.options import ModelOptions
from pipeline.errors import UserError
from pipeline.interp.circuits import frozen
from tests.families import D_MODEL, FAMILIES, N_LAYERS


@pytest.fixture(scope="module", params=FAMILIES)
def lm(request: pytest.FixtureRequest, family_model: Callable[[str], Path]) -> LanguageModel:
    found = models.load(ModelOptions(name="tiny", path=str(family_model(request.param)), device="cpu"))
    found.weights.double()
    return found


def tokens(n: int = 1, context: int = 7) -> Tensor:
    return torch.randint(3, 61, (n, context), generator=torch.Generator().manual_seed(1))


def test_held_at_its_own_gates_the_model_is_what_it_was(lm: LanguageModel) -> None:
    ids, before = tokens(), lm.weights.config._attn_implementation
    with frozen.recording(lm) as gates:
        recorded = lm.logits(ids)
    assert len(gates.patterns) == N_LAYERS
    torch.testing.assert_close(recorded, lm.logits(ids), rtol=1e-5, atol=1e-5)
    with frozen.held(lm, gates):
        torch.testing.assert_close(lm.logits(ids), recorded, rtol=1e-11, atol=1e-11)
    assert lm.weights.config._attn_implementation == before
    assert not [module for module in lm.weights.modules() if "forward" in module.__dict__]


def test_held_copies_are_linear_in_what_the_mlps_write(lm: LanguageModel) -> None:
    """f(0) + a (f(u) - f(0)) + b (f(v) - f(0)) = f(a u + b v), for copies of one prompt side by side."""
    ids = tokens()
    gates = frozen.record(lm, ids)
    generator = torch.Generator().manual_seed(2)
    u, v = torch.randn(2, N_LAYERS, ids.shape[1], D_MODEL, generator=generator, dtype=torch.float64)
    writes = torch.stack([0 * u, u, v, 2 * u - 3 * v])
    resid: dict[int, Tensor] = {}

    def write(layer: int, resid_mid: Tensor, own: Tensor) -> Tensor:
        resid[layer] = resid_mid
        return writes[:, layer]

    with frozen.held(lm, gates):
        lm.logits(ids.expand(4, -1), write)
    last = resid[N_LAYERS - 1] - resid[N_LAYERS - 1][:1]
    assert float(last[1].abs().max()) > 0.1
    torch.testing.assert_close(2 * last[1] - 3 * last[2], last[3], rtol=1e-10, atol=1e-10)


def test_several_contexts_have_gates_of_their_own(lm: LanguageModel) -> None:
    ids = tokens(3)
    with frozen.recording(lm) as gates:
        recorded = lm.logits(ids)
    with frozen.held(lm, gates):
        torch.testing.assert_close(lm.logits(ids), recorded, rtol=1e-11, atol=1e-11)


def test_attention_and_norms_can_be_held_apart(lm: LanguageModel) -> None:
    ids, other = tokens(), tokens().roll(1, dims=1)
    gates = frozen.record(lm, ids)
    found = []
    for attention in (False, True):
        for norms in (False, True):
            with frozen.held(lm, gates, attention, norms):
                found.append(lm.logits(other))
    torch.testing.assert_close(found[0], lm.logits(other), rtol=1e-5, atol=1e-5)
    for i, one in enumerate(found):
        for two in found[i + 1 :]:
            assert float((one - two).abs().max()) > 1e-3


def test_gradients_pass_and_queries_and_keys_have_none(lm: LanguageModel) -> None:
    ids = tokens()
    gates = frozen.record(lm, ids)
    lm.weights.requires_grad_(True)
    with frozen.held(lm, gates):
        lm.weights(ids, use_cache=False).logits.square().sum().backward()
    names = [name for name, p in lm.weights.named_parameters() if ".q_proj." in name or ".k_proj." in name]
    assert all(p.grad is None for name, p in lm.weights.named_parameters() if name in names)
    embedding = lm.weights.get_input_embeddings().weight
    assert embedding.grad is not None
    assert float(embedding.grad.abs().max()) > 0
    lm.weights.requires_grad_(False)
    lm.weights.zero_grad()


def test_a_norm_of_another_form_is_refused(lm: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    _, module = next(frozen.norms_of(lm))
    monkeypatch.setattr(module, "forward", torch.tanh)
    with pytest.raises(UserError, match="no plain LayerNorm"):
        frozen.record(lm, tokens())


def test_grouped_values_serve_their_heads() -> None:
    generator = torch.Generator().manual_seed(0)
    pattern = torch.rand(1, 6, 4, 4, generator=generator)
    value = torch.randn(5, 3, 4, 2, generator=generator)
    expected = torch.einsum("hts,nhsd->nthd", pattern[0], value.repeat_interleave(2, dim=1))
    torch.testing.assert_close(frozen.mixed(pattern, value), expected)
    torch.testing.assert_close(frozen.mixed(pattern.expand(5, -1, -1, -1), value), expected)
