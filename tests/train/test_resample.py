"""Dead features that begin again: where, with what, and nothing else changes."""

import pytest
import torch
from torch import Tensor

from pipeline.arch.base import Transcoder
from pipeline.arch.table import ARCHS
from pipeline.core.activations import ACTIVATIONS
from pipeline.core.options import LossOptions
from pipeline.errors import UserError
from pipeline.train import resample as module
from pipeline.train.objective import Objective
from pipeline.train.resample import resample
from tests import oracle

B, L, F, D = 40, 3, 11, 6


def dead() -> Tensor:
    """Three of layer 0, none of layer 1, all of layer 2."""
    which = torch.zeros(L, F, dtype=torch.bool)
    which[0, [1, 4, 9]] = True
    which[2] = True
    return which


def trained(activation: str) -> tuple[Transcoder, torch.optim.Optimizer, Tensor, Tensor]:
    """A model after a step, so that there are moments; x and the error."""
    model = oracle.transcoder("clt", activation)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    x, y = oracle.normal(B, L, D) + 1.0, oracle.normal(B, L, D, seed=2)
    y[5] *= 100  # reconstructed far worse than the others
    model(x).y_hat.sub(y).square().sum().backward()
    if activation == "jumprelu" and model.activation.log_threshold.grad is not None:
        model.activation.log_threshold.grad += 1
    optimizer.step()
    return model, optimizer, x, (y - model(x).y_hat).detach()


def generator(seed: int = 7) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_only_dead_features_change_and_so_do_their_moments(activation: str) -> None:
    model, optimizer, x, error = trained(activation)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    restarted = resample(model, optimizer, x, error, dead(), generator())
    assert torch.equal(restarted, dead())
    for name, parameter in model.named_parameters():
        kind, _, layer = name.split(".")[0], *name.split(".")[-1:], name.split(".")[1] if "." in name else ""
        if kind in {"b_dec", "activation"}:
            assert torch.equal(parameter, before[name]), name
        if kind == "b_dec":
            continue
        rows = dead() if kind in {"b_enc", "activation"} else dead()[int(layer)]
        assert torch.equal(parameter[~rows], before[name][~rows]), name
        for moment in ("exp_avg", "exp_avg_sq"):
            values = optimizer.state[parameter][moment]
            assert not values[rows].any(), name
            assert values[~rows].any() or rows.all(), name
        if kind in {"encoders", "decoders"}:
            assert (parameter[rows] != before[name][rows]).all(), name


@pytest.mark.parametrize("activation", ["jumprelu", "relu", "topk"])
def test_a_restarted_feature_looks_for_its_token_and_writes_a_share_of_its_error(activation: str) -> None:
    model, optimizer, x, error = trained(activation)
    alive = model.encoders[0][~dead()[0]].norm(dim=1).mean()
    resample(model, optimizer, x, error, dead(), generator())
    centred = x - x.mean(dim=0)
    for i in (1, 4, 9):
        row = model.encoders[0][i]
        assert float(row.detach().norm()) == pytest.approx(float(alive.detach()))
        cosines = torch.nn.functional.cosine_similarity(centred[:, 0], row.detach()[None], dim=1)
        token = int(cosines.argmax())
        assert float(cosines[token]) == pytest.approx(1.0)
        h = float((x[token, 0] @ row + model.b_enc[0, i]).detach())
        theta = float(model.activation.threshold[0, i].detach()) if activation == "jumprelu" else 0.0
        assert h > theta
        for target, weight in zip(range(L), model.tables(0), strict=True):
            torch.testing.assert_close(weight[i].detach() * h, module.SHARE * error[token, target])


def test_a_badly_reconstructed_token_is_all_but_sure_to_be_drawn_and_none_twice_in_a_layer() -> None:
    model, optimizer, x, error = trained("topk")
    resample(model, optimizer, x, error, dead(), generator())
    centred = x - x.mean(dim=0)
    for l in (0, 2):
        ids = dead()[l].nonzero().squeeze(1)
        cosines = (
            torch.nn.functional.normalize(centred[:, l], dim=1)
            @ torch.nn.functional.normalize(model.encoders[l][ids].detach(), dim=1).T
        )
        drawn = cosines.argmax(dim=0).tolist()
        assert 5 in drawn
        assert len(set(drawn)) == len(drawn)


def test_the_draw_is_a_function_of_its_seed() -> None:
    results = []
    for seed in (1, 1, 2):
        model, optimizer, x, error = trained("batchtopk")
        resample(model, optimizer, x, error, dead(), generator(seed))
        results.append(model.W_enc.detach())
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_a_batch_of_fewer_tokens_than_dead_features_restarts_as_many_as_it_can() -> None:
    model, optimizer, x, error = trained("topk")
    everything = torch.ones(L, F, dtype=torch.bool)
    restarted = resample(model, optimizer, x[:4], error[:4], everything, generator())
    assert restarted.sum(dim=1).tolist() == [4, 4, 4]
    perfect = resample(model, optimizer, x, torch.zeros_like(error), everything, generator())
    assert not perfect.any()


@pytest.mark.parametrize("activation", ["jumprelu", "relu"])
def test_without_a_choosing_rule_a_restarted_feature_fires_on_few_tokens(
    activation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "FIRING", 1)
    model, optimizer, x, error = trained(activation)
    resample(model, optimizer, x, error, dead(), generator())
    fires = (model.activation(model.encode(x)) > 0).sum(dim=0)[dead()]
    assert (fires >= 1).all()
    assert float(fires.double().mean()) < 0.3 * B


@pytest.mark.parametrize("architecture", sorted(ARCHS))
def test_every_architecture_resamples_or_is_refused_in_a_line(architecture: str) -> None:
    model = oracle.transcoder(architecture, "relu")
    options = LossOptions("mse", resample_every="1k")
    if architecture in {"tied", "molt", "crosscoder"}:
        with pytest.raises(UserError, match=f"loss.resample_every needs .* arch={architecture} has not; leave it out"):
            Objective(options, model, 1.0, 10)
        return
    Objective(options, model, 1.0, 10)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    x, y = oracle.normal(B, L, D), oracle.normal(B, L, D, seed=2)
    error = (y - model(x).y_hat).detach()
    assert torch.equal(resample(model, optimizer, x, error, dead(), generator()), dead())
