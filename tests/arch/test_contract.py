"""What every architecture promises under every activation. A new entry of either table is tested here at once."""

import copy

import pytest
import torch
from torch import Tensor

from pipeline.arch.base import Dims, Transcoder
from pipeline.arch.options import ArchOptions, Site, Target, Tie
from pipeline.arch.table import ARCHS, build
from pipeline.core.activations import ACTIVATIONS, FixedThreshold
from pipeline.core.normalize import Scaling
from pipeline.core.sparse import Features, Sparse, sparsify
from tests import oracle

B, L, F, D = 5, 3, 11, 6

VARIANTS: dict[str, ArchOptions] = {
    **{name: oracle.arch_options(name) for name in ARCHS},
    "clt, own layer": oracle.arch_options("clt", max_reach=0),
    "clt, next layer": oracle.arch_options("clt", max_reach=1, skip=True),
    "tied, plain": oracle.arch_options("tied", scale=False),
    "tied, offset, skip": oracle.arch_options("tied", offset=True, skip=True),
    "tied to target": oracle.arch_options("tied", tie=Tie.target),
    "tied to target, offset": oracle.arch_options("tied", tie=Tie.target, scale=False, offset=True),
    "tied to target, plain": oracle.arch_options("tied", tie=Tie.target, scale=False, skip=True),
    "matryoshka, next layer": oracle.arch_options("matryoshka", max_reach=1, prefixes=[3, 11]),
    "molt of one rank": oracle.arch_options("molt", ranks=[4]),
    "crosscoder of mlp_out": oracle.arch_options("crosscoder", target=Target.site, site=Site.mlp_out),
}
"""Every architecture as its YAML has it, and others with its options."""

LINEAR = [name for name, options in VARIANTS.items() if options.name in oracle.SUMS]
ALLOWED = [
    (variant, activation)
    for variant in sorted(VARIANTS)
    for activation in [*sorted(ACTIVATIONS), "threshold"]
    if oracle.allowed(VARIANTS[variant].name, activation)
]

PER_TOKEN = [(v, a) for v, a in ALLOWED if a == "threshold" or ACTIVATIONS[a].per_token]
CAUSAL = [(v, a) for v, a in PER_TOKEN if ARCHS[VARIANTS[v].name].causal]

each_arch = pytest.mark.parametrize("architecture", sorted(VARIANTS))
each_pair = pytest.mark.parametrize(("architecture", "activation"), ALLOWED)
per_token = pytest.mark.parametrize(("architecture", "activation"), PER_TOKEN)
causal = pytest.mark.parametrize(("architecture", "activation"), CAUSAL)


def n_sources(architecture: str) -> int:
    return ARCHS[VARIANTS[architecture].name].sources(Dims(L, D))


def transcoder(architecture: str, activation: str, dtype: torch.dtype = torch.float64) -> Transcoder:
    options = VARIANTS[architecture]
    if activation == "threshold":
        theta = oracle.normal(n_sources(architecture), F, seed=3).abs()
        return oracle.transcoder(options, FixedThreshold(theta), dtype=dtype)
    return oracle.transcoder(options, activation, dtype=dtype)


def blank(architecture: str, like: Transcoder) -> Transcoder:
    return build(VARIANTS[architecture], Dims(L, D), like.activation).double().eval()


def inputs(dtype: torch.dtype = torch.float64) -> Tensor:
    return oracle.normal(B, L, D, dtype=dtype)


def dense(features: Features) -> Tensor:
    return features.dense() if isinstance(features, Sparse) else features


@pytest.mark.parametrize("form", ["sparse", "dense"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 3e-2)]
)
@pytest.mark.parametrize(("architecture", "activation"), [(v, a) for v, a in ALLOWED if v in LINEAR])
def test_the_forward_pass_and_its_gradients_equal_the_formula(
    architecture: str, activation: str, dtype: torch.dtype, tolerance: float, form: str
) -> None:
    model, x, dy = transcoder(architecture, activation, dtype), inputs(dtype), oracle.normal(B, L, D, seed=10)
    slow = copy.deepcopy(model).double()
    out = model(x, need_pre_acts=form == "dense")
    (out.y_hat * dy.to(dtype)).sum().backward()
    chosen = {(b, l, i) for b, l, i in dense(out.features).nonzero().tolist()}

    weights = slow.weights()
    encode = oracle.encode_all if n_sources(architecture) == 1 else oracle.encode
    features = oracle.at_pairs(encode(x.double(), weights["W_enc"], weights["b_enc"]), chosen)
    y_hat = oracle.reconstruct(VARIANTS[architecture], weights, features, x.double())
    (y_hat * dy).sum().backward()
    assert len(chosen) >= B
    assert oracle.normwise(dense(out.features), features) < tolerance
    assert oracle.normwise(out.y_hat, y_hat) < tolerance
    assert out.y_hat.dtype == dtype
    theirs = dict(slow.named_parameters())
    for name, parameter in model.named_parameters():
        if not name.startswith("activation."):  # thresholds learn by a rule of their own
            assert parameter.grad is not None, name
            assert parameter.grad.dtype == dtype
            expected = theirs[name].grad
            assert oracle.normwise(parameter.grad, torch.zeros(1) if expected is None else expected) < tolerance, name


@each_pair
def test_the_rule_chooses_what_its_formula_says(architecture: str, activation: str) -> None:
    model = transcoder(architecture, activation)
    h = model.encode(inputs()).detach()
    if activation in oracle.SELECTIONS:
        expected = oracle.at_pairs(h, oracle.SELECTIONS[activation](h, 2))
    elif activation == "groupmax":
        expected = oracle.at_pairs(h, oracle.group_max(h, 1))
    else:
        zero = torch.zeros(n_sources(architecture), F)
        expected = oracle.above(h, getattr(model.activation, "threshold", zero))
    assert torch.equal(dense(model(inputs()).features), expected)


@each_pair
def test_shapes_are_those_of_the_contract(architecture: str, activation: str) -> None:
    model = transcoder(architecture, activation)
    for need_pre_acts in (False, True):
        out = model(inputs(), need_pre_acts)
        assert dense(out.features).shape == (B, model.n_sources, F)
        assert out.y_hat.shape == (B, L, D)
        assert (dense(out.features) >= 0).all()
        assert out.pre_acts is not None or (model.activation.chooses and not need_pre_acts)
        if out.pre_acts is not None:
            assert torch.equal(out.pre_acts, model.encode(inputs()))
    assert model.W_enc.shape == (L, F, D)
    assert model.b_enc.shape == (model.n_sources, F)
    assert model.b_dec.shape == (L, D)
    if model.directions:
        assert [W.shape for W in model.W_dec] == [(F, len(model.targets(l)), D) for l in range(model.n_sources)]


@each_pair
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


@each_pair
def test_every_parameter_learns(architecture: str, activation: str) -> None:
    model = transcoder(architecture, activation)
    model(inputs()).y_hat.square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.any(), name


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


@causal
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


@causal
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
    features = oracle.normal(B, model.n_sources, F, seed=8).relu()
    features[1] = 0
    features[:, 1:2] = 0
    assert oracle.normwise(model.decode(sparsify(features), x), model.decode(features, x)) < 1e-12


@each_pair
def test_weights_survive_the_round_trip_through_their_file_form(architecture: str, activation: str) -> None:
    model = transcoder(architecture, activation)
    fresh = blank(architecture, model)
    fresh.load_weights(model.weights())
    assert torch.equal(fresh(inputs()).y_hat, model(inputs()).y_hat)
    assert fresh.weights().keys() == model.weights().keys()
    assert all(torch.equal(fresh.weights()[name], weight) for name, weight in model.weights().items())


@each_pair
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
    if threshold is not None and threshold.shape == before.pre_acts.shape[1:]:
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
    if VARIANTS[architecture].offset:
        pytest.skip("what an offset adds is not the feature's own value")
    source = model.n_sources // 2
    features = torch.zeros(B, model.n_sources, F, dtype=torch.float64)
    z = oracle.normal(B, 3, seed=8)
    features[:, source, ids] = z
    expected = model.decode(features, x) - model.decode(torch.zeros_like(features), x)
    got = torch.zeros_like(expected)
    for target, part in model.write_rows(z, ids, source, model.inputs(x)[source]):
        got[:, target] += part
    assert expected.any()
    assert oracle.normwise(got, expected) < 1e-12


@each_arch
def test_decoder_norms_and_their_gradient_at_zero(architecture: str) -> None:
    model = transcoder(architecture, "relu")
    if model.directions:
        assert oracle.normwise(model.decoder_norms(), oracle.decoder_norms(model.W_dec)) < 1e-12
    assert model.decoder_norms().shape == (model.n_sources, F)
    fresh = blank(architecture, model)
    norms = fresh.decoder_norms()
    assert not norms.any()
    norms.sum().backward()
    for name, parameter in fresh.named_parameters():
        assert parameter.grad is None or not parameter.grad.any(), name


@each_pair
def test_the_state_dict_holds_all_there_is(architecture: str, activation: str) -> None:
    model = transcoder(architecture, activation)
    other = transcoder(architecture, activation)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(inputs()).y_hat, model(inputs()).y_hat)


@pytest.mark.parametrize("architecture", LINEAR)
def test_the_effective_decoder_is_what_one_more_unit_of_a_feature_writes(architecture: str) -> None:
    model, x = transcoder(architecture, "relu"), inputs()
    features = torch.ones(1, model.n_sources, F, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda a: model.decode(a, x[:1]), features)
    for l in range(model.n_sources):
        for m in range(L):
            rows = jacobian[0, m, :, 0, l].T  # [F, D]
            slot = m - model.targets(l).start
            expected = model.W_dec[l][:, slot] if m in model.targets(l) else torch.zeros(F, D)
            assert oracle.normwise(rows, expected) < 1e-12


@pytest.mark.parametrize("architecture", LINEAR)
def test_linear_says_whether_the_reconstruction_is_linear_in_the_features(architecture: str) -> None:
    model, x = transcoder(architecture, "relu"), inputs()
    a = oracle.normal(B, model.n_sources, F, seed=8).relu()
    nothing = model.decode(torch.zeros_like(a), x)
    doubled = model.decode(2 * a, x) - nothing
    assert (oracle.normwise(doubled, 2 * (model.decode(a, x) - nothing)) < 1e-12) == model.linear
    assert model.linear != VARIANTS[architecture].offset


@pytest.mark.parametrize("architecture", LINEAR)
def test_decoder_norms_pass_the_gradient_of_the_effective_decoder(architecture: str) -> None:
    model, slow = transcoder(architecture, "relu"), transcoder(architecture, "relu")
    weight = oracle.normal(model.n_sources, F, seed=11)
    (model.decoder_norms() * weight).sum().backward()
    (oracle.decoder_norms(slow.W_dec) * weight).sum().backward()
    theirs = dict(slow.named_parameters())
    n_reached = 0
    for name, parameter in model.named_parameters():
        expected = theirs[name].grad
        if expected is not None:
            assert parameter.grad is not None
            assert oracle.normwise(parameter.grad, expected) < 1e-12
            n_reached += bool(expected.any())
    assert n_reached >= 1


@pytest.mark.parametrize("architecture", LINEAR)
def test_rows_of_some_features_are_rows_of_the_table(architecture: str) -> None:
    model, ids = transcoder(architecture, "relu"), torch.tensor([7, 2, 3])
    for l in range(model.n_sources):
        for m in model.targets(l):
            assert torch.equal(model.table(l, m, ids), model.table(l, m)[ids])
