"""The mixture of linear transforms against its sum over transforms; its norms, folding, files and start."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from pipeline.arch import init_random, init_rows, table
from pipeline.arch.base import Dims
from pipeline.arch.molt import MOLT
from pipeline.arch.options import ArchOptions
from pipeline.core import activations, losses
from pipeline.core.activations import FixedThreshold
from pipeline.core.normalize import Scaling
from pipeline.core.options import ActivationOptions
from pipeline.core.sparse import Sparse, fixed_k, sparsify
from pipeline.errors import UserError
from pipeline.train.objective import explain_error
from tests import oracle

B, L, F, D = 5, 3, 11, 6
RANKS = [6, 6, 4, 4, 4, 2, 2, 2, 2, 2, 2]
"""Of the transforms 0 to 10 of `oracle.arch_options`."""


def molt(activation: str = "topk", seed: int = 0) -> MOLT:
    """Every weight random, the offset too."""
    model = oracle.transcoder("molt", activation, seed=seed)
    assert isinstance(model, MOLT)
    model.offset += oracle.normal(*model.offset.shape, seed=seed + 50)
    return model


def maps(model: MOLT) -> tuple[list[list[Tensor]], list[list[Tensor]], list[list[Tensor]]]:
    """U[l][t] [D, r], V[l][t] [r, D], offset[l][t] [r], leaves that share no memory with the model."""
    weights = model.weights()
    found: tuple[list[list[Tensor]], ...] = ([], [], [])
    for l in range(L):
        for kept, name in zip(found, ("U", "V", "offset"), strict=True):
            groups = [weights[f"{name}.{rank}"][l].detach() for rank in (6, 4, 2)]
            stacked = [one.mT if name == "U" else one for group in groups for one in group]
            kept.append([one.clone().requires_grad_() for one in stacked])
    assert [one.shape for one in found[0][0]] == [(D, rank) for rank in RANKS]
    return found[0], found[1], found[2]


def some_features() -> Tensor:
    a = oracle.normal(B, L, F, seed=4).relu()
    a[2] = 0
    a[:, 1] = 0
    a[0, 0] = 0
    return a


@pytest.mark.parametrize("form", ["dense", "ragged", "padded"])
def test_reconstructions_and_gradients_equal_the_sum_over_transforms(form: str) -> None:
    model, x, dy = molt(), oracle.normal(B, L, D), oracle.normal(B, L, D, seed=10)
    a = some_features().requires_grad_()
    features: Tensor | Sparse = a
    if form == "ragged":
        values = [a[:, l][p.tokens, p.indices] for l, p in enumerate(sparsify(a.detach()).patterns)]
        features = Sparse(sparsify(a.detach()).patterns, values)
    if form == "padded":  # every transform of each row, and then index 0 with value 0
        ids = torch.cat([torch.arange(F), torch.zeros(3, dtype=torch.int64)]).repeat(B, 1)
        padded = torch.cat([a, torch.zeros(B, L, 3)], dim=2)
        features = Sparse([fixed_k(ids, F)] * L, [padded[:, l].reshape(-1) for l in range(L)])
    y_hat = model.decode(features, x)
    (y_hat * dy).sum().backward()

    b, (U, V, offset), b_dec = some_features().requires_grad_(), maps(model), model.b_dec.detach().requires_grad_()
    slow = oracle.decode_molt(b, x, U, V, offset, b_dec)
    assert oracle.normwise(y_hat, slow) < 1e-12
    assert torch.equal(y_hat[2], model.b_dec)
    (slow * dy).sum().backward()
    for l in range(L):
        for table_, transforms, name in ((model.U[l], U[l], "U"), (model.V[l], V[l], "V")):
            rows = [torch.zeros_like(one) if one.grad is None else one.grad for one in transforms]
            expected = torch.cat([one.mT if name == "U" else one for one in rows])
            got = torch.zeros_like(table_) if table_.grad is None else table_.grad
            assert oracle.normwise(got, expected) < 1e-12
    assert model.b_dec.grad is not None
    assert b_dec.grad is not None
    assert oracle.normwise(model.b_dec.grad, b_dec.grad) < 1e-12
    assert a.grad is not None
    assert b.grad is not None
    chosen = a.detach() > 0
    assert oracle.normwise(a.grad[chosen], b.grad[chosen]) < 1e-12


@pytest.mark.parametrize("activation", ["relu", "jumprelu", *sorted(oracle.SELECTIONS)])
def test_the_whole_forward_pass_and_its_gradients_equal_the_formula(activation: str) -> None:
    model, x, dy = molt(activation), oracle.normal(B, L, D, seed=9), oracle.normal(B, L, D, seed=10)
    out = model(x)
    (out.y_hat * dy).sum().backward()
    W_enc, b_enc = (t.detach().clone().requires_grad_() for t in (model.W_enc, model.b_enc))
    features = out.features.dense() if isinstance(out.features, Sparse) else out.features
    h = oracle.encode(x, W_enc, b_enc)
    a = oracle.at_pairs(h, {tuple(pair) for pair in features.nonzero().tolist()})
    if activation in oracle.SELECTIONS:
        assert {tuple(pair) for pair in features.nonzero().tolist()} == oracle.SELECTIONS[activation](h.detach(), 2)
    assert oracle.normwise(features, a) < 1e-12
    slow = oracle.decode_molt(a, x, *maps(model), model.b_dec.detach())
    assert oracle.normwise(out.y_hat, slow) < 1e-12
    (slow * dy).sum().backward()
    got = torch.stack([torch.zeros_like(W) if W.grad is None else W.grad for W in model.encoders])
    assert model.b_enc.grad is not None
    assert W_enc.grad is not None
    assert b_enc.grad is not None
    assert oracle.normwise(got, W_enc.grad) < 1e-12
    assert oracle.normwise(model.b_enc.grad, b_enc.grad) < 1e-12


def test_norms_are_those_of_the_maps_and_their_gradient_is_zero_at_zero() -> None:
    model = molt()
    with torch.no_grad():
        rows = slice(int(model.first[3]), int(model.first[4]))
        model.U[0][rows] = 0  # U V = 0 with V != 0
        model.U[2].zero_()
        model.V[2].zero_()
    norms = model.decoder_norms()
    U, V, _ = maps(model)
    for l in range(L):
        for t in range(F):
            expected = (U[l][t] @ V[l][t]).detach().norm()
            assert float(norms[l, t].detach()) == pytest.approx(float(expected), rel=1e-12, abs=1e-15)
    norms.sum().backward()
    for l in (0, 1):
        for t in range(F):
            product = U[l][t] @ V[l][t]
            if product.any():
                product.norm().backward()
        expected_V = torch.cat([torch.zeros_like(one) if one.grad is None else one.grad for one in V[l]])
        expected_U = torch.cat([torch.zeros_like(one.mT) if one.grad is None else one.grad.mT for one in U[l]])
        assert model.V[l].grad is not None
        assert model.U[l].grad is not None
        assert oracle.normwise(model.V[l].grad, expected_V) < 1e-12
        assert oracle.normwise(model.U[l].grad, expected_U) < 1e-12
    assert model.U[2].grad is not None
    assert not model.U[2].grad.any()


@pytest.mark.parametrize("mean", [0.0, 1.0])
def test_a_folded_mixture_computes_the_same_in_the_models_units(mean: float) -> None:
    theta = oracle.normal(L, F, seed=30).abs()
    model = molt()
    model.activation = FixedThreshold(theta)
    layer = torch.tensor([0.1, 3.0, 20.0], dtype=torch.float64)[:, None]
    units = Scaling(
        mean * oracle.normal(L, D, seed=20),
        layer * (oracle.normal(L, D, seed=21).abs() + 0.5),
        mean * oracle.normal(L, D, seed=22),
        layer.flip(0) * (oracle.normal(L, D, seed=23).abs() + 0.5),
    )
    x = oracle.normal(40, L, D, seed=31) * units.x_scale + units.x_mean
    before = model(units.x(x))
    assert ((before.pre_acts - theta).abs() > 1e-9).all()
    y_hat, offset = units.y_inverse(before.y_hat), model.offset.clone()
    model.fold(units)
    assert torch.equal(model.offset, offset) == (mean == 0)  # without centring there is nothing to remember
    after = model(x)
    assert torch.equal(after.features > 0, before.features > 0)
    assert oracle.normwise(after.features, before.features) < 1e-12
    for m in range(L):
        assert oracle.normwise(after.y_hat[:, m], y_hat[:, m]) < 1e-12
        assert oracle.normwise(model.decode_layer(sparsify(after.features), m, x[:, m]), y_hat[:, m]) < 1e-12


def test_the_sparse_form_runs_under_inference_mode_too() -> None:
    model, x = molt(), oracle.normal(B, L, D)
    expected = model(x).y_hat
    with torch.inference_mode():
        assert torch.equal(model(x.clone()).y_hat, expected)


def test_dead_transforms_explain_the_error_with_their_own_maps() -> None:
    model, x = molt("relu"), oracle.normal(B, L, D)
    dead = torch.zeros(L, F, dtype=torch.bool)
    dead[0, [0, 2, 5, 7, 9]] = True  # more than d/2
    dead[2, 6] = True
    h = oracle.encode(x, model.W_enc, model.b_enc).detach()
    z = torch.zeros_like(h)
    for b in range(B):
        for l in range(L):
            ids = sorted((i for i in range(F) if dead[l, i]), key=lambda i: -float(h[b, l, i]))[: D // 2]
            for i in ids:
                z[b, l, i] = h[b, l, i].relu()
    expected = oracle.decode_molt(z, x, *maps(model), torch.zeros(L, D, dtype=torch.float64))
    assert oracle.normwise(explain_error(model, x, dead), expected) < 1e-12


def test_the_files_have_a_tensor_of_each_group() -> None:
    model = molt()
    shapes = {name: tuple(weight.shape) for name, weight in model.weights().items()}
    groups = {6: 2, 4: 3, 2: 6}
    assert shapes == {
        "W_enc": (L, F, D),
        "b_enc": (L, F),
        "b_dec": (L, D),
        **{f"{name}.{r}": (L, n, r, D) for name in "UV" for r, n in groups.items()},
        **{f"offset.{r}": (L, n, r) for r, n in groups.items()},
    }
    fresh = molt(seed=7)
    fresh.load_weights(model.weights())
    assert torch.equal(fresh(oracle.normal(B, L, D)).y_hat, model(oracle.normal(B, L, D)).y_hat)


@pytest.mark.parametrize(("ranks", "d_features"), [([6, 4, 2], 22), ([4, 1], 10), ([3], 7)])
def test_the_number_of_parameters_is_the_documented_one(ranks: list[int], d_features: int) -> None:
    options = ArchOptions("molt", d_features=d_features, ranks=ranks)
    rule = activations.build(oracle.activation_options("topk"), L, d_features)
    model = table.build(options, Dims(L, D), rule)
    assert isinstance(model, MOLT)
    each = d_features / sum(1 / r for r in ranks)  # the total rank R of a group, from F = sum R / r
    assert model.n_parameters == L * (d_features * (D + 1) + 2 * round(len(ranks) * each) * D + D)
    assert [count * rank for count, rank in zip(model.counts, ranks, strict=True)] == [round(each)] * len(ranks)


@pytest.mark.parametrize(
    ("ranks", "d_features", "says"),
    [
        (None, 11, r"arch\.ranks=None must name"),
        ([], 11, r"arch\.ranks=\[\] must name"),
        ([4, 0], 10, r"each once and above 0"),
        ([4, 4], 10, r"each once and above 0"),
        ([6, 4, 2], 12, r"d_features=12 .* 2 : 3 : 6; use 11 or 22"),
        ([6, 4, 2], 5, r"use 11$"),
        ([7, 1], 8, r"ranks=\[7, 1\] must not exceed the model's width 6"),
    ],
)
def test_ranks_that_make_no_sense_are_refused_in_a_line(ranks: list[int] | None, d_features: int, says: str) -> None:
    options = ArchOptions("molt", d_features=d_features, ranks=ranks)
    with pytest.raises(UserError, match=says) as refused:
        table.build(options, Dims(L, D), activations.build(oracle.activation_options("topk"), L, d_features))
    assert "\n" not in str(refused.value)


def test_ranks_mean_nothing_to_other_architectures() -> None:
    with pytest.raises(UserError, match=r"arch\.ranks has no meaning for arch=clt"):
        table.check(ArchOptions("clt", ranks=[4, 2]))


# Initial weights


def blank(d_features: int = F) -> MOLT:
    rule = activations.build(oracle.activation_options("topk"), L, d_features)
    model = table.build(oracle.arch_options("molt", d_features=d_features), Dims(L, D), rule)
    assert isinstance(model, MOLT)
    return model


def test_uniform_weights_fill_their_bounds() -> None:
    model = blank(110)
    init_random.uniform(model, torch.Generator().manual_seed(0))
    for tables, bound in ((model.encoders, 110**-0.5), (model.U, (L * D) ** -0.5), (model.V, (3 / D) ** 0.5)):
        for weight in tables:
            assert 0.97 * bound < float(weight.detach().abs().max()) <= bound
    assert not model.offset.any()


def test_from_data_a_transform_maps_its_input_to_that_inputs_target() -> None:
    x = oracle.normal(90, L, D, dtype=torch.float32) + oracle.normal(L, D, seed=2, dtype=torch.float32)
    y = torch.tanh(x) * 0.7 - 0.5
    model = blank()
    init_rows.from_data(model, x, y, torch.Generator().manual_seed(0))
    U, V, _ = maps(model)
    factors = []
    for l in range(L):
        centred = x[:, l] - x[:, l].mean(dim=0)
        cosines = functional.normalize(centred, dim=1) @ model.encoders[l].detach().T
        assert (cosines.max(dim=0).values > 1 - 1e-6).all()
        for t, i in enumerate(cosines.argmax(dim=0).tolist()):
            wrote = (U[l][t] @ (V[l][t] @ x[i, l])).detach() * centred[i].norm()
            wanted = y[i, l] - y[:, l].mean(dim=0)
            factors.append(wrote.norm() / wanted.norm())
            assert float(functional.cosine_similarity(wrote, wanted, dim=0)) > 1 - 1e-5
            torch.testing.assert_close(V[l][t].detach().norm(dim=1), torch.ones(RANKS[t]))
    by_layer = torch.stack(factors).view(L, F)
    torch.testing.assert_close(by_layer, by_layer[:, :1].expand(L, F))  # one gain for a layer
    out = model(x).y_hat
    assert losses.reconstruction(out, y) < losses.reconstruction(y.mean(dim=0).expand_as(y), y)


# What it is for


def vectors(model: MOLT, layer: int) -> Tensor:
    """The maps U_t V_t of a layer, each laid out as one unit vector. [F, D D]"""
    pairs = zip(model.groups(model.U[layer]), model.groups(model.V[layer]), strict=True)
    return functional.normalize(torch.cat([(u.mT @ v).flatten(1) for u, v in pairs]).detach(), dim=1)


def found(planted: MOLT, learner: MOLT) -> float:
    """Mean over planted transforms of the largest cosine with a learned one."""
    best = [(vectors(planted, l) @ vectors(learner, l).T).amax(dim=1) for l in range(planted.dims.n_layers)]
    return float(torch.cat(best).mean())


@pytest.mark.slow
def test_planted_transforms_are_found_again() -> None:
    """Two of rank 4 and four of rank 2 in each of two layers, two of them on for a token; twice as many may learn."""
    n_layers, width, n_planted, k, n_steps = 2, 12, 6, 2, 500

    def new(d_features: int) -> MOLT:
        rule = activations.build(ActivationOptions("topk", k=k), n_layers, d_features)
        model = table.build(ArchOptions("molt", d_features, ranks=[4, 2]), Dims(n_layers, width), rule)
        assert isinstance(model, MOLT)
        return model

    generator = torch.Generator().manual_seed(0)
    planted, learner = new(n_planted), new(2 * n_planted)
    with torch.no_grad():
        for l in range(n_layers):
            planted.encoders[l].copy_(torch.linalg.qr(torch.randn(width, width, generator=generator))[0][:n_planted])
            for weight in (planted.U[l], planted.V[l]):
                weight.normal_(0, width**-0.5, generator=generator)

    @torch.no_grad()
    def rows(n: int) -> tuple[Tensor, Tensor]:
        """Independent layers: the directions of k gates, and noise for the transforms to act on."""
        on = torch.rand(n, n_layers, n_planted, generator=generator).argsort(dim=2).argsort(dim=2) < k
        code = on * (1 + torch.rand(n, n_layers, n_planted, generator=generator))
        x = torch.einsum("blf,lfd->bld", code, planted.W_enc)
        x += 0.5 * torch.randn(x.shape, generator=generator)
        return x, planted(x).y_hat

    init_rows.from_data(learner, *rows(2048), generator)
    assert found(planted, learner) < 0.6
    optimizer = torch.optim.Adam(learner.parameters())
    for step in range(n_steps):
        optimizer.param_groups[0]["lr"] = 0.01 * min(1.0, 2 * (1 - step / n_steps))
        x, y = rows(256)
        optimizer.zero_grad()
        losses.reconstruction(learner(x).y_hat, y).backward()
        optimizer.step()
    assert found(planted, learner) > 0.9
