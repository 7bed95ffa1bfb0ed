"""A transcoder whose features lie on several ranks does what it does in one piece."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor

from pipeline.arch.base import Dims, Transcoder
from pipeline.arch.options import ArchOptions, Tie
from pipeline.core.activations import FixedThreshold
from pipeline.core.metrics import Tree
from pipeline.core.options import ActivationOptions, Rank
from pipeline.core.sparse import Sparse
from pipeline.dist import shard as shards
from pipeline.dist.joined import Joined
from pipeline.dist.mesh import Mesh
from pipeline.errors import UserError
from pipeline.interp import decoder_mass, edits, evaluation
from pipeline.interp.evaluation import HeldOut
from pipeline.stages import evaluate, evaluate_ranks
from pipeline.train import artifact, row_files
from pipeline.train.artifact import Trained
from pipeline.train.calibrate import shuffled_batches
from pipeline.train.options import WeightsIn
from tests import oracle
from tests.dist import threads

T = TypeVar("T")
B, C, L, D, F = 21, 3, 3, 6, 44
GRIDS = [(2, 1), (3, 1), (2, 2)]
ARCHS = {
    "clt": oracle.arch_options("clt", d_features=F, skip=True),
    "clt of reach 1": oracle.arch_options("clt", d_features=F, max_reach=1),
    "per_layer": oracle.arch_options("per_layer", d_features=F),
    "skip": oracle.arch_options("skip", d_features=F),
    "tied": oracle.arch_options("tied", d_features=F, offset=True),
    "tied to target": oracle.arch_options("tied", d_features=F, tie=Tie.target),
    "sae": oracle.arch_options("sae", d_features=F),
    "crosscoder": oracle.arch_options("crosscoder", d_features=F),
    "molt": oracle.arch_options("molt", d_features=F),
    "matryoshka": oracle.arch_options("matryoshka", d_features=F),
}
RULES = {
    "topk": ActivationOptions("topk", k=4),
    "topk by norm": ActivationOptions("topk", k=4, rank=Rank.norm),
    "batchtopk": ActivationOptions("batchtopk", k_per_layer=[3, 4, 2]),
    "batchtopk_across": ActivationOptions("batchtopk_across", k=3),
    "groupmax": ActivationOptions("groupmax", k=4),
}


def saved(directory: Path, arch: ArchOptions, rule: ActivationOptions) -> Path:
    """A run with random weights."""
    model = oracle.transcoder(arch, d_features=F, n_layers=L, d_model=D)
    size = (model.n_sources, F)
    tensors = {**model.weights(), "y_mean": torch.zeros(L, D), "threshold": oracle.normal(*size, seed=3).abs()}
    norms = {"rank_norms": 1 + oracle.normal(*size, seed=4).abs()} if rule.rank == Rank.norm else {}
    artifact.write(directory, tensors | norms, artifact.describe(arch, Dims(L, D), rule))
    return directory


def opened(run: Path, mesh: Mesh) -> tuple[Trained, Transcoder | None]:
    """In float64."""
    trained, place = evaluate_ranks.read(run, WeightsIn.memory, "cpu", mesh)
    trained.transcoder.double()
    trained.rank_norms = None if trained.rank_norms is None else trained.rank_norms.double()
    return trained, evaluate_ranks.opened(trained, place, torch.device("cpu"))


def of_one_and_many(run: Path, grid: tuple[int, int], work: Callable[[Trained, Any, Mesh], T]) -> tuple[T, list[T]]:
    def of_rank(mesh: Mesh) -> T:
        with torch.no_grad():
            return work(*opened(run, mesh), mesh)

    return threads.run(1, 1, of_rank)[0], threads.run(*grid, of_rank)


def fitted(model: Transcoder, mesh: Mesh, batch: int = 4) -> tuple[dict[str, Tensor], Tree, Tensor]:
    """(sums of each context, numbers beside them, how often each feature fired) on 21 tokens in batches."""
    x, y = oracle.normal(B, L, D), oracle.normal(B, L, D, seed=2)
    held_out = HeldOut(torch.zeros(C, B // C + 1).numpy(), B, lambda rows: (x[rows], y[rows]))
    fit = evaluation.fit(model, held_out, shuffled_batches(B, batch, seed=0), mesh.data)
    return fit.sums(), fit.beside() | fit.firing.percentiles(), fit.firing.fires


def assert_same_fit(alone: Any, many: list[Any]) -> None:
    sums, beside, fires = alone
    assert 0 < (fires > 0).double().mean() < 1
    for other_sums, other_beside, other_fires in many:
        assert torch.equal(other_fires, fires)
        assert other_beside.keys() == beside.keys()
        for name in beside.keys() - {"bias"}:
            assert other_beside[name] == beside[name], name
        for name, values in sums.items():
            torch.testing.assert_close(other_sums[name], values, rtol=1e-12, atol=1e-12)
        assert torch.equal(other_sums["l0_sum"], sums["l0_sum"])


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("name", sorted(ARCHS))
def test_the_thresholds_fit_as_in_one_piece(tmp_path: Path, name: str, grid: tuple[int, int]) -> None:
    run = saved(tmp_path, ARCHS[name], RULES["topk"])
    alone, many = of_one_and_many(run, grid, lambda trained, _, mesh: fitted(trained.transcoder, mesh))
    assert_same_fit(alone, many)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize(
    ("name", "rule"),
    [
        *(("clt", rule) for rule in sorted(RULES)),
        *((name, "batchtopk") for name in ("molt", "matryoshka", "tied")),
        ("crosscoder", "topk"),
        ("skip", "topk by norm"),
    ],
)
def test_the_rule_of_training_chooses_as_in_one_piece(
    tmp_path: Path, name: str, rule: str, grid: tuple[int, int]
) -> None:
    """Data ranks have batches of their own: nobody competes across them."""
    run = saved(tmp_path, ARCHS[name], RULES[rule])
    alone, many = of_one_and_many(run, grid, lambda _, exact, mesh: fitted(exact, mesh))
    assert_same_fit(alone, many)


@pytest.mark.parametrize("name", ["relu", "jumprelu"])
def test_rules_that_choose_nothing_are_their_thresholds(tmp_path: Path, name: str) -> None:
    run = saved(tmp_path, ARCHS["clt"], oracle.activation_options(name))
    alone, many = of_one_and_many(
        run, (3, 1), lambda trained, exact, mesh: (*fitted(trained.transcoder, mesh), exact is None)
    )
    assert all(one[-1] for one in [alone, *many])
    assert_same_fit(alone[:-1], [one[:-1] for one in many])


def parts_of(model: Transcoder) -> dict[str, Tensor]:
    """All else that an evaluation asks a transcoder for."""
    x = oracle.normal(B, L, D)
    features = edits.features_of(model, x)
    found = {"written": edits.written(model, features, x), "y_hat": model(x).y_hat}
    found |= {"norms": model.decoder_norms(), "features": features.dense()}
    assert isinstance(model.activation, FixedThreshold)
    found["threshold"] = model.activation.threshold
    ids = torch.tensor([40, 3, 3, 21])
    for source, h in enumerate(model.inputs(x)):
        found[f"pre_acts {source}"] = model.pre_acts_of(h, source, ids)
        some = edits.one_each(model, source, torch.arange(B) * 2 % F, torch.ones(B, dtype=x.dtype))
        found[f"one {source}"] = edits.written(model, some, x)
    if model.causal:
        live = [model.layer_features(h, layer) for layer, h in enumerate(x.unbind(1))]
        for layer in range(L):
            so_far = Sparse([one for one, _ in live[: layer + 1]], [values for _, values in live[: layer + 1]])
            found[f"layer {layer}"] = model.decode_layer(so_far, layer, x[:, layer])
        found["decoders"] = decoder_mass.of_decoders(model)
        context = torch.arange(B) // (B // C)
        found["mass"] = decoder_mass.by_context(model, lambda rows: x[rows], context, C, 5)
    return found


@pytest.mark.parametrize("n", [2, 3])
@pytest.mark.parametrize("name", sorted(ARCHS))
def test_each_rank_has_the_whole_answer(tmp_path: Path, name: str, n: int) -> None:
    run = saved(tmp_path, ARCHS[name], RULES["topk"])
    alone, many = of_one_and_many(run, (n, 1), lambda trained, *_: parts_of(trained.transcoder))
    assert alone["written"].abs().sum() > 0
    for found in many:
        assert found.keys() == alone.keys()
        for part, values in alone.items():
            assert (found[part] - values).abs().max() <= 1e-10 * (1 + values.abs().max()), part
        for part in ("features", "threshold", "norms"):
            assert torch.equal(found[part] > 0, alone[part] > 0)


def test_a_rule_that_runs_live_asks_the_other_ranks(tmp_path: Path) -> None:
    run = saved(tmp_path, ARCHS["clt"], RULES["topk"])

    def y_hat(_: Trained, exact: Transcoder, mesh: Mesh) -> Tensor:
        x = oracle.normal(B, L, D)
        live = [exact.layer_features(h, layer) for layer, h in enumerate(x.unbind(1))]
        return exact.decode_layer(Sparse([p for p, _ in live], [v for _, v in live]), L - 1, x[:, L - 1])

    alone, many = of_one_and_many(run, (3, 1), y_hat)
    for found in many:
        torch.testing.assert_close(found, alone, rtol=1e-12, atol=1e-12)


def test_where_nothing_is_active_there_is_the_bias(tmp_path: Path) -> None:
    run = saved(tmp_path, ARCHS["per_layer"], RULES["topk"])

    def y_hat(trained: Trained, _: Transcoder | None, mesh: Mesh) -> Tensor:
        return trained.transcoder(oracle.normal(2, L, D)).y_hat

    silent = artifact.read(run).transcoder
    tensors = {**silent.weights(), "threshold": torch.full((L, F), 1e9), "y_mean": torch.zeros(L, D)}
    artifact.write(tmp_path / "silent", tensors, artifact.config_of(artifact.folder(run)))
    alone, many = of_one_and_many(tmp_path / "silent", (3, 1), y_hat)
    assert all(torch.equal(found, alone) for found in many)
    assert torch.equal(alone[0], silent.b_dec.double())


def test_what_needs_all_rows_at_once_fails(tmp_path: Path) -> None:
    """Rather than take those of one rank for all."""
    run = saved(tmp_path, ARCHS["clt"], RULES["topk"])

    def asked(trained: Trained, _: Transcoder | None, mesh: Mesh) -> list[str]:
        failed = []
        for name in ("W_enc", "W_dec", "encoders", "W_skip"):
            try:
                getattr(trained.transcoder, name)
            except AttributeError:
                failed.append(name)
        return failed

    _, many = of_one_and_many(run, (2, 1), asked)
    assert many == 2 * [["W_enc", "W_dec", "encoders", "W_skip"]]


@pytest.mark.parametrize("name", ["clt", "molt", "matryoshka"])
def test_a_rank_reads_and_holds_its_own_rows_alone(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run = saved(tmp_path, ARCHS[name], RULES["topk"])
    read: list[list[tuple[str, str, int]]] = []
    begin = row_files.Stored.__init__

    def noted(self: row_files.Stored, *args: Any) -> None:
        begin(self, *args)
        read.append(self.slices)

    def of_tensors() -> Counter[str]:
        found: Counter[str] = Counter()
        for slices in read:
            for _, tensor, n in slices:
                found[tensor] += n
        read.clear()
        return found

    monkeypatch.setattr(row_files.Stored, "__init__", noted)
    whole, of_one = artifact.read(run).transcoder, of_tensors()
    once = whole.b_dec.numel() + (0 if whole.W_skip is None else whole.W_skip.numel())
    rows = whole.n_parameters - once

    def held(mesh: Mesh) -> tuple[int, int, int]:
        trained, place = evaluate_ranks.read(run, WeightsIn.memory, "cpu", mesh)
        assert place is not None
        evaluate_ranks.opened(trained, place, torch.device("cpu"))
        assert isinstance(trained.transcoder, Joined)
        part = trained.transcoder.part.n_parameters
        return part, trained.transcoder.n_parameters - part, place[0].shard.n

    found = threads.run(3, 1, held)
    assert sum(part for part, *_ in found) == rows + 3 * once
    for part, beside, n in found:
        assert abs((part - once) - rows * n / F) < 0.35 * rows / 3  # transforms are not equally large
        assert beside <= L * D + 2 * L * F  # b_dec, thresholds and b_enc of all features
    for tensor, n in of_tensors().items():
        assert n == of_one[tensor] * (3 if tensor in ("b_dec", "W_skip", "y_mean") else 1), tensor


def test_numbers_of_the_weights_are_those_of_one_piece(tmp_path: Path) -> None:
    run = saved(tmp_path, ARCHS["clt"], RULES["topk"])
    alone, many = of_one_and_many(run, (3, 1), lambda trained, *_: evaluate._weights(trained.transcoder))
    assert many == 3 * [alone]


def test_features_that_cannot_be_shared_are_refused_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = saved(tmp_path, ARCHS["molt"], RULES["topk"])
    monkeypatch.setattr(artifact, "read", None)
    with pytest.raises(UserError, match=r"4 mixtures of 11 transforms: not enough for dist.features=5 ranks; use "):
        threads.run(5, 1, lambda mesh: evaluate_ranks.read(run, WeightsIn.memory, "cpu", mesh))
    assert len(shards.shards(ARCHS["molt"], RULES["topk"], L, 4)) == 4
