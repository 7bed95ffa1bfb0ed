"""The bench of the training step compares like with like, counts what it says, and leaves its figures and nothing
else."""

import json
import logging
from itertools import count
from pathlib import Path

import pytest
import torch

from pipeline.config import compose
from pipeline.core.options import ActivationOptions, LossOptions, ThetaGrad
from pipeline.errors import UserError
from pipeline.stages import bench_train, bench_train_parts, bench_train_shapes, bench_train_sides, bench_train_timing
from pipeline.stages.bench_options import BenchTrainConfig
from pipeline.stages.bench_train_clock import Clock
from pipeline.stages.bench_train_dense import Dense
from pipeline.stages.bench_train_floor import Rates, work
from pipeline.stages.bench_train_shapes import SHAPES, Shape
from pipeline.stages.bench_train_sides import Ours, Reference
from tests import oracle

SHAPE = Shape(n_layers=3, d_model=6, d_features=22, batch_tokens=14, k=2)
TINY = [
    "bench.n_layers=3",
    "bench.d_model=6",
    "bench.d_features=22",
    "bench.batch_tokens=14",
    "bench.rounds=3",
    "bench.device=cpu",
    "bench.kernels=[torch]",
]
CPU = torch.device("cpu")
JUMPRELU = ActivationOptions("jumprelu", threshold=0.3, bandwidth=1.5, theta_grad=ThetaGrad.gdm)
RULES = {
    "topk": (ActivationOptions("topk", k=2), LossOptions("mse")),
    "batchtopk": (ActivationOptions("batchtopk", k=3), LossOptions("l1", sparsity=0.1)),
    "jumprelu": (JUMPRELU, LossOptions("tanh", sparsity=0.1, sparsity_c=2.0, pre_act=0.01)),
    "relu": (ActivationOptions("relu"), LossOptions("tanh", sparsity=0.1)),
}


def composed(*words: str) -> BenchTrainConfig:
    cfg = compose("bench_train", words)
    assert isinstance(cfg, BenchTrainConfig)
    return cfg


def both(rule: str) -> tuple[Ours, Reference]:
    """The two sides on the same weights, at a step whose penalty is not 0."""
    activation, loss = RULES[rule]
    data = bench_train_sides.batches(SHAPE)
    trainer = bench_train_sides.trainer(bench_train_sides.transcoder(SHAPE, activation, 4, CPU), loss, SHAPE)
    dense = Dense(trainer.model.state_dict(), activation, loss)
    return Ours(trainer, data), Reference(dense, trainer.objective, trainer.inputs, data)


@pytest.mark.parametrize("rule", RULES)
def test_both_sides_do_the_same_work(rule: str) -> None:
    ours, reference = both(rule)
    before = {name: value.clone() for name, value in ours.trainer.model.state_dict().items()}
    found = bench_train_sides.compare(ours, reference)
    assert found["loss"] < 1e-6
    assert found["gradients"] < 1e-6
    assert found["selection"] == 0
    assert 0 < found["l0"] <= 6
    for name, value in ours.trainer.model.named_parameters():
        assert torch.equal(value, before[name])
        assert value.grad is None


def test_the_weights_come_from_a_seed() -> None:
    first, second = (bench_train_sides.transcoder(SHAPE, RULES["jumprelu"][0], 4, CPU).state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("rule", RULES)
def test_both_sides_learn_alike(rule: str) -> None:
    ours, reference = both(rule)
    for _ in range(5):
        with bench_train_sides.seen(ours.trainer) as seen:
            ours()
        assert seen.losses == [pytest.approx(float(reference()), rel=1e-5)]
    theirs = dict(reference.model.named_parameters())
    for name, value in ours.trainer.model.named_parameters():
        torch.testing.assert_close(value, theirs[name.removeprefix("activation.")], rtol=1e-4, atol=2e-5)


def test_the_dense_reference_is_the_formula() -> None:
    """Against the slow oracle, so that both sides cannot be wrong in the same way."""
    ours, reference = both("topk")
    model, weights = reference.model.double(), ours.trainer.model.double()
    x, y = oracle.normal(5, 3, 6), oracle.normal(5, 3, 6, seed=2)
    pre_acts = oracle.encode(x, weights.W_enc, weights.b_enc)
    features = oracle.at_pairs(pre_acts, oracle.top_k(pre_acts, 2))
    y_hat = oracle.decode(features, weights.W_dec, weights.b_dec)
    torch.testing.assert_close(model.loss(x, y), oracle.reconstruction(y_hat, y))


@pytest.mark.parametrize("broken", ["encoders.1", "decoders.0.2", "b_dec"])
def test_unlike_things_are_not_compared(broken: str) -> None:
    ours, reference = both("topk")
    with torch.no_grad():
        dict(reference.model.named_parameters())[broken].mul_(1.01).add_(0.01)
    with pytest.raises(AssertionError, match="is not that of the dense reference"):
        bench_train_sides.compare(ours, reference)


def test_a_wrong_gradient_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, reference = both("topk")
    parameter = ours.trainer.model.b_enc  # a table may have its gradient as terms, which hooks do not see
    parameter.register_hook(lambda grad: grad * 1.001)
    with pytest.raises(AssertionError, match="gradients are not those"):
        bench_train_sides.compare(ours, reference)


def test_it_prints_figures_and_writes_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(bench_train_timing, "TURN", 0.0)
    words = ["bench.scaling=true", "bench.pairs=3", "bench.pair_steps=2", "activation.k=3", "cache.shard_mb=0.01"]
    file = bench_train.run(composed(*TINY, *words, "bench.memory=false", "to=out/figures.json"))
    assert file == Path("out/figures.json")
    assert {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")} == {"out", "out/figures.json"}
    report = json.loads(file.read_text())
    found = report["shapes"]["custom"]
    assert found["shape"]["d_features"] == 22
    assert found["l0"] == 3
    for key in ("speedup_vs_dense", "times_floor", "tokens_per_s", "ms", "percent_of_floor"):
        assert found[key] > 0
    assert set(found["ms_by_part"]) == set(bench_train_parts.PARTS)
    assert found["summary_of"] == "torch"
    side = found["kernels"]["torch"]
    for ratio in (side["speedup_vs_dense"], side["times_floor"], side["times_copy_floor"]):
        assert 0 < ratio["q1"] <= ratio["median"] <= ratio["q3"]
    assert found["times_floor"] == side["times_floor"]["median"]
    assert found["percent_of_floor"] == pytest.approx(100 / found["times_floor"])
    assert side["times_copy_floor"]["median"] <= side["times_floor"]["median"]
    assert set(report["scaling"]["custom"]) == {"kernels", "targets", "d_features", "k"}
    assert report["loop"]["cache"] == "a scratch cache"
    assert (report["loop"]["pairs"], report["loop"]["steps"]) == (3, 2)
    assert report["estimate"]["tokens"] == 100_000_000
    for what in ("over dense", "floor = B 2LDF / gemm", "trainer's loop", "hours", "Estimated, not measured"):
        assert what in caplog.text


@pytest.mark.slow
def test_the_peak_is_that_of_gradients_and_activations() -> None:
    """The dense step holds gradients as large as the weights, and all pre-activations several times."""
    cfg = composed("activation.k=4", "bench.device=cpu")
    shape = Shape(n_layers=3, d_model=64, d_features=4096, batch_tokens=512, k=4)
    peak = bench_train_timing.memory.peak(cfg, shape, CPU, 1, "dense")
    acts = 4 * 512 * 3 * 4096
    assert 4 * shape.n_parameters + 3 * acts < peak < 4 * shape.n_parameters + 12 * acts


def test_the_floor_is_the_sum_of_what_cannot_be_saved() -> None:
    """L=3, D=6, F=22, B=14, k=2, S=6, by hand."""
    floor = work(SHAPE, 2).at(Rates(gemm=1e3, gather=1e2, copy=10.0, in_place=20.0))
    assert floor.gemm == pytest.approx(14 * 2 * 3 * 6 * 22 / 1e3)
    assert floor.gather == pytest.approx(14 * 2 * 6 * 4 * (3 * 6 + 3) / 1e2)
    n_parameters = (3 + 6) * 22 * 6 + 3 * 22 + 3 * 6
    assert SHAPE.n_parameters == n_parameters
    assert floor.parameters == pytest.approx(24 * n_parameters / 20)
    assert floor.seconds == floor.gemm + floor.gather + floor.parameters
    assert floor.copy_seconds == pytest.approx(floor.seconds + floor.parameters)
    copied = work(SHAPE, 2).at(Rates(gemm=1e3, gather=1e2, copy=20.0, in_place=10.0))
    assert (copied.seconds, copied.copy_seconds) == (floor.seconds, floor.seconds)


def test_the_shape_counts_the_parameters_that_there_are() -> None:
    model = bench_train_sides.transcoder(SHAPE, RULES["topk"][0], None, CPU)
    assert model.n_parameters == SHAPE.n_parameters
    assert SHAPES["gpt2"].n_parameters == pytest.approx(1.7e9, rel=0.01)


@pytest.mark.parametrize("rule", ["topk", "jumprelu"])
def test_the_parts_make_up_the_step(rule: str) -> None:
    """By a clock that goes on by 1 whenever it is looked at: a part's time is the number of looks that end in it."""
    ours, reference = both(rule)
    clock = Clock(CPU)
    ticks = count()
    clock.now = lambda: float(next(ticks))  # type: ignore[method-assign]
    for side in (ours, reference):
        found = bench_train_parts.parts(side, clock, n=1)
        n_encoded = 1 if side is reference or rule == "jumprelu" else SHAPE.n_layers
        assert found["encode"] >= n_encoded
        assert all(found[part] >= 1 for part in bench_train_parts.PARTS)
        side()  # nothing is wrapped any more
        assert bench_train_parts.parts(side, clock, n=1) == found


def test_memory_that_is_not_there_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_train_shapes, "available_memory", lambda: 24 * 10**9)
    words = r"gpt2 does not fit: 1.7e\+09 parameters, 27.2 GB of weights.* of 2 sides, .* GB in all.*; 24 GB there"
    options = composed("bench.shapes=[gpt2]").bench
    with pytest.raises(UserError, match=words):
        bench_train_shapes.chosen(options, CPU, n_sides=1)
    kept, skipped = bench_train_shapes.chosen(composed().bench, CPU, n_sides=1)
    assert (list(kept), skipped) == (["A", "B"], {})


def test_a_gpu_takes_gpt2_where_it_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda")
    for there, fits in ((140 * 10**9, True), (40 * 10**9, False)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, there=there: (there, there))
        kept, skipped = bench_train_shapes.chosen(composed().bench, gpu, n_sides=2)
        assert ("gpt2" in kept, "gpt2" in skipped) == (fits, not fits)


def test_k_is_the_shapes_own_unless_it_is_given() -> None:
    topk, given = composed(), composed("activation.k=5")
    assert bench_train._for(topk, SHAPES["gpt2"]).activation.k == 32
    assert bench_train._for(topk, SHAPES["A"]).activation.k == 16
    assert bench_train._for(given, SHAPES["gpt2"]).activation.k == 5
    assert bench_train._for(composed("activation=jumprelu"), SHAPES["A"]).bench.l0 == 16
    assert bench_train._for(composed("activation=jumprelu", "bench.l0=7"), SHAPES["A"]).bench.l0 == 7


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["bench.rounds=2"], r"bench.rounds >= 3.*; mend"),
        (["bench.shapes=[C]"], r"C does not exist; choose from A, B, gpt2, custom"),
        (["bench.shapes=[custom]"], r"no size of its own; set one"),
        (["bench.shapes=[A]", "bench.d_model=9"], r"bench.d_model is a size of the custom shape; use"),
        (["bench.d_features=0"], r"bench.d_features=0 must be at least 1"),
        (["bench.kernels=[fast]"], r"there is no fast; choose from torch"),
        (["bench.l0=4"], r"bench.l0 has no meaning for activation=topk; use activation.k=4"),
        (["activation=groupmax"], r"no dense groupmax; use one of activation=topk"),
        (["loss=auxk"], r"has no loss.aux_k, so nothing fair to compare; use loss=mse"),
        (["activation.rank=norm"], r"has no activation.rank"),
        (["bench.threads=0"], r"bench.threads=0 must be at least 1; leave it out"),
        (["bench.tokens=many"], r"many"),
    ],
)
def test_what_measures_nothing_is_refused(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        bench_train.run(composed("bench.device=cpu", *words))
    assert not list(tmp_path.iterdir())


def test_threads_are_put_back() -> None:
    before = torch.get_num_threads()
    with bench_train._threads(before + 1) as threads:
        assert threads == torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before
