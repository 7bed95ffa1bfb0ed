"""A finished transcoder survives the disk, in the model's units, and can say what rule it was trained with."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from pipeline.arch.base import Dims, Transcoder
from pipeline.arch.options import ArchOptions, Site
from pipeline.arch.table import ARCHS, n_sources
from pipeline.core import activations
from pipeline.core.activations import ACTIVATIONS, FixedThreshold
from pipeline.core.normalize import Scaling
from pipeline.core.options import ActivationOptions, Rank, ThetaGrad
from pipeline.core.sparse import Sparse
from pipeline.errors import UserError
from pipeline.plain import from_plain
from pipeline.train import artifact, finished
from tests import oracle

B, L, F, D = 5, 3, 11, 6


def write(
    run: Path, architecture: str = "clt", activation: ActivationOptions | None = None
) -> tuple[Transcoder, Tensor, Tensor]:
    """A random transcoder written as a finished run -> itself, its thresholds, the mean target."""
    options = oracle.arch_options(architecture, site=Site.resid_mid)
    theta, y_mean = torch.rand(n_sources(options, Dims(L, D)), F), oracle.normal(L, D, seed=4, dtype=torch.float32)
    model = oracle.transcoder(options, FixedThreshold(theta), dtype=torch.float32)
    rule = activation or oracle.activation_options("topk")
    config: dict[str, Any] = {**artifact.describe(options, model.dims, rule), "metrics": {"fvu": 0.25}}
    assert artifact.save(run, model, theta, y_mean, config) == run / "final"
    return model, theta, y_mean


def inputs() -> Tensor:
    return oracle.normal(B, L, D, dtype=torch.float32)


@pytest.mark.parametrize("architecture", sorted(ARCHS))
@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_a_finished_run_is_read_as_it_was_written(tmp_path: Path, architecture: str, activation: str) -> None:
    model, theta, y_mean = write(tmp_path, architecture, oracle.activation_options(activation))
    trained = artifact.read(tmp_path)
    before, after = model(inputs()), trained.transcoder(inputs())
    assert torch.equal(after.features, before.features)
    assert torch.equal(after.y_hat, before.y_hat)
    assert (before.features > 0).any()
    assert type(trained.transcoder) is ARCHS[architecture]
    assert torch.equal(trained.transcoder.activation.threshold, theta)
    assert torch.equal(trained.y_mean, y_mean)
    assert trained.path == tmp_path
    assert trained.site == Site.resid_mid
    assert trained.config["metrics"] == {"fvu": 0.25}
    assert trained.config["schema"] == artifact.SCHEMA
    assert trained.config["activation"]["name"] == activation
    assert not trained.transcoder.training
    assert not any(p.requires_grad for p in trained.transcoder.parameters())


def test_the_files_are_two_and_their_tensors_are_those_documented(tmp_path: Path) -> None:
    from safetensors import safe_open

    model, *_ = write(tmp_path)
    final = tmp_path / "final"
    assert {path.name for path in final.iterdir()} == {"transcoder.safetensors", "config.json"}
    with safe_open(final / "transcoder.safetensors", "pt") as file:
        shapes = {name: tuple(file.get_tensor(name).shape) for name in file.keys()}  # noqa: SIM118
        for l in range(L):
            # Slot j of W_dec[l] writes layer l + j.
            stored = file.get_tensor(f"W_dec.{l}")
            assert all(torch.equal(stored[:, j], table) for j, table in enumerate(model.tables(l)))
    assert shapes == {
        "W_enc": (L, F, D),
        "b_enc": (L, F),
        **{f"W_dec.{l}": (F, L - l, D) for l in range(L)},
        "b_dec": (L, D),
        "threshold": (L, F),
        "y_mean": (L, D),
    }


def test_a_finished_run_works_in_the_models_units(tmp_path: Path) -> None:
    """Trained on normalised rows, calibrated, folded, written, read: x and y of the base model in and out."""
    theta = torch.rand(L, F, dtype=torch.float64)
    model = oracle.transcoder("clt", FixedThreshold(theta))
    maps = Scaling(
        oracle.normal(L, D, seed=20),
        oracle.normal(L, D, seed=21).abs() + 0.5,
        oracle.normal(L, D, seed=22),
        torch.tensor([[7.0], [0.1], [2.0]]) * (oracle.normal(L, D, seed=23).abs() + 0.5),
    )
    x = oracle.normal(B, L, D) * maps.x_scale + maps.x_mean
    expected = model(maps.x(x))
    model.fold(maps)
    config = artifact.describe(ArchOptions("clt", d_features=F), model.dims, oracle.activation_options("topk"))
    artifact.save(tmp_path, model, theta, maps.y_mean, config)
    got = finished.load(tmp_path)(x.float())
    assert oracle.normwise(got.features, expected.features) < 1e-5
    assert oracle.normwise(got.y_hat, maps.y_inverse(expected.y_hat)) < 1e-5


def test_loading_gives_the_transcoder_with_its_description(tmp_path: Path) -> None:
    model, *_ = write(tmp_path)
    loaded = finished.load(str(tmp_path))
    assert torch.equal(loaded(inputs()).y_hat, model(inputs()).y_hat)
    assert loaded.config == json.loads((tmp_path / "final" / "config.json").read_text())
    assert loaded.config is not None
    assert loaded.config["arch"]["site"] == "resid_mid"


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_the_exact_rule_is_the_one_of_training_on_the_same_weights(tmp_path: Path, activation: str) -> None:
    write(tmp_path, "clt", oracle.activation_options(activation))
    trained = artifact.read(tmp_path)
    exact = trained.exact()
    if not ACTIVATIONS[activation].chooses:
        assert exact is None
        return
    assert exact is not None
    assert type(exact.activation) is ACTIVATIONS[activation]
    ours, theirs = dict(trained.transcoder.named_parameters()), dict(exact.named_parameters())
    assert ours.keys() == theirs.keys()
    for name, parameter in ours.items():
        assert parameter.data_ptr() == theirs[name].data_ptr(), name
    assert not exact.training
    out = exact(inputs())
    assert isinstance(out.features, Sparse)
    h = oracle.encode(inputs(), exact.W_enc, exact.b_enc)
    # Of 11 features groupmax makes one group, of which the largest is the one that top 1 keeps.
    chosen = oracle.top_k(h, 1) if activation == "groupmax" else oracle.SELECTIONS[activation](h, 2)
    expected = oracle.at_pairs(h, chosen)
    assert torch.equal(out.features.dense() > 0, expected > 0)
    assert oracle.normwise(out.features.dense(), expected) < 1e-6
    # The thresholds stay those of the finished run.
    assert isinstance(trained.transcoder.activation, FixedThreshold)


def test_every_setting_of_the_rule_is_kept(tmp_path: Path) -> None:
    rule = ActivationOptions("jumprelu", threshold=0.03, bandwidth=2.0, theta_grad=ThetaGrad.gdm)
    write(tmp_path, "clt", rule)
    kept = artifact.read(tmp_path).config["activation"]
    given = {name: value for name, value in kept.items() if value is not None}
    assert given == {"name": "jumprelu", "threshold": 0.03, "bandwidth": 2.0, "theta_grad": "gdm"}
    rule = ActivationOptions("topk", k_per_layer=[1, 2, 3], k_start=5, k_anneal=0.5, rank=Rank.norm)
    write(tmp_path / "other", "clt", rule)
    assert from_plain(ActivationOptions, artifact.read(tmp_path / "other").config["activation"]) == rule


def test_a_rule_of_another_version_is_refused_by_name(tmp_path: Path) -> None:
    write(tmp_path)
    change(tmp_path, activation={"name": "groupmax", "k": 3})
    trained = artifact.read(tmp_path)
    assert trained.transcoder(inputs()).y_hat.shape == (B, L, D)  # the thresholds need no such rule
    with pytest.raises(UserError, match="groupmax"):
        trained.exact()


def change(run: Path, **values: object) -> None:
    file = run / "final" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.mark.parametrize("schema", [None, 0, 2, "1"])
def test_another_schema_is_refused(tmp_path: Path, schema: object) -> None:
    write(tmp_path)
    change(tmp_path, schema=schema)
    with pytest.raises(UserError, match=r"schema"):
        artifact.read(tmp_path)


def test_an_unfinished_run_is_refused_with_the_command_that_finishes_it(tmp_path: Path) -> None:
    run = tmp_path / "demo"
    for _ in range(2):
        with pytest.raises(UserError, match=r"demo holds no finished transcoder.*clt train name=demo"):
            finished.load(run)
        (run / "checkpoints").mkdir(parents=True, exist_ok=True)


def test_an_interrupted_save_leaves_the_earlier_result(tmp_path: Path) -> None:
    model, theta, y_mean = write(tmp_path)
    with pytest.raises(TypeError):
        artifact.save(tmp_path, model, theta + 1, y_mean, {"metrics": object()})
    assert torch.equal(artifact.read(tmp_path).transcoder.activation.threshold, theta)
    assert [path.name for path in tmp_path.iterdir()] == ["final"]


@pytest.mark.parametrize("rule", ["topk", "groupmax", "batchtopk", "batchtopk_across"])
def test_a_rule_that_ranks_by_norm_ranks_by_the_norms_of_training_after_folding(tmp_path: Path, rule: str) -> None:
    options = replace(oracle.activation_options(rule), rank=Rank.norm)
    model = oracle.transcoder("clt", activations.build(options, L, F))
    x = oracle.normal(B, L, D)
    y_scale = torch.tensor([[100.0], [1.0], [0.01]]).expand(L, D).double()
    scaling = Scaling(torch.zeros(L, D), torch.ones(L, D), torch.zeros(L, D), y_scale)
    before, norms = model.choose(x).dense().detach(), model.rank_norms()
    assert norms is not None
    model.fold(scaling)
    refolded = model.choose(x).dense()
    config = {**artifact.describe(ArchOptions("clt", d_features=F), model.dims, options), "metrics": {}}
    artifact.save(tmp_path, model, torch.zeros(L, F), torch.zeros(L, D), config, norms)
    exact = artifact.read(tmp_path).exact()
    assert exact is not None
    torch.testing.assert_close(exact.choose(x.float()).dense(), before.float(), rtol=1e-5, atol=1e-5)
    assert not torch.equal(refolded > 0, before > 0) or rule == "groupmax"
    assert "rank_norms" in load_file(tmp_path / "final" / "transcoder.safetensors")


def test_a_rule_that_ranks_by_value_stores_no_norms(tmp_path: Path) -> None:
    write(tmp_path)
    assert artifact.read(tmp_path).rank_norms is None
