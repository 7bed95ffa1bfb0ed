"""Nested prefixes: reconstructions, sizes and loss against the formulas, and a run that is stopped and resumed."""

import itertools
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from pipeline.arch import init_rows, table
from pipeline.arch.base import Dims
from pipeline.arch.matryoshka import Matryoshka
from pipeline.arch.options import ArchOptions
from pipeline.core import activations
from pipeline.core.normalize import Scaling
from pipeline.core.options import ActivationOptions, LossOptions
from pipeline.core.sparse import Sparse, sparsify
from pipeline.errors import UserError
from pipeline.train import checkpoint, optim
from pipeline.train.checkpoint import State
from pipeline.train.inputs import Inputs
from pipeline.train.loop import Trainer
from pipeline.train.micro import Taken
from pipeline.train.objective import Objective
from pipeline.train.options import OptimOptions
from pipeline.train.run_plan import Plan
from tests import oracle

B, L, F, D = 5, 3, 11, 6
MSE = LossOptions("mse")
RULES = ["relu", "jumprelu", *sorted(oracle.SELECTIONS)]


def nested(activation: str = "topk", **options: object) -> Matryoshka:
    """Random weights under any of its own options."""
    model = oracle.transcoder("matryoshka", activation)
    chosen = replace(model.options, **options)  # type: ignore[arg-type]
    rule = activations.build(oracle.activation_options(activation), L, F)
    other = table.build(chosen, Dims(L, D), rule).double().eval()
    assert isinstance(other, Matryoshka)
    for layer in range(L):
        for mine, its in zip(other.tables(layer), model.tables(layer), strict=False):
            mine.data.copy_(its.data)
        other.encoders[layer].data.copy_(model.encoders[layer].data)
    other.b_enc.data.copy_(model.b_enc.data)
    other.b_dec.data.copy_(model.b_dec.data)
    return other


def prefix(features: Tensor, m: int) -> Tensor:
    """Features m and on set to 0."""
    kept = torch.zeros_like(features)
    kept[:, :, :m] = 1
    return features * kept


def full_decoders(model: Matryoshka) -> list[Tensor]:
    """W_dec as of a CLT: what lies beyond the reach is 0."""
    return [functional.pad(W, (0, 0, 0, L - l - W.shape[1])) for l, W in enumerate(model.W_dec)]


def dense(features: Tensor | Sparse) -> Tensor:
    return features.dense() if isinstance(features, Sparse) else features


@pytest.mark.parametrize("reach", [None, 0, 1, 7])
@pytest.mark.parametrize("sizes", [[11], [1, 11], [3, 4, 9, 11], [2, 5]])
def test_prefixes_reconstruct_as_if_the_later_features_were_zero(sizes: list[int], reach: int | None) -> None:
    model = nested(max_reach=reach)
    a = oracle.normal(B, L, F, seed=4).relu()
    a[2] = 0
    a[:, 1] = 0
    a[1, :, :5] = 0  # a token whose early features are all silent
    W_dec = full_decoders(model)
    for features in (a, sparsify(a)):
        got = model.nested(features, sizes)
        assert len(got) == len(sizes)
        for part, m in zip(got, sizes, strict=True):
            assert oracle.normwise(part, oracle.decode(prefix(a, m), W_dec, model.b_dec)) < 1e-12
    assert model.nested(a, []) == []


@pytest.mark.parametrize("reach", [0, 1, None])
def test_features_write_the_layers_within_reach(reach: int | None) -> None:
    model = nested(max_reach=reach)
    expected = {0: [[0], [1], [2]], 1: [[0, 1], [1, 2], [2]], None: [[0, 1, 2], [1, 2], [2]]}[reach]
    assert [list(model.targets(l)) for l in range(L)] == expected
    pairs = sum(len(targets) for targets in expected)
    assert sum(p.numel() for p in model.parameters()) == (L + pairs) * F * D + L * F + L * D


@pytest.mark.parametrize("activation", RULES)
@pytest.mark.parametrize("pre_acts", [False, True])
def test_the_loss_and_its_gradients_equal_the_formula(activation: str, pre_acts: bool) -> None:
    """Full reconstruction plus the sum over shorter prefixes; features are chosen among all."""
    model = nested(activation, prefixes=[2, 5, 11])
    x, y = oracle.normal(B, L, D, seed=5), oracle.normal(B, L, D, seed=6)
    options = replace(MSE, pre_act=0.2) if pre_acts else MSE
    objective = Objective(options, model, 7.25, n_steps=8)
    out = objective.forward(model, x, step=0)
    assert torch.equal(dense(out.features), dense(model(x, pre_acts).features))
    assert oracle.normwise(out.y_hat, model(x, pre_acts).y_hat) < 1e-12
    terms = objective(model, out, x, y, torch.zeros(L, F, dtype=torch.bool), step=0)
    assert terms.keys() == {"reconstruction", "prefixes"} | ({"pre_act"} if pre_acts else set())
    torch.stack(list(terms.values())).sum().backward()

    W_enc, b_enc, b_dec = (t.detach().clone().requires_grad_() for t in (model.W_enc, model.b_enc, model.b_dec))
    W_dec = [W.detach().requires_grad_() for W in model.W_dec]
    h = oracle.encode(x, W_enc, b_enc)
    chosen = {tuple(pair) for pair in dense(out.features).nonzero().tolist()}
    if activation in oracle.SELECTIONS:
        assert chosen == oracle.SELECTIONS[activation](h.detach(), 2)
    a = oracle.at_pairs(h, chosen)
    shorter = [oracle.reconstruction(oracle.decode(prefix(a, m), W_dec, b_dec), y) for m in (2, 5)]
    whole = oracle.reconstruction(oracle.decode(a, W_dec, b_dec), y)
    assert float(terms["reconstruction"].detach()) == pytest.approx(float(whole.detach()), rel=1e-12)
    assert float(terms["prefixes"].detach()) == pytest.approx(float((shorter[0] + shorter[1]).detach()), rel=1e-12)
    loss = whole + shorter[0] + shorter[1] + (0.2 * (-h).relu().sum() / B if pre_acts else 0)
    expected = torch.autograd.grad(loss, [W_enc, b_enc, b_dec, *W_dec], materialize_grads=True)
    decoders = [torch.stack([one.grad for one in model.tables(l)], dim=1) for l in range(L)]  # type: ignore[misc]
    encoders = torch.stack([weight.grad for weight in model.encoders])  # type: ignore[misc]
    for got, slow in zip((encoders, model.b_enc.grad, model.b_dec.grad, *decoders), expected, strict=True):
        assert got is not None
        assert oracle.normwise(got, slow) < 1e-12


def test_an_output_without_its_prefixes_is_no_loss() -> None:
    model, x = nested(), oracle.normal(B, L, D)
    with pytest.raises(AssertionError, match="prefixes"):
        Objective(MSE, model, 1.0, 8)(model, model(x), x, x, torch.zeros(L, F, dtype=torch.bool), 0)


@pytest.mark.parametrize("options", [{"prefixes": [11]}, {"random_prefixes": 1}])
def test_one_prefix_is_a_plain_transcoder(options: dict[str, object]) -> None:
    model, x = nested(**options), oracle.normal(B, L, D)
    objective = Objective(MSE, model, 1.0, 8)
    out = objective.forward(model, x, 0)
    assert out.shorter == ()
    assert objective(model, out, x, x, torch.zeros(L, F, dtype=torch.bool), 0).keys() == {"reconstruction"}


def test_every_part_of_the_dictionary_is_decoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline.arch import matryoshka

    rows, bag = [], matryoshka.bag

    def counted(pattern: object, values: Tensor, piece: Tensor) -> Tensor:
        rows.append((piece.shape[0], values.numel()))
        return bag(pattern, values, piece)  # type: ignore[arg-type]

    monkeypatch.setattr(matryoshka, "bag", counted)
    model, x = nested(prefixes=[2, 5, 11]), oracle.normal(B, L, D)
    out = model(x, False, [2, 5, 11])
    assert isinstance(out.features, Sparse)
    tables = L * (L + 1) // 2
    assert sum(n for n, _ in rows) == tables * F
    assert sum(n for _, n in rows) == sum(v.numel() * len(model.targets(l)) for l, v in enumerate(out.features.values))


# Sizes


def sized(d_features: int, **options: object) -> Matryoshka:
    rule = activations.build(oracle.activation_options("relu"), L, d_features)
    model = table.build(ArchOptions("matryoshka", d_features, **options), Dims(L, D), rule)  # type: ignore[arg-type]
    assert isinstance(model, Matryoshka)
    return model


def test_fixed_prefixes_are_those_given_or_the_published_shares() -> None:
    assert sized(100, prefixes=[7, 50, 100]).sizes(0, 3) == [7, 50, 100]
    assert sized(1024).sizes(0, 3) == [32, 96, 224, 480, 1024]
    assert sized(11).sizes(0, 3) == [1, 2, 5, 11]
    assert sized(1).sizes(0, 3) == [1]
    assert sized(1024, random_prefixes=4).usual_sizes() == [32, 96, 224, 480, 1024]


def test_drawn_prefixes_are_different_ascend_and_end_at_all() -> None:
    for n, d_features in ((1, 11), (4, 11), (11, 11), (10, 4096)):
        model = sized(d_features, random_prefixes=n)
        for step in range(20):
            sizes = model.sizes(0, step)
            assert len(sizes) == n
            assert sizes[-1] == d_features
            assert sizes[0] >= 1
            assert all(a < b for a, b in itertools.pairwise(sizes))


def test_seed_and_step_alone_decide_the_prefixes() -> None:
    first, other = sized(4096, random_prefixes=4), sized(4096, random_prefixes=4)
    torch.manual_seed(0)
    drawn = [first.sizes(5, step) for step in range(30)]
    torch.manual_seed(1)
    assert [other.sizes(5, step) for step in reversed(range(30))] == drawn[::-1]
    assert len({tuple(sizes) for sizes in drawn}) == 30
    assert drawn != [first.sizes(6, step) for step in range(30)]


def test_drawn_prefixes_follow_the_published_distribution() -> None:
    # P(m) = (sqrt(m) - sqrt(m - 1)) / sqrt(F - 1) for m = 1 ... F - 1, F = 10.
    model, n = sized(10, random_prefixes=2), 20_000
    seen = Counter(model.sizes(0, step)[0] for step in range(n))
    for m in range(1, 10):
        expected = (m**0.5 - (m - 1) ** 0.5) / 3
        assert seen[m] / n == pytest.approx(expected, abs=5 * (expected / n) ** 0.5)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"prefixes": [2, 5]}, r"prefixes=\[2, 5\] must end at arch\.d_features=11"),
        ({"prefixes": []}, r"must end at arch\.d_features=11"),
        ({"prefixes": [5, 5, 11]}, "at least 1 and ascend"),
        ({"prefixes": [0, 11]}, "at least 1 and ascend"),
        ({"prefixes": [5, 2, 11]}, "at least 1 and ascend"),
        ({"prefixes": [11], "random_prefixes": 2}, "exclude each other"),
        ({"random_prefixes": 0}, "random_prefixes=0 must lie between 1 and"),
        ({"random_prefixes": 12}, "random_prefixes=12 must lie between 1 and"),
        ({"max_reach": -1}, "max_reach=-1"),
        ({"ranks": [4, 2]}, r"arch\.ranks has no meaning for arch=matryoshka"),
    ],
)
def test_prefixes_that_make_no_sense_are_refused_in_a_line(options: dict[str, object], says: str) -> None:
    with pytest.raises(UserError, match=says) as refused:
        table.check(ArchOptions("matryoshka", d_features=11, **options))  # type: ignore[arg-type]
    assert "\n" not in str(refused.value)


# A run


def train(model: Matryoshka, state: State, optimizer: torch.optim.Optimizer, steps: int) -> None:
    objective = Objective(LossOptions("all", sparsity=0.3, aux_k=1 / 32), model, 7.25, 8, seed=3)
    for _ in range(steps):
        x, y = (oracle.normal(B, L, D, seed=s + state.step) for s in (100, 200))
        out = objective.forward(model, x, state.step)
        terms = objective(model, out, x, y, torch.zeros(L, F, dtype=torch.bool), state.step)
        optimizer.zero_grad()
        torch.stack(list(terms.values())).sum().backward()
        optimizer.step()
        state.step += 1


@pytest.mark.parametrize("activation", RULES)
def test_a_resumed_run_draws_the_prefixes_of_the_run_that_never_stopped(tmp_path: Path, activation: str) -> None:
    def start() -> tuple[Matryoshka, State, torch.optim.Optimizer]:
        model = nested(activation, random_prefixes=4).train()
        adam = optim.build(model.parameters(), OptimOptions("adam", lr=0.01))
        return model, State(0, torch.zeros(L, F, dtype=torch.int64)), adam

    straight, first, second = start(), start(), start()
    train(*straight, 6)
    train(*first, 3)
    path = checkpoint.save(tmp_path, first[0], first[2], first[1], {})
    state = checkpoint.load(path, second[0], second[2])
    train(second[0], state, second[2], 3)
    for name, tensor in straight[0].state_dict().items():
        assert torch.equal(tensor, second[0].state_dict()[name]), name
    assert not torch.equal(straight[0].b_enc, first[0].b_enc)


def test_the_objective_asks_for_the_prefixes_of_its_seed_and_step() -> None:
    model, x = nested(random_prefixes=4), oracle.normal(B, L, D)
    for seed, step in ((0, 0), (0, 7), (9, 7)):
        out = Objective(MSE, model, 1.0, 8, seed=seed).forward(model, x, step)
        *sizes, _ = model.sizes(seed, step)
        assert len(out.shorter) == 3
        for got, expected in zip(out.shorter, model.nested(out.features, sizes), strict=True):
            assert oracle.normwise(got, expected) < 1e-12


@pytest.mark.parametrize(
    ("options", "sizes"),
    [({"prefixes": [2, 5, 11]}, [2, 5]), ({"random_prefixes": 3}, [1, 2, 5]), ({"prefixes": [11]}, [])],
)
def test_the_log_has_the_fvu_of_the_same_prefixes_at_every_step(
    tmp_path: Path, options: dict[str, object], sizes: list[int]
) -> None:
    model = nested(**options)
    objective, scale = Objective(MSE, model, 1.0, 8), oracle.normal(L, D, seed=23).abs() + 0.5
    zero, variance = torch.zeros(L, D), oracle.normal(L, D, seed=24).square()
    scaling = Scaling(zero, scale, zero, scale)
    inputs = Inputs(None, scaling, torch.device("cpu"), model.options.site, model.options.target)
    plan = Plan(8, B, 10, 8, 1, 1, resample_steps=0, last_resample=0, seed=0, y_variance=variance)
    adam = optim.build(model.parameters(), OptimOptions("adam"))
    trainer = Trainer(tmp_path, model, adam, objective, inputs, plan, OptimOptions("adam"))
    x, y = oracle.normal(B, L, D, seed=5), oracle.normal(B, L, D, seed=6)
    for step in range(2):
        out = objective.forward(model, x, step)
        taken = Taken(model, scale, counts=False, logs=True)
        taken.note({"reconstruction": torch.zeros(())}, torch.zeros(1))
        taken.add(out, x, y)
        line = trainer.record(taken, 0.1)
        assert [key for key in line if key.startswith("fvu/")] == [f"fvu/prefix_{m}" for m in sizes]
        for m in sizes:
            y_hat = oracle.decode(prefix(dense(out.features), m), model.W_dec, model.b_dec)
            error = float(((y_hat - y) * scale).square().sum().detach()) / B
            assert line[f"fvu/prefix_{m}"] == pytest.approx(error / float(variance.sum()))


def concatenated(model: Matryoshka, layer: int) -> Tensor:
    """Each feature's decoder over all its targets, as one unit vector. [F, M D]"""
    return functional.normalize(model.W_dec[layer].detach().flatten(1), dim=1)


def found(planted: Matryoshka, learner: Matryoshka) -> float:
    """Mean over planted features of the largest cosine with a learned one."""
    best = [(concatenated(planted, l) @ concatenated(learner, l).T).amax(dim=1) for l in range(planted.n_sources)]
    return float(torch.cat(best).mean())


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"prefixes": [8, 24]}, {"random_prefixes": 3}])
def test_a_planted_dictionary_is_found_again(options: dict[str, object]) -> None:
    """Twelve features in each of three layers, some much more frequent than others; twice as many may learn."""
    width, n_planted, k, n_steps = 16, 12, 2, 400

    def new(d_features: int, **more: object) -> Matryoshka:
        rule = activations.build(ActivationOptions("topk", k=k), L, d_features)
        model = table.build(ArchOptions("matryoshka", d_features, **more), Dims(L, width), rule)  # type: ignore[arg-type]
        assert isinstance(model, Matryoshka)
        return model

    generator = torch.Generator().manual_seed(0)
    planted, learner = new(n_planted), new(2 * n_planted, **options)
    with torch.no_grad():
        for l in range(L):
            directions = torch.linalg.qr(torch.randn(width, width, generator=generator))[0]
            planted.encoders[l].copy_(directions[:n_planted])
            for weight in planted.tables(l):
                weight.normal_(0, 1, generator=generator)
    rarity = torch.linspace(1, 3, n_planted)

    @torch.no_grad()
    def rows(n: int) -> tuple[Tensor, Tensor]:
        """Layers are independent; the first features are on more often than the last."""
        order = torch.rand(n, L, n_planted, generator=generator) ** (1 / rarity)
        on = order.argsort(dim=2).argsort(dim=2) < k
        code = on * (1 + torch.rand(n, L, n_planted, generator=generator))
        x = torch.einsum("blf,lfd->bld", code, planted.W_enc)
        x += 0.05 * torch.randn(x.shape, generator=generator)
        return x, planted(x).y_hat

    init_rows.from_data(learner, *rows(1024), generator)
    before = found(planted, learner)
    objective = Objective(MSE, learner, 1.0, n_steps)
    optimizer = torch.optim.Adam(learner.parameters())
    nobody = torch.zeros(L, 2 * n_planted, dtype=torch.bool)
    for step in range(n_steps):
        optimizer.param_groups[0]["lr"] = 0.02 * min(1.0, 2 * (1 - step / n_steps))
        x, y = rows(256)
        terms = objective(learner, objective.forward(learner, x, step), x, y, nobody, step)
        optimizer.zero_grad()
        torch.stack(list(terms.values())).sum().backward()
        optimizer.step()
    assert before < 0.75
    assert found(planted, learner) > 0.9
