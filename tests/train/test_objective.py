"""The training loss as a whole: its terms, their gradients, and who gets none."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from pipeline.arch.base import Output, Transcoder
from pipeline.core import activations
from pipeline.core.activations import ACTIVATIONS
from pipeline.core.options import LayerWeighting, LossOptions, PreActForm, Ramp, Schedules, Shape, SparsityForm
from pipeline.core.sparse import Sparse
from pipeline.errors import UserError
from pipeline.train.objective import Objective, explain_error
from tests import oracle

B, L, F, D = 5, 3, 11, 6
V = 7.25
N_STEPS = 8
CHOOSING = sorted(oracle.SELECTIONS)
FULL = LossOptions("all", sparsity=0.3, sparsity_c=4.0, pre_act=0.2, aux_k=1 / 32)
CONSTANT = Schedules(sparsity=Ramp(), l0=Ramp())
MULTIPLES = ["batchtopk", "batchtopk_across", "topk"]
LAYER_VARIANCE = torch.tensor([0.5, 2.0, 4.75], dtype=torch.float64)


def data(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    return oracle.normal(B, L, D, seed=5, dtype=dtype), oracle.normal(B, L, D, seed=6, dtype=dtype)


def nothing_dead() -> Tensor:
    return torch.zeros(L, F, dtype=torch.bool)


def some_dead() -> Tensor:
    """Five of layer 0 (more than d/2), none of layer 1, one of layer 2."""
    dead = nothing_dead()
    dead[0, [0, 2, 5, 7, 9]] = True
    dead[2, 6] = True
    return dead


def terms(
    model: Transcoder, options: LossOptions, x: Tensor, y: Tensor, dead: Tensor, step: int = 4
) -> tuple[dict[str, Tensor], Output]:
    objective = Objective(options, model, V, N_STEPS, LAYER_VARIANCE)
    out: Output = model(x, objective.needs_pre_acts)
    return objective(model, out, x, y, dead, step), out


def total(values: dict[str, Tensor]) -> Tensor:
    return torch.stack(list(values.values())).sum()


def gradients(model: Transcoder, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    loss.backward(retain_graph=True)
    return {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}


def dense(out: Output) -> Tensor:
    return out.features.dense() if isinstance(out.features, Sparse) else out.features


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_each_term_is_its_sum_with_the_coefficient_inside(activation: str) -> None:
    model, (x, y) = oracle.transcoder("clt", activation), data()
    got, out = terms(model, FULL, x, y, some_dead())
    assert list(got) == ["reconstruction", "sparsity", "pre_act", "aux_k"]
    h = oracle.encode(x, model.W_enc, model.b_enc).detach()
    a, W_dec = dense(out).detach(), [W.detach() for W in model.W_dec]
    y_hat = oracle.decode(a, W_dec, model.b_dec.detach())
    norms = oracle.decoder_norms(W_dec)
    e_hat = oracle.error_from_dead(h, W_dec, some_dead())
    expected = {
        "reconstruction": oracle.reconstruction(y_hat, y),
        "sparsity": 0.3 * 4 / 8 * oracle.tanh_sparsity(a, norms, 4.0),  # step 4 of 8: half of lambda
        "pre_act": 0.2 * oracle.pre_activation(h),
        "aux_k": oracle.aux_k(y - y_hat, e_hat, 6, V) / 32,
    }
    for name, value in expected.items():
        torch.testing.assert_close(got[name].detach(), value, rtol=1e-12, atol=0, msg=name)


def test_the_january_penalty_reads_thresholds_and_decoder_norms() -> None:
    model, (x, y) = oracle.transcoder("clt", "jumprelu"), data()
    options = LossOptions("january", pre_act=3e-6, pre_act_form=PreActForm.january)
    got, _ = terms(model, options, x, y, nothing_dead())
    h = oracle.encode(x, model.W_enc, model.b_enc).detach()
    theta, norms = model.activation.log_threshold.exp().detach(), oracle.decoder_norms(model.W_dec).detach()
    expected = 3e-6 * oracle.pre_activation_january(h, theta, norms)
    torch.testing.assert_close(got["pre_act"].detach(), expected, rtol=1e-12, atol=0)
    grads = gradients(model, got["pre_act"])
    assert grads["activation.log_threshold"].any()
    assert grads["decoders.0.2"].any()


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_the_l1_form_of_the_sparsity_penalty(activation: str) -> None:
    model, (x, y) = oracle.transcoder("clt", activation), data()
    got, out = terms(model, LossOptions("l1", sparsity=0.3, sparsity_form=SparsityForm.l1), x, y, nothing_dead())
    expected = 0.15 * oracle.l1_sparsity(dense(out), oracle.decoder_norms(model.W_dec)).detach()
    torch.testing.assert_close(got["sparsity"].detach(), expected, rtol=1e-12, atol=0)


def test_the_l0_term_reads_thresholds_and_its_target() -> None:
    model, (x, y) = oracle.transcoder("clt", "jumprelu"), data()
    options = LossOptions("l0", l0=20.0, target_l0=7.0, schedule=CONSTANT)
    got, _ = terms(model, options, x, y, nothing_dead())
    h = oracle.encode(x, model.W_enc, model.b_enc).detach()
    theta = model.activation.log_threshold.exp().detach()
    value, slope = oracle.l0_target(h, theta, 1.0, 7.0)
    assert float(got["l0"].detach()) == pytest.approx(20 * value, rel=1e-12)
    grads = gradients(model, got["l0"])
    assert oracle.normwise(grads["activation.log_threshold"], 20 * slope) < 1e-12
    assert {name for name, grad in grads.items() if grad.any()} == {"activation.log_threshold"}
    assert float(terms(model, replace(options, schedule=Schedules()), x, y, nothing_dead(), 2)[0]["l0"].detach()) == (
        pytest.approx(20 * value / 4)
    )


@pytest.mark.parametrize("activation", MULTIPLES)
def test_multi_topk_is_the_reconstruction_from_four_times_as_many_features(activation: str) -> None:
    model, (x, y) = oracle.transcoder("clt", activation), data()
    got, out = terms(model, LossOptions("multi", multi_topk=1 / 8), x, y, nothing_dead())
    h = oracle.encode(x, model.W_enc, model.b_enc).detach()
    W_enc, b_enc, b_dec = (t.detach().requires_grad_() for t in (model.W_enc, model.b_enc, model.b_dec))
    W_dec = [W.detach().requires_grad_() for W in model.W_dec]
    wide = oracle.at_pairs(oracle.encode(x, W_enc, b_enc), oracle.SELECTIONS[activation](h, 8))
    expected = oracle.reconstruction(oracle.decode(wide, W_dec, b_dec), y) / 8
    torch.testing.assert_close(got["multi_topk"], expected, rtol=1e-12, atol=0)
    grads = gradients(model, got["multi_topk"])
    d_enc, d_b_enc, d_b_dec, *d_dec = torch.autograd.grad(expected, [W_enc, b_enc, b_dec, *W_dec])
    assert oracle.normwise(torch.stack([grads[f"encoders.{l}"] for l in range(L)]), d_enc) < 1e-12
    assert oracle.normwise(grads["b_enc"], d_b_enc) < 1e-12
    assert oracle.normwise(grads["b_dec"], d_b_dec) < 1e-12
    for l in range(L):
        assert oracle.normwise(torch.stack([grads[f"decoders.{l}.{j}"] for j in range(L - l)], 1), d_dec[l]) < 1e-12
    assert {tuple(pair) for pair in dense(out).nonzero().tolist()} == oracle.SELECTIONS[activation](h, 2)


@pytest.mark.parametrize("activation", MULTIPLES)
def test_multi_topk_follows_a_falling_k_and_stops_at_all_features(activation: str) -> None:
    rule = replace(oracle.activation_options(activation), k_start=10, k_anneal=1.0)
    model, (x, y) = oracle.transcoder("clt", activations.build(rule, L, F)), data()
    h = oracle.encode(x, model.W_enc, model.b_enc)
    for done, k in ((1.0, 8), (0.0, F)):  # 4 x 2, and 4 x 10 of 11
        model.activation.at(done)
        got, _ = terms(model, LossOptions("multi", multi_topk=1.0), x, y, nothing_dead())
        wide = oracle.at_pairs(h, oracle.SELECTIONS[activation](h, k))
        expected = oracle.reconstruction(oracle.decode(wide, model.W_dec, model.b_dec), y)
        torch.testing.assert_close(got["multi_topk"], expected, rtol=1e-12, atol=0)


def test_layers_are_weighted_as_given_or_by_the_inverse_of_their_variance() -> None:
    model, (x, y) = oracle.transcoder(), data()
    mean = float(LAYER_VARIANCE.mean())
    cases = [
        (LossOptions("mse", layer_weights=[0.5, 0.0, 3.0]), [0.5, 0.0, 3.0]),
        (
            LossOptions("mse", layer_weighting=LayerWeighting.inverse_variance),
            [mean / variance for variance in LAYER_VARIANCE.tolist()],
        ),
    ]
    for options, weights in cases:
        got, out = terms(model, options, x, y, nothing_dead())
        expected = oracle.weighted_reconstruction(out.y_hat, y, weights)
        torch.testing.assert_close(got["reconstruction"], expected, rtol=1e-12, atol=0)
        options = replace(options, multi_topk=1.0)
        got, _ = terms(model, options, x, y, nothing_dead())
        assert float(got["multi_topk"].detach()) < 3 * float(got["reconstruction"].detach())
    # Predicting the means costs V either way.
    weights = torch.tensor(cases[1][1], dtype=torch.float64)
    assert float((weights * LAYER_VARIANCE).sum()) == pytest.approx(float(LAYER_VARIANCE.sum()))


@pytest.mark.parametrize("term", ["sparsity", "l0", "pre_act", "aux_k", "multi_topk"])
def test_every_coefficient_has_a_schedule_of_its_own(term: str) -> None:
    activation = "topk" if term in {"aux_k", "multi_topk"} else "jumprelu"
    model, (x, y) = oracle.transcoder("clt", activation), data()

    def at(step: int, ramp: Ramp) -> float:
        target = 7.0 if term == "l0" else None
        options = LossOptions("x", target_l0=target, schedule=replace(Schedules(), **{term: ramp}))
        options = replace(options, **{term: 0.5})
        return float(terms(model, options, x, y, some_dead(), step)[0][term].detach())

    full = at(0, Ramp())
    assert full > 0
    assert [at(step, Ramp(Shape.delayed, delay=0.5)) for step in (0, 4)] == [0, 0]
    assert at(6, Ramp(Shape.delayed, delay=0.5)) == pytest.approx(full / 2)
    assert at(2, Ramp(Shape.linear)) == pytest.approx(full / 4)


def test_a_controllers_lambda_takes_the_place_of_the_schedule() -> None:
    model, (x, y) = oracle.transcoder("clt", "relu"), data()
    options = LossOptions("tanh", target_l0=4.0)
    objective = Objective(options, model, V, N_STEPS)
    assert objective.controlled
    assert objective.penalises
    out = model(x)
    got = objective(model, out, x, y, nothing_dead(), 0, math.log(0.02))
    expected = 0.02 * oracle.tanh_sparsity(dense(out), oracle.decoder_norms(model.W_dec), 1.0)
    torch.testing.assert_close(got["sparsity"], expected, rtol=1e-12, atol=0)
    assert not Objective(replace(options, l0=1.0), oracle.transcoder("clt", "jumprelu"), V, N_STEPS).controlled
    assert not Objective(LossOptions("mse"), model, V, N_STEPS).penalises


def test_a_term_without_a_coefficient_is_not_there() -> None:
    model, (x, y) = oracle.transcoder(), data()
    got, out = terms(model, LossOptions("mse"), x, y, some_dead())
    assert list(got) == ["reconstruction"]
    assert out.pre_acts is None


def test_the_sparsity_coefficient_follows_its_schedule() -> None:
    model, (x, y) = oracle.transcoder(), data()

    def at(step: int, shape: Shape) -> float:
        options = LossOptions("tanh", sparsity=0.3, schedule=Schedules(sparsity=Ramp(shape)))
        return float(terms(model, options, x, y, nothing_dead(), step)[0]["sparsity"].detach())

    full = at(0, Shape.constant)
    assert full > 0
    assert at(0, Shape.linear) == 0
    assert at(2, Shape.linear) == pytest.approx(full / 4)
    assert at(6, Shape.linear) == pytest.approx(full * 3 / 4)


def test_only_the_pre_activation_penalty_needs_the_pre_activations() -> None:
    model = oracle.transcoder()
    for options, needs in ((LossOptions("x", sparsity=1, aux_k=1), False), (LossOptions("x", pre_act=1e-9), True)):
        assert Objective(options, model, V, N_STEPS).needs_pre_acts == needs


# Duplicating the batch


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
@pytest.mark.parametrize("form", list(PreActForm))
@pytest.mark.parametrize("pre_act", [0.0, 0.2])
def test_duplicating_the_batch_changes_no_term_and_no_gradient(
    activation: str, form: PreActForm, pre_act: float
) -> None:
    if form == PreActForm.january and activation != "jumprelu":
        form = PreActForm.clt
    model, (x, y) = oracle.transcoder("clt", activation), data()
    options = replace(FULL, pre_act=pre_act, pre_act_form=form)
    once, _ = terms(model, options, x, y, some_dead())
    doubled, _ = terms(model, options, torch.cat([x, x]), torch.cat([y, y]), some_dead())
    for name, value in once.items():
        torch.testing.assert_close(doubled[name], value, rtol=1e-12, atol=0, msg=name)
        before, after = gradients(model, value), gradients(model, doubled[name])
        for parameter, grad in before.items():
            assert oracle.normwise(after[parameter], grad) < 1e-12, (name, parameter)


@pytest.mark.parametrize(
    ("activation", "options"),
    [
        ("relu", LossOptions("l1", sparsity=0.3, sparsity_form=SparsityForm.l1)),
        ("topk", LossOptions("l1", sparsity=0.3, sparsity_form=SparsityForm.l1)),
        ("jumprelu", LossOptions("l0", l0=20.0, target_l0=7.0)),
        *[(name, LossOptions("multi", multi_topk=0.5, layer_weights=[0.5, 2.0, 1.0])) for name in MULTIPLES],
    ],
)
def test_duplicating_the_batch_changes_none_of_the_other_terms(activation: str, options: LossOptions) -> None:
    model, (x, y) = oracle.transcoder("clt", activation), data()
    once, _ = terms(model, options, x, y, nothing_dead())
    doubled, _ = terms(model, options, torch.cat([x, x]), torch.cat([y, y]), nothing_dead())
    assert len(once) == 2
    for name, value in once.items():
        torch.testing.assert_close(doubled[name], value, rtol=1e-12, atol=0, msg=name)
        before, after = gradients(model, value), gradients(model, doubled[name])
        for parameter, grad in before.items():
            assert oracle.normwise(after[parameter], grad) < 1e-12, (name, parameter)


# Sparse and dense agree on the gradient of the whole loss


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
@pytest.mark.parametrize("activation", CHOOSING)
def test_the_sparse_steps_gradient_equals_dense_autograd_at_the_same_selection(
    activation: str, dtype: torch.dtype, tolerance: float
) -> None:
    model, (x, y) = oracle.transcoder("clt", activation, dtype=dtype), data(dtype)
    options = replace(FULL, pre_act=0.0)
    got, out = terms(model, options, x, y, some_dead())
    assert isinstance(out.features, Sparse)
    grads = gradients(model, total(got))

    W_enc, b_enc, b_dec = (t.detach().double().requires_grad_() for t in (model.W_enc, model.b_enc, model.b_dec))
    W_dec = [W.detach().double().requires_grad_() for W in model.W_dec]
    x, y = x.double(), y.double()
    h = oracle.encode(x, W_enc, b_enc)
    chosen = {tuple(pair) for pair in out.features.dense().nonzero().tolist()}
    assert chosen == oracle.SELECTIONS[activation](h.detach(), 2)
    a = oracle.at_pairs(h, chosen)
    y_hat = oracle.decode(a, W_dec, b_dec)
    loss = (
        oracle.reconstruction(y_hat, y)
        + 0.3 * 4 / 8 * oracle.tanh_sparsity(a, oracle.decoder_norms(W_dec), 4.0)
        + oracle.aux_k((y - y_hat).detach(), oracle.error_from_dead(h, W_dec, some_dead()), 6, V) / 32
    )
    # The tanh of a feature that was not chosen has a slope of its own: it is taken at the selection.
    d_enc, d_b_enc, d_b_dec, *d_dec = torch.autograd.grad(loss, [W_enc, b_enc, b_dec, *W_dec], materialize_grads=True)
    assert oracle.normwise(total(got), loss) < tolerance
    assert oracle.normwise(torch.stack([grads[f"encoders.{l}"] for l in range(L)]), d_enc) < tolerance
    assert oracle.normwise(grads["b_enc"], d_b_enc) < tolerance
    assert oracle.normwise(grads["b_dec"], d_b_dec) < tolerance
    for l in range(L):
        ours = torch.stack([grads[f"decoders.{l}.{j}"] for j in range(L - l)], dim=1)
        assert oracle.normwise(ours, d_dec[l]) < tolerance


def test_the_tanh_penalty_pulls_on_decoders_through_their_norm() -> None:
    model, (x, y) = oracle.transcoder("clt", "relu"), data()
    options = LossOptions("tanh", sparsity=0.3, schedule=CONSTANT)
    got, out = terms(model, options, x, y, nothing_dead())
    grads = gradients(model, got["sparsity"])
    norms, a = oracle.decoder_norms(model.W_dec).detach(), dense(out).detach()
    slope = 0.3 * ((1 - torch.tanh(norms * a) ** 2) * a).sum(dim=0) / B  # d penalty / d norm
    for l in range(L):
        for j in range(L - l):
            table = model.W_dec[l][:, j].detach()
            assert oracle.normwise(grads[f"decoders.{l}.{j}"], (slope / norms)[l][:, None] * table) < 1e-12
    assert not grads["b_dec"].any()
    assert grads["encoders.0"].any()


def test_zero_decoders_give_finite_gradients() -> None:
    model, (x, y) = oracle.transcoder("clt", "jumprelu"), data()
    with torch.no_grad():
        for l in range(L):
            for table in model.tables(l):
                table.zero_()
    options = replace(FULL, pre_act_form=PreActForm.january)
    grads = gradients(model, total(terms(model, options, x, y, some_dead())[0]))
    assert all(torch.isfinite(grad).all() for grad in grads.values())


# AuxK


@pytest.mark.parametrize("activation", ["relu", *CHOOSING])
def test_aux_k_teaches_dead_features_and_nothing_else(activation: str) -> None:
    model, (x, y) = oracle.transcoder("clt", activation), data()
    dead = some_dead()
    got, _ = terms(model, LossOptions("auxk", aux_k=1 / 32), x, y, dead)
    grads = gradients(model, got["aux_k"])
    assert not grads["b_dec"].any()
    assert not grads["b_enc"][~dead].any()
    for l in range(L):
        assert not grads[f"encoders.{l}"][~dead[l]].any()
        assert grads[f"encoders.{l}"].any() == dead[l].any()
        for j in range(L - l):  # all targets
            assert not grads[f"decoders.{l}.{j}"][~dead[l]].any()
            assert grads[f"decoders.{l}.{j}"].any() == dead[l].any()


def test_no_gradient_of_aux_k_flows_through_the_error() -> None:
    # Every feature dead: the error depends on all parameters, and still only e_hat's share arrives.
    model, (x, y) = oracle.transcoder("clt", "topk"), data()
    dead = torch.ones(L, F, dtype=torch.bool)
    got, out = terms(model, LossOptions("auxk", aux_k=1 / 32), x, y, dead)
    grads = gradients(model, got["aux_k"])
    W_enc, b_enc = model.W_enc.detach().requires_grad_(), model.b_enc.detach().clone().requires_grad_()
    W_dec = [W.detach().requires_grad_() for W in model.W_dec]
    e_hat = oracle.error_from_dead(oracle.encode(x, W_enc, b_enc), W_dec, dead)
    loss = oracle.aux_k((y - out.y_hat).detach(), e_hat, L * F, V) / 32
    d_enc, d_b_enc, *d_dec = torch.autograd.grad(loss, [W_enc, b_enc, *W_dec])
    assert oracle.normwise(torch.stack([grads[f"encoders.{l}"] for l in range(L)]), d_enc) < 1e-12
    assert oracle.normwise(grads["b_enc"], d_b_enc) < 1e-12
    for l in range(L):
        assert oracle.normwise(torch.stack([grads[f"decoders.{l}.{j}"] for j in range(L - l)], 1), d_dec[l]) < 1e-12


def test_without_dead_features_there_is_no_aux_k_term() -> None:
    model, (x, y) = oracle.transcoder(), data()
    assert list(terms(model, LossOptions("auxk", aux_k=1 / 32), x, y, nothing_dead())[0]) == ["reconstruction"]


@pytest.mark.parametrize("layers", [[0], [1], [2], [0, 1, 2]])
def test_dead_features_explain_the_error_without_a_bias(layers: list[int]) -> None:
    # d/2 = 3 of 11, of 2 and of 1 dead features a layer; a dead feature below 0 stays silent.
    model, (x, _) = oracle.transcoder(), data()
    for ids in (list(range(F)), [3, 8], [6]):
        dead = nothing_dead()
        for l in layers:
            dead[l, ids] = True
        h = oracle.encode(x, model.W_enc, model.b_enc)
        assert oracle.normwise(explain_error(model, x, dead), oracle.error_from_dead(h, model.W_dec, dead)) < 1e-12


def test_silent_dead_features_explain_nothing() -> None:
    model, (x, _) = oracle.transcoder(), data()
    with torch.no_grad():
        model.b_enc.fill_(-100)
    assert not explain_error(model, x, torch.ones(L, F, dtype=torch.bool)).any()


# What is refused


@pytest.mark.parametrize("field", ["sparsity", "l0", "pre_act", "aux_k", "multi_topk", "sparsity_c"])
def test_negative_coefficients_are_refused_by_name(field: str) -> None:
    with pytest.raises(UserError, match=rf"loss\.{field}=-1"):
        Objective(replace(FULL, **{field: -1.0}), oracle.transcoder(), V, N_STEPS)


@pytest.mark.parametrize("activation", [name for name in sorted(ACTIVATIONS) if name != "jumprelu"])
def test_the_january_penalty_without_thresholds_is_refused(activation: str) -> None:
    options = replace(FULL, pre_act_form=PreActForm.january)
    with pytest.raises(UserError, match="jumprelu"):
        Objective(options, oracle.transcoder("clt", activation), V, N_STEPS)
    Objective(replace(options, pre_act=0.0), oracle.transcoder("clt", activation), V, N_STEPS)


SPARSITY = {"sparsity": 0.1}


@pytest.mark.parametrize(
    ("activation", "options", "line"),
    [
        ("topk", {"target_l0": 8.0}, r"target_l0=8.0 has no meaning for activation=topk.*use activation.k"),
        ("batchtopk_across", {"target_l0": 8.0}, r"use activation.k"),
        ("groupmax", {"target_l0": 8.0}, r"use activation.k"),
        ("relu", {"target_l0": 0.0}, r"between 0 and the 33 features"),
        ("relu", {"target_l0": 33.0}, r"between 0 and the 33 features"),
        ("relu", {"l0": 1.0, "target_l0": 8.0}, r"activation=relu has not; use activation=jumprelu"),
        ("jumprelu", {"l0": 1.0}, r"add loss.target_l0="),
        ("jumprelu", {"l0": 1.0, "target_l0": 8.0, **SPARSITY}, r"both act on L0"),
        (
            "relu",
            {"target_l0": 8.0, "schedule": Schedules(sparsity=Ramp(Shape.cosine))},
            r"loss.schedule.sparsity has no meaning",
        ),
        ("relu", {"sparsity_form": SparsityForm.l1, "sparsity_c": 4.0, **SPARSITY}, r"sparsity_c has no meaning"),
        ("relu", {"multi_topk": 0.1}, r"needs a k to multiply.*topk"),
        ("groupmax", {"multi_topk": 0.1}, r"activation=groupmax has not"),
        ("relu", {"layer_weights": [1.0, 2.0]}, r"layer_weights=\[1.0, 2.0\] must be 3 numbers"),
        ("relu", {"layer_weights": [1.0, -2.0, 1.0]}, r"none negative"),
        ("relu", {"layer_weights": [0.0, 0.0, 0.0]}, r"not all 0"),
        (
            "relu",
            {"layer_weights": [1.0, 1.0, 2.0], "layer_weighting": LayerWeighting.inverse_variance},
            r"leave one out",
        ),
        ("relu", {"resample_until": 0.0}, r"resample_until=0.0 is a share"),
        ("relu", {"schedule": Schedules(pre_act=Ramp(Shape.delayed, delay=1.0))}, r"schedule.pre_act.delay=1.0"),
    ],
)
def test_combinations_that_make_no_sense_are_refused_in_a_line(
    activation: str, options: dict[str, object], line: str
) -> None:
    with pytest.raises(UserError, match=line) as refused:
        Objective(LossOptions("x", **options), oracle.transcoder("clt", activation), V, N_STEPS)
    assert "\n" not in str(refused.value)


def test_a_layer_that_never_varies_cannot_be_weighted_by_its_variance() -> None:
    options = LossOptions("x", layer_weighting=LayerWeighting.inverse_variance)
    with pytest.raises(UserError, match="use equal"):
        Objective(options, oracle.transcoder(), V, N_STEPS, torch.tensor([1.0, 0.0, 2.0]))
