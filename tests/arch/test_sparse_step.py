"""Training's sparse step of the gates: the gradients of the dense one, whatever form each layer takes."""

import copy
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pipeline.arch import sparse_step
from pipeline.arch.base import Output, Transcoder
from pipeline.arch.matryoshka import Matryoshka
from pipeline.core import activations, deferred, density, products
from pipeline.core.density import Limits
from pipeline.core.gates import Gate
from pipeline.core.options import (
    ActivationOptions,
    Kernels,
    LossOptions,
    PreActForm,
    Ramp,
    Schedules,
    SparsityForm,
    ThetaGrad,
)
from pipeline.core.sparse import Pattern, Sparse
from pipeline.train import checkpoint, precision
from pipeline.train.checkpoint import State
from pipeline.train.micro import active, fired
from pipeline.train.objective import Objective
from pipeline.train.options import Precision, SparseStep
from tests import oracle
from tests.arch.test_contract import VARIANTS, n_sources

B, L, F, D = 5, 3, 11, 6
CONSTANT = Schedules(sparsity=Ramp(), l0=Ramp())
TANH = LossOptions("tanh", sparsity=0.3, schedule=CONSTANT)
LOSSES = {
    "mse": LossOptions("mse"),
    "tanh": replace(TANH, sparsity_c=4.0, aux_k=1 / 32),
    "l1": replace(TANH, sparsity_form=SparsityForm.l1),
    "l0": LossOptions("l0", l0=20.0, target_l0=7.0, schedule=CONSTANT),
    "pre_act": replace(TANH, pre_act=0.2),
    "january": replace(TANH, pre_act=0.2, pre_act_form=PreActForm.january),
}
FORMS = {
    "all sparse": Limits(3.0, 3.0),
    "mixed": Limits(0.4, 0.5),
    "all dense": Limits(-1.0, -1.0),
    "as it was": Limits(-1.0, 3.0),
}


def jumprelu(bandwidth: float = 0.5, rule: ThetaGrad = ThetaGrad.anthropic) -> ActivationOptions:
    return ActivationOptions("jumprelu", threshold=0.3, bandwidth=bandwidth, theta_grad=rule)


def gated(architecture: str, options: ActivationOptions, dtype: torch.dtype = torch.float64) -> Transcoder:
    """Few features are active in layers 0 and 2, all in layer 1."""
    rule = activations.build(options, n_sources(architecture), F)
    model = oracle.transcoder(VARIANTS[architecture], rule, dtype=dtype).train()
    with torch.no_grad():
        model.b_enc -= 1.0
        model.b_enc[1:2] += 30.0
    return model


def data(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    return oracle.normal(B, L, D, seed=5, dtype=dtype), oracle.normal(B, L, D, seed=6, dtype=dtype)


def stepped(
    model: Transcoder, loss: LossOptions, x: Tensor, y: Tensor, sparse: SparseStep
) -> tuple[Output, dict[str, Tensor], dict[str, Tensor]]:
    """The output, the terms and the gradient of their sum."""
    objective = Objective(loss, model, 7.25, 8, sparse=sparse)
    dead = torch.zeros(model.n_sources, F, dtype=torch.bool)
    dead[0, 3:6] = True
    out = objective.forward(model, x, 4)
    terms = objective(model, out, x, y, dead, 4)
    torch.stack(list(terms.values())).sum().backward()
    return out, terms, {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}


def assert_equals_dense(
    model: Transcoder, loss: LossOptions, dtype: torch.dtype = torch.float64, tolerance: float = 1e-12
) -> Output:
    """The sparse step of `model` against the dense one in float64."""
    x, y = data(dtype)
    slow = copy.deepcopy(model).double()
    out, terms, grads = stepped(model, loss, x, y, SparseStep.auto)
    reference, slow_terms, slow_grads = stepped(slow, loss, x.double(), y.double(), SparseStep.never)
    assert isinstance(out.features, Sparse)
    assert isinstance(reference.features, Tensor)
    assert torch.equal(out.features.dense() > 0, reference.features > 0)
    assert oracle.normwise(out.features.dense(), reference.features) < tolerance
    assert oracle.normwise(out.y_hat, reference.y_hat) < tolerance
    assert active(out) == active(reference) > 0
    assert torch.equal(fired(out), fired(reference))
    assert list(terms) == list(slow_terms)
    for name, term in terms.items():
        assert oracle.normwise(term, slow_terms[name]) < tolerance, name
    for name, grad in grads.items():
        assert oracle.normwise(grad, slow_grads[name]) < tolerance, name
    assert grads["b_enc"].any()
    return out


def under(monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    monkeypatch.setattr(density, "limits", lambda like: FORMS[form])


@pytest.mark.parametrize("form", ["all sparse", "mixed", "all dense"])
@pytest.mark.parametrize(
    "options", [ActivationOptions("relu"), jumprelu(), jumprelu(4.0)], ids=["relu", "jumprelu", "wide"]
)
@pytest.mark.parametrize("architecture", sorted(VARIANTS))
def test_every_architecture_steps_as_its_dense_form(
    monkeypatch: pytest.MonkeyPatch, architecture: str, options: ActivationOptions, form: str
) -> None:
    under(monkeypatch, form)
    model = gated(architecture, options)
    assert_equals_dense(model, LOSSES["tanh"])
    assert isinstance(model.activation, Gate)
    expected = {"all sparse": [2, 2, 2], "mixed": [2, 0, 2], "all dense": [0, 0, 0]}[form]
    if form == "mixed" and isinstance(options.bandwidth, float) and options.bandwidth > 1:
        nests = isinstance(model, Matryoshka) and model.nests
        expected = [1, 0, 1] if model.directions and not nests else [0, 0, 0]
    if model.n_sources == L:
        assert model.activation.form.tolist() == expected


@pytest.mark.parametrize("form", ["all sparse", "mixed"])
@pytest.mark.parametrize("loss", list(LOSSES))
@pytest.mark.parametrize("rule", list(ThetaGrad))
@pytest.mark.parametrize("bandwidth", [0.5, 4.0])
def test_thresholds_learn_in_the_sparse_step_as_in_the_dense_one(
    monkeypatch: pytest.MonkeyPatch, bandwidth: float, rule: ThetaGrad, loss: str, form: str
) -> None:
    under(monkeypatch, form)
    model = gated("clt", jumprelu(bandwidth, rule))
    out = assert_equals_dense(model, LOSSES[loss])
    grad = model.get_parameter("activation.log_threshold").grad
    assert grad is not None
    assert all(grad[layer].any() for layer in (0, 2))
    assert isinstance(out.features, Sparse)
    for layer, beyond in enumerate(out.beyond):
        if isinstance(beyond, Pattern):
            # Pairs in the window that are not active write nothing, and are in a list of their own.
            assert layer == 1 or bandwidth == 0.5 or beyond.indices.numel() > 0
            assert (out.features.values[layer] > 0).all()
    assert isinstance(out.beyond[0], Tensor if (bandwidth, form) == (4.0, "mixed") else Pattern)


@pytest.mark.parametrize("loss", ["mse", "tanh", "pre_act", "l1"])
@pytest.mark.parametrize("options", [ActivationOptions("relu"), jumprelu(), jumprelu(4.0)])
def test_the_sparse_step_keeps_float32s_accuracy(
    monkeypatch: pytest.MonkeyPatch, options: ActivationOptions, loss: str
) -> None:
    under(monkeypatch, "mixed")
    assert_equals_dense(gated("clt", options, torch.float32), LOSSES[loss], torch.float32, 1e-6)


@pytest.mark.parametrize("form", ["all sparse", "mixed", "all dense"])
@pytest.mark.parametrize("options", [ActivationOptions("relu"), jumprelu(), jumprelu(4.0)], ids=["relu", "", "wide"])
def test_tables_of_bfloat16_take_every_form(
    monkeypatch: pytest.MonkeyPatch, options: ActivationOptions, form: str
) -> None:
    under(monkeypatch, form)
    model, (x, y) = gated("clt", options, torch.float32), data(torch.float32)
    precision.store(model, Precision.bfloat16)
    slow = copy.deepcopy(model)
    x = x.bfloat16()
    out, _, grads = stepped(model, LOSSES["l1"], x, y, SparseStep.auto)
    expected = stepped(slow, LOSSES["l1"], x, y, SparseStep.never)[2]
    assert out.y_hat.dtype == torch.float32
    for name, parameter in model.named_parameters():
        assert grads[name].dtype == parameter.dtype
        assert oracle.normwise(grads[name], expected[name]) < 2e-2, name


@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
@pytest.mark.parametrize("options", [ActivationOptions("relu"), jumprelu(), jumprelu(4.0)], ids=["relu", "", "wide"])
def test_compiled_kernels_and_gradients_kept_as_terms_keep_it_too(
    monkeypatch: pytest.MonkeyPatch, options: ActivationOptions
) -> None:
    under(monkeypatch, "mixed")
    model, (x, y) = gated("clt", options, torch.float32), data(torch.float32)
    slow = copy.deepcopy(model).double()
    tables = [parameter for parameter in model.parameters() if parameter.dim() == 2]
    for table in tables:
        deferred.want(table)
    with products.using(Kernels.compiled, torch.device("cpu")):
        stepped(model, LOSSES["tanh"], x, y, SparseStep.auto)
        # Layer 1 is dense; AuxK's features are of layer 0.
        assert all(table.grad is None for table in model.tables(2))
        for table in tables:
            deferred.materialise(table)
    expected = stepped(slow, LOSSES["tanh"], x.double(), y.double(), SparseStep.never)[2]
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        assert oracle.normwise(parameter.grad, expected[name]) < 1e-6, name


@pytest.mark.parametrize("activation", ["topk", "groupmax", "batchtopk", "batchtopk_across"])
def test_a_penalty_on_pre_activations_leaves_the_topk_family_sparse(activation: str) -> None:
    model, x = oracle.transcoder("clt", activation).train(), data()[0]
    out = assert_equals_dense(model, LOSSES["pre_act"])
    assert isinstance(out.pre_acts, tuple)
    assert torch.equal(torch.stack(out.pre_acts, dim=1), model.encode(x))


def test_pre_activations_are_kept_only_for_a_loss_that_reads_them(monkeypatch: pytest.MonkeyPatch) -> None:
    under(monkeypatch, "all sparse")
    saved: list[torch.Size] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor.shape)
        return tensor

    for loss, kept in ((LOSSES["tanh"], 0), (LOSSES["pre_act"], L)):
        saved.clear()
        model, (x, y) = gated("clt", jumprelu()), data()
        with torch.no_grad():
            model.b_enc[1] -= 30.0
        objective = Objective(loss, model, 7.25, 8)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            out = objective.forward(model, x, 4)
            objective(model, out, x, y, torch.zeros(L, F, dtype=torch.bool), 4)
        assert saved.count(torch.Size([B, F])) == kept
        assert (out.pre_acts is None) == (kept == 0)


def test_the_pairs_are_those_that_are_active_or_in_the_window() -> None:
    for options in (ActivationOptions("relu"), jumprelu(0.5)):
        rule, h = gated("clt", options).activation, oracle.normal(B, F, seed=8)
        assert isinstance(rule, Gate)
        theta = rule.threshold[0].detach() if isinstance(rule, activations.JumpReLU) else torch.zeros(F)
        window = 0.25 if isinstance(rule, activations.JumpReLU) else 0.0
        active = h > theta
        expected = active | ((h - theta).abs() < window)
        assert 0 < int(active.sum()) < B * F
        together, values, none = rule.pairs(h, 0, density.ALWAYS, wide=False)
        assert together is not None
        assert values is not None
        assert none is None
        assert pairs(together) == where(expected)
        assert torch.equal(values, h[together.tokens, together.indices])
        pattern, values, beyond = rule.pairs(h, 0, density.ALWAYS, wide=True)
        assert pattern is not None
        assert pairs(pattern) == where(active)
        assert isinstance(values, Tensor)
        assert torch.equal(values, h[pattern.tokens, pattern.indices])
        assert (pairs(beyond) if isinstance(beyond, Pattern) else set()) == where(expected & ~active)
        assert bool(where(expected & ~active)) == (window > 0)


def where(mask: Tensor) -> set[tuple[int, int]]:
    return {(b, i) for b, i in mask.nonzero().tolist()}


def pairs(pattern: Pattern) -> set[tuple[int, int]]:
    return set(zip(pattern.tokens.tolist(), pattern.indices.tolist(), strict=True))


def test_a_pair_at_the_edge_of_the_window_is_never_lost_to_rounding() -> None:
    for bandwidth in (0.1, 0.3, 1.0):
        rule = gated("clt", jumprelu(bandwidth), torch.float32).activation
        assert isinstance(rule, activations.JumpReLU)
        theta = rule.threshold[0].detach()
        edge = theta - bandwidth / 2
        h = torch.stack([edge + step * torch.finfo(torch.float32).eps * theta for step in range(-8, 9)])
        pattern, *_ = rule.pairs(h, 0, density.ALWAYS, wide=False)
        assert pattern is not None
        inside = ((h - theta).abs() < bandwidth / 2).nonzero().tolist()
        assert {tuple(pair) for pair in inside} <= pairs(pattern)


def test_a_layer_changes_its_form_with_hysteresis() -> None:
    rule, limits = activations.build(ActivationOptions("relu"), 2, 50).train(), Limits(0.12, 0.16)
    assert isinstance(rule, Gate)

    def sparse_at(share: float) -> bool:
        h = torch.full((100,), -1.0)
        h[: round(100 * share)] = 1.0
        pattern, *_ = rule.pairs(h.view(2, 50), 1, limits, wide=True)
        assert pattern is None or pattern.indices.numel() == round(100 * share)
        return pattern is not None

    assert [sparse_at(share) for share in (0.05, 0.14, 0.16, 0.17, 0.14, 0.13, 0.12, 0.14)] == [
        *[True] * 3,
        *[False] * 3,
        *[True] * 2,
    ]
    rule.eval()
    assert not sparse_at(0.5)
    assert rule.form.tolist() == [2, 2]  # an evaluation changes nothing
    rule.train()
    assert not sparse_at(0.5)
    assert rule.form.tolist() == [2, 0]  # each layer for itself


def test_a_resumed_run_goes_on_in_the_forms_it_had(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # Between these limits every layer keeps the form that it has.
    under(monkeypatch, "as it was")

    def run(seed: int) -> tuple[Transcoder, torch.optim.Optimizer]:
        model = gated("clt", jumprelu(), torch.float32)
        with torch.no_grad():
            model.b_enc += seed
        return model, torch.optim.Adam(model.parameters(), lr=0.01)

    def train(model: Transcoder, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        stepped(model, LOSSES["tanh"], *data(torch.float32), SparseStep.auto)
        optimizer.step()

    (model, optimizer), other = run(0), run(1)
    assert isinstance(model.activation, Gate)
    model.activation.form[:] = torch.tensor([0, 2, 0])
    train(model, optimizer)
    path = checkpoint.save(tmp_path, model, optimizer, State(1, torch.zeros(L, F, dtype=torch.int64)), {})
    train(model, optimizer)
    assert model.activation.form.tolist() == [0, 2, 0]
    checkpoint.load(path, *other)
    train(*other)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, other[0].state_dict()[name]), name


def test_the_setting_decides_the_form() -> None:
    (x, _), options = data(), ActivationOptions("relu")
    for sparse, form in ((SparseStep.never, None), (SparseStep.always, [True] * L)):
        model = gated("clt", options)
        out = Objective(LossOptions("mse"), model, 7.25, 8, sparse=sparse).forward(model, x, 0)
        if form is None:
            assert isinstance(out.features, Tensor)
        else:
            assert isinstance(out.features, Sparse)
            assert [pattern is not None for pattern in out.features.patterns] == form


def test_limits_are_lower_where_dense_products_are_fast() -> None:
    assert density.limits(torch.zeros(1)) == density.limits(torch.zeros(1, dtype=torch.float64)) == density.FLOAT32
    assert density.limits(torch.zeros(1, dtype=torch.bfloat16)) == density.FAST
    assert density.limits(torch.zeros(1, device="meta")) == density.FAST


@pytest.mark.parametrize("options", [ActivationOptions("relu"), jumprelu()], ids=["relu", "jumprelu"])
def test_no_feature_at_all_is_a_step_too(options: ActivationOptions) -> None:
    model, (x, y) = gated("clt", options), data()
    with torch.no_grad():
        model.b_enc.fill_(-100.0)
    out, terms, grads = stepped(model, LOSSES["l1"], x, y, SparseStep.auto)
    assert torch.equal(out.y_hat, model.b_dec.expand(B, L, D))
    assert not terms["sparsity"].detach()
    assert not any(grad.any() for name, grad in grads.items() if name != "b_dec" and "encoders.0" not in name)


def test_the_limits_leave_evaluation_as_it_is() -> None:
    model, x = gated("clt", ActivationOptions("relu")).eval(), data()[0]
    dense = model(x)
    assert isinstance(dense.pre_acts, Tensor)
    assert oracle.normwise(sparse_step.forward(model, x, density.ALWAYS).y_hat, dense.y_hat) < 1e-12
