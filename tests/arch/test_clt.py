"""The CLT against its double sum: dense and sparse decoding, gradients at the same selection, norms, folding."""

import pytest
import torch
from torch import Tensor

from pipeline.arch import table
from pipeline.arch.base import Dims, Transcoder
from pipeline.arch.options import ArchOptions
from pipeline.arch.table import ARCHS
from pipeline.core import activations
from pipeline.core.activations import FixedThreshold, JumpReLU
from pipeline.core.normalize import Scaling
from pipeline.core.sparse import Sparse, fixed_k, sparsify
from pipeline.errors import UserError
from tests import oracle

B, L, F, D = 5, 3, 11, 6
CHOOSING = sorted(oracle.SELECTIONS)


def some_features() -> Tensor:
    a = oracle.normal(B, L, F, seed=4).relu()
    a[2] = 0  # a token with no feature at all
    a[:, 1] = 0  # a layer with no feature at all
    a[0, 0] = 0  # an empty row
    return a


def partly_silent(dtype: torch.dtype, activation: str) -> tuple[Transcoder, Tensor]:
    """A model and inputs such that token 2 has no feature, layer 1 has none, and others have fewer than k."""
    model = oracle.transcoder("clt", activation, dtype=dtype)
    with torch.no_grad():
        model.b_enc.copy_(-model.b_enc.abs())
        model.b_enc[1] = -100
    x = oracle.normal(B, L, D, dtype=dtype)
    x[2] = 0
    return model, x


def leaves(model: Transcoder) -> tuple[Tensor, Tensor, list[Tensor], Tensor]:
    """W_enc, b_enc, W_dec, b_dec as float64 leaves of their own."""
    W_enc, b_enc, b_dec = (t.detach().double().requires_grad_() for t in (model.W_enc, model.b_enc, model.b_dec))
    return W_enc, b_enc, [W.detach().double().requires_grad_() for W in model.W_dec], b_dec


def gradients(model: Transcoder) -> list[Tensor]:
    """In the order of `leaves`, W_dec layer by layer."""

    def of(parameters: list[Tensor]) -> list[Tensor]:
        return [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]

    decoders = [torch.stack(of(list(model.tables(l))), dim=1) for l in range(L)]
    return [torch.stack(of(list(model.encoders))), *of([model.b_enc]), *decoders, *of([model.b_dec])]


def test_shapes_of_the_weights() -> None:
    model = oracle.transcoder("clt")
    shapes = {name: tuple(weight.shape) for name, weight in model.weights().items()}
    decoders = {f"W_dec.{l}": (F, L - l, D) for l in range(L)}
    assert shapes == {"W_enc": (L, F, D), "b_enc": (L, F), **decoders, "b_dec": (L, D)}
    assert sum(p.numel() for p in model.parameters()) == (L + L * (L + 1) // 2) * F * D + L * F + L * D


def test_a_layer_writes_itself_and_every_later_layer() -> None:
    model = oracle.transcoder("clt")
    assert [list(model.targets(l)) for l in range(L)] == [[0, 1, 2], [1, 2], [2]]


def test_pre_activations_equal_the_double_loop() -> None:
    model, x = oracle.transcoder("clt"), oracle.normal(B, L, D)
    assert oracle.normwise(model.encode(x), oracle.encode(x, model.W_enc, model.b_enc)) < 1e-12


@pytest.mark.parametrize("form", ["dense", "ragged", "padded"])
def test_reconstructions_equal_the_double_loop(form: str) -> None:
    model, a = oracle.transcoder("clt"), some_features()
    features: Tensor | Sparse = a
    if form == "ragged":
        features = sparsify(a)
    if form == "padded":  # every feature of each row, and then index 0 with value 0
        ids = torch.cat([torch.arange(F), torch.zeros(3, dtype=torch.int64)]).repeat(B, 1)
        values = torch.cat([a, torch.zeros(B, L, 3)], dim=2)
        features = Sparse([fixed_k(ids, F)] * L, [values[:, l].reshape(-1) for l in range(L)])
    y_hat = model.decode(features, torch.zeros(B, L, D))
    assert oracle.normwise(y_hat, oracle.decode(a, model.W_dec, model.b_dec)) < 1e-12
    assert torch.equal(y_hat[2], model.b_dec)


def test_no_feature_anywhere_leaves_the_bias() -> None:
    model, nothing = oracle.transcoder("clt"), torch.zeros(B, L, F, dtype=torch.float64)
    for features in (nothing, sparsify(nothing)):
        assert torch.equal(model.decode(features, nothing), model.b_dec.expand(B, L, D))


@pytest.mark.parametrize("activation", ["relu", "jumprelu", *CHOOSING])
def test_the_forward_pass_equals_the_double_loop(activation: str) -> None:
    for model, x in (
        partly_silent(torch.float64, activation),
        (oracle.transcoder("clt", activation), oracle.normal(B, L, D, seed=9)),
    ):
        out = model(x)
        h = oracle.encode(x, model.W_enc, model.b_enc).detach()
        if activation in oracle.SELECTIONS:
            expected = oracle.at_pairs(h, oracle.SELECTIONS[activation](h, 2))
        else:
            is_jump = isinstance(model.activation, JumpReLU)
            expected = oracle.above(h, model.activation.threshold if is_jump else torch.zeros(L, F))
        features = out.features.dense() if isinstance(out.features, Sparse) else out.features
        assert oracle.normwise(features, expected) < 1e-12
        assert torch.equal(features > 0, expected > 0)
        assert oracle.normwise(out.y_hat, oracle.decode(expected, model.W_dec, model.b_dec)) < 1e-12


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
@pytest.mark.parametrize("activation", CHOOSING)
def test_sparse_gradients_equal_dense_autograd_at_the_same_selection(
    activation: str, dtype: torch.dtype, tolerance: float
) -> None:
    for model, x in (
        partly_silent(dtype, activation),
        (oracle.transcoder("clt", activation, dtype=dtype), oracle.normal(B, L, D, seed=9, dtype=dtype)),
    ):
        dy = oracle.normal(B, L, D, seed=10)
        out = model(x)
        assert isinstance(out.features, Sparse)
        assert out.pre_acts is None
        (out.y_hat * dy.to(dtype)).sum().backward()

        W_enc, b_enc, W_dec, b_dec = leaves(model)
        h = oracle.encode(x.double(), W_enc, b_enc)
        chosen = oracle.SELECTIONS[activation](h.detach(), 2)
        assert {tuple(pair) for pair in out.features.dense().nonzero().tolist()} == chosen
        y_hat = oracle.decode(oracle.at_pairs(h, chosen), W_dec, b_dec)
        assert oracle.normwise(out.y_hat, y_hat) < tolerance
        expected = torch.autograd.grad((y_hat * dy).sum(), [W_enc, b_enc, *W_dec, b_dec], materialize_grads=True)
        for got, slow in zip(gradients(model), expected, strict=True):
            assert got.dtype == dtype
            assert oracle.normwise(got, slow) < tolerance


@pytest.mark.parametrize("activation", ["relu", "jumprelu", *CHOOSING])
def test_dense_gradients_equal_autograd_through_the_double_loop(activation: str) -> None:
    model, x = oracle.transcoder("clt", activation), oracle.normal(B, L, D, seed=9)
    dy = oracle.normal(B, L, D, seed=10)
    out = model(x, need_pre_acts=True)
    (out.y_hat * dy).sum().backward()
    W_enc, b_enc, W_dec, b_dec = leaves(model)
    h = oracle.encode(x, W_enc, b_enc)
    chosen = {tuple(pair) for pair in out.features.nonzero().tolist()}
    y_hat = oracle.decode(oracle.at_pairs(h, chosen), W_dec, b_dec)
    expected = torch.autograd.grad((y_hat * dy).sum(), [W_enc, b_enc, *W_dec, b_dec], materialize_grads=True)
    for got, slow in zip(gradients(model), expected, strict=True):
        assert oracle.normwise(got, slow) < 1e-12


def test_decoder_norms_are_those_of_the_concatenated_rows() -> None:
    model = oracle.transcoder("clt")
    assert oracle.normwise(model.decoder_norms(), oracle.decoder_norms(model.W_dec)) < 1e-12


def test_the_decoder_norms_gradient_is_the_direction_and_zero_at_zero() -> None:
    model = oracle.transcoder("clt")
    with torch.no_grad():
        for table in model.tables(0):
            table[3] = 0
        for table in model.tables(2):
            table.zero_()
    norms = model.decoder_norms()
    assert norms[0, 3] == 0
    assert not norms[2].any()
    norms.sum().backward()
    expected = oracle.decoder_norms(model.W_dec).detach()
    for l in range(L):
        for table in model.tables(l):
            assert table.grad is not None
            for i in range(F):
                direction = table[i].detach() / expected[l, i] if expected[l, i] > 0 else torch.zeros(D)
                torch.testing.assert_close(table.grad[i], direction.double(), rtol=1e-12, atol=1e-15)


def scaling(mean: float = 1.0) -> Scaling:
    """Means off zero and scales that differ between layers and dimensions."""
    layer = torch.tensor([0.1, 3.0, 20.0], dtype=torch.float64)[:, None]
    return Scaling(
        mean * oracle.normal(L, D, seed=20),
        layer * (oracle.normal(L, D, seed=21).abs() + 0.5),
        mean * oracle.normal(L, D, seed=22),
        layer.flip(0) * (oracle.normal(L, D, seed=23).abs() + 0.5),
    )


def test_folded_weights_equal_the_formulas() -> None:
    model, maps = oracle.transcoder("clt"), scaling()
    W_enc, b_enc, W_dec, b_dec = (
        model.W_enc.detach(),
        model.b_enc.detach().clone(),
        [W.detach() for W in model.W_dec],
        model.b_dec.detach().clone(),
    )
    expected = oracle.folded(W_enc, b_enc, W_dec, b_dec, *maps)
    model.fold(maps)
    for got, slow in zip((model.W_enc, model.b_enc, model.b_dec), (*expected[:2], expected[3]), strict=True):
        assert oracle.normwise(got, slow) < 1e-12
    for l in range(L):
        assert oracle.normwise(model.W_dec[l], expected[2][l]) < 1e-12


@pytest.mark.parametrize("mean", [0.0, 1.0])
def test_a_folded_transcoder_computes_the_same_in_the_models_units(mean: float) -> None:
    theta = oracle.normal(L, F, seed=30).abs()
    model, maps = oracle.transcoder("clt", FixedThreshold(theta)), scaling(mean)
    x = oracle.normal(40, L, D, seed=31) * maps.x_scale + maps.x_mean
    before = model(maps.x(x))
    clear = ((before.pre_acts - theta).abs() > 1e-9).all(dim=(1, 2))
    assert clear.all()
    y_hat = maps.y_inverse(before.y_hat)
    model.fold(maps)
    after = model(x)
    assert torch.equal(after.features > 0, before.features > 0)
    assert oracle.normwise(after.features, before.features) < 1e-12
    for m in range(L):
        assert oracle.normwise(after.y_hat[:, m], y_hat[:, m]) < 1e-12


def test_folding_rounds_once_in_float32() -> None:
    # Means far from 0 cost digits if products are taken in float32.
    model, maps = oracle.transcoder("clt", dtype=torch.float32), scaling(mean=100.0)
    expected = oracle.folded(
        model.W_enc.detach().double(),
        model.b_enc.detach().double(),
        [W.detach().double() for W in model.W_dec],
        model.b_dec.detach().double(),
        *maps,
    )
    model.fold(maps)
    assert oracle.normwise(model.b_enc, expected[1].float()) < 1e-7
    assert oracle.normwise(model.W_enc, expected[0].float()) < 1e-7
    assert oracle.normwise(model.b_dec, expected[3].float()) < 1e-7


def test_a_new_transcoder_has_zero_weights_and_the_name_is_in_the_table() -> None:
    options = ArchOptions("clt", d_features=F)
    model = table.build(options, Dims(L, D), activations.build(oracle.activation_options("topk"), L, F))
    assert type(model) is ARCHS["clt"]
    assert not any(p.any() for p in model.parameters())


@pytest.mark.parametrize("options", [ArchOptions("transformer"), ArchOptions("clt", d_features=0)])
def test_unknown_architectures_and_senseless_sizes_are_refused(options: ArchOptions) -> None:
    with pytest.raises(UserError, match=r"arch(=transformer does not exist.*clt|\.d_features=0)"):
        table.check(options)
