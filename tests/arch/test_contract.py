"""What every architecture promises under every activation. A new entry of either table is tested here at once."""

import pytest
import torch
from torch import Tensor

from pipeline.arch.base import Dims, Transcoder
from pipeline.arch.table import ARCHS, build
from pipeline.core.activations import ACTIVATIONS, FixedThreshold
from pipeline.core.normalize import Scaling
from pipeline.core.sparse import Features, Sparse, sparsify
from tests import oracle

B, L, F, D = 5, 3, 11, 6

each_arch = pytest.mark.parametrize("architecture", sorted(ARCHS))
each_activation = pytest.mark.parametrize("activation", [*sorted(ACTIVATIONS), "threshold"])
per_token = pytest.mark.parametrize(
    "activation", [*(name for name in sorted(ACTIVATIONS) if ACTIVATIONS[name].per_token), "threshold"]
)
each_causal_arch = pytest.mark.parametrize("architecture", [name for name in sorted(ARCHS) if ARCHS[name].causal])


def transcoder(architecture: str, activation: str, dtype: torch.dtype = torch.float64) -> Transcoder:
    if activation == "threshold":
        return oracle.transcoder(architecture, FixedThreshold(oracle.normal(L, F, seed=3).abs()), dtype=dtype)
    return oracle.transcoder(architecture, activation, dtype=dtype)


def inputs(dtype: torch.dtype = torch.float64) -> Tensor:
    return oracle.normal(B, L, D, dtype=dtype)


def dense(features: Features) -> Tensor:
    return features.dense() if isinstance(features, Sparse) else features


@each_arch
@each_activation
def test_shapes_are_those_of_the_contract(architecture: str, activation: str) -> None:
    model = transcoder(architecture, activation)
    for need_pre_acts in (False, True):
        out = model(inputs(), need_pre_acts)
        assert dense(out.features).shape == (B, L, F)
        assert out.y_hat.shape == (B, L, D)
        assert (dense(out.features) >= 0).all()
        assert out.pre_acts is not None or (model.activation.chooses and not need_pre_acts)
        if out.pre_acts is not None:
            assert torch.equal(out.pre_acts, model.encode(inputs()))
    assert model.W_enc.shape == (L, F, D)
    assert model.b_enc.shape == (L, F)
    assert model.b_dec.shape == (L, D)
    if model.linear:
        assert [W.shape for W in model.W_dec] == [(F, len(model.targets(l)), D) for l in range(L)]


@each_arch
@each_activation
def test_the_sparse_path_equals_the_dense_one(architecture: str, activation: str) -> None:
    dy, grads, outs = oracle.normal(B, L, D, seed=5), [], []
    for need_pre_acts in (False, True):
        model = transcoder(architecture, activation)
        out = model(inputs(), need_pre_acts)
        (out.y_hat * dy).sum().backward()
        outs.append(out)
        grads.append([torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()])
    assert torch.equal(dense(outs[0].features), dense(outs[1].features))
    assert oracle.normwise(outs[0].y_hat, outs[1].y_hat) < 1e-12
    for sparse_grad, dense_grad in zip(*grads, strict=True):
        assert oracle.normwise(sparse_grad, dense_grad) < 1e-12


@each_arch
@each_activation
def test_every_parameter_learns(architecture: str, activation: str) -> None:
    model = transcoder(architecture, activation)
    model(inputs()).y_hat.square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.any(), name


@each_arch
@per_token
def test_changing_one_token_leaves_the_others_bit_identical(architecture: str, activation: str) -> None:
    model = transcoder(architecture, activation)
    x, others = inputs(), [0, 1, 3, 4]
    changed = x.clone()
    changed[2] = 10 * oracle.normal(L, D, seed=6)
    before, after = model(x), model(changed)
    assert torch.equal(dense(after.features)[others], dense(before.features)[others])
    assert torch.equal(after.y_hat[others], before.y_hat[others])
    assert not torch.equal(after.y_hat[2], before.y_hat[2])


@each_causal_arch
@per_token
def test_a_reconstruction_never_depends_on_later_layers(architecture: str, activation: str) -> None:
    model = transcoder(architecture, activation)
    x = inputs()
    before = model(x)
    for m in range(L - 1):
        changed = x.clone()
        changed[:, m + 1 :] = 10 * oracle.normal(B, L - m - 1, D, seed=7)
        after = model(changed)
        assert torch.equal(dense(after.features)[:, : m + 1], dense(before.features)[:, : m + 1])
        assert torch.equal(after.y_hat[:, : m + 1], before.y_hat[:, : m + 1])
        assert not torch.equal(after.y_hat[:, m + 1], before.y_hat[:, m + 1])


@each_causal_arch
@per_token
def test_one_layer_at_a_time_gives_what_all_at_once_gives(architecture: str, activation: str) -> None:
    model = transcoder(architecture, activation)
    out = model(inputs())
    live = [model.layer_features(inputs()[:, l], l) for l in range(L)]
    for m in range(L):
        pattern, values = live[m]
        assert torch.equal(Sparse([pattern], [values]).dense()[:, 0], dense(out.features)[:, m])
        so_far = Sparse([p for p, _ in live[: m + 1]], [v for _, v in live[: m + 1]])
        assert oracle.normwise(model.decode_layer(so_far, m, inputs()[:, m]), out.y_hat[:, m]) < 1e-12


@each_arch
def test_decoding_takes_either_form_of_features(architecture: str) -> None:
    model, x = transcoder(architecture, "relu"), inputs()
    features = oracle.normal(B, L, F, seed=8).relu()
    features[1] = 0
    features[:, 2] = 0
    assert oracle.normwise(model.decode(sparsify(features), x), model.decode(features, x)) < 1e-12


@each_arch
@each_activation
def test_weights_survive_the_round_trip_through_their_file_form(architecture: str, activation: str) -> None:
    model = transcoder(architecture, activation)
    fresh = build(oracle.arch_options(architecture, F), Dims(L, D), model.activation).double().eval()
    fresh.load_weights(model.weights())
    assert torch.equal(fresh(inputs()).y_hat, model(inputs()).y_hat)
    assert fresh.weights().keys() == model.weights().keys()
    assert all(torch.equal(fresh.weights()[name], weight) for name, weight in model.weights().items())


@each_arch
@each_activation
def test_folding_changes_the_units_and_nothing_else(architecture: str, activation: str) -> None:
    model = transcoder(architecture, activation)
    maps = Scaling(
        oracle.normal(L, D, seed=20),
        torch.tensor([[0.2], [3.0], [9.0]]) * (oracle.normal(L, D, seed=21).abs() + 0.5),
        oracle.normal(L, D, seed=22),
        torch.tensor([[7.0], [0.1], [2.0]]) * (oracle.normal(L, D, seed=23).abs() + 0.5),
    )
    x = inputs() * maps.x_scale + maps.x_mean
    before = model(maps.x(x), need_pre_acts=True)
    threshold = getattr(model.activation, "threshold", None)
    if threshold is not None and threshold.shape == (L, F):
        assert ((before.pre_acts - threshold).abs() > 1e-9).all()
    model.fold(maps)
    after = model(x, need_pre_acts=True)
    assert torch.equal(dense(after.features) > 0, dense(before.features) > 0)
    assert oracle.normwise(dense(after.features), dense(before.features)) < 1e-12
    y_hat = maps.y_inverse(before.y_hat)
    for m in range(L):
        assert oracle.normwise(after.y_hat[:, m], y_hat[:, m]) < 1e-12


@each_arch
def test_any_features_of_a_layer_can_be_written_alone(architecture: str) -> None:
    model, x, ids = transcoder(architecture, "relu"), inputs(), torch.tensor([7, 2, 10])
    features = torch.zeros(B, L, F, dtype=torch.float64)
    z = oracle.normal(B, 3, seed=8)
    features[:, 1, ids] = z
    expected = model.decode(features, x) - model.decode(torch.zeros_like(features), x)
    got = torch.zeros_like(expected)
    for target, part in model.write_rows(z, ids, 1, x[:, 1]):
        got[:, target] += part
    assert expected.any()
    assert oracle.normwise(got, expected) < 1e-12


@each_arch
def test_decoder_norms_and_their_gradient_at_zero(architecture: str) -> None:
    model = transcoder(architecture, "relu")
    if model.linear:
        assert oracle.normwise(model.decoder_norms(), oracle.decoder_norms(model.W_dec)) < 1e-12
    assert model.decoder_norms().shape == (L, F)
    blank = build(oracle.arch_options(architecture, F), Dims(L, D), model.activation)
    norms = blank.decoder_norms()
    assert not norms.any()
    norms.sum().backward()
    for name, parameter in blank.named_parameters():
        assert parameter.grad is None or not parameter.grad.any(), name


@each_arch
@each_activation
def test_the_state_dict_holds_all_there_is(architecture: str, activation: str) -> None:
    model = transcoder(architecture, activation)
    other = transcoder(architecture, activation)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(inputs()).y_hat, model(inputs()).y_hat)
