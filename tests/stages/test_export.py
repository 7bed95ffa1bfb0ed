"""`clt export` and `clt import`: what is written, found again or refused, and that a round trip changes nothing."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import pipeline
from pipeline.config import compose
from pipeline.core.activations import FixedThreshold
from pipeline.data import models
from pipeline.data.options import ModelOptions
from pipeline.errors import UserError
from pipeline.stages import evaluate, export, generate, import_run
from pipeline.train import artifact
from tests.oracle import normal

FORMATS = ["circuit-tracer", "huggingface"]


def words(tiny_gpt2: Path, english: Path) -> list[str]:
    """The model and text of the tiny cache."""
    text = ["dataset=text", f"dataset.path={english}", "dataset.context=24", "dataset.n_tokens=3k"]
    return ["model=local", f"model.path={tiny_gpt2}", *text, "dataset.held_out=20"]


@pytest.fixture
def words_of(tiny_gpt2: Path, english: Path) -> list[str]:
    return words(tiny_gpt2, english)


def exported(*more: str) -> Path:
    return export.run(compose("export", ["run=topk", *more]))


@pytest.mark.parametrize("to", FORMATS)
def test_the_same_export_again_costs_nothing(finished: Path, to: str, caplog: pytest.LogCaptureFixture) -> None:
    place = exported(f"to={to}")
    assert place == Path("runs/topk/export") / to
    times = {file: file.stat().st_mtime_ns for file in place.rglob("*")}
    with caplog.at_level(logging.INFO):
        assert exported(f"to={to}") == place
    assert "already there" in caplog.text
    assert {file: file.stat().st_mtime_ns for file in place.rglob("*")} == times


def test_it_says_where_what_and_what_next(finished: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        place = exported("to=circuit-tracer", "path=out/new")
    assert f"{place}   6 files of weights" in caplog.text
    assert "mlp.hook_in -> hook_mlp_out" in caplog.text
    assert f"takes a model that is a directory, {models_path()}" in caplog.text
    with caplog.at_level(logging.INFO):
        exported("to=circuit-tracer", "path=out/named", "export.model_name=gpt2")
    assert f"next: circuit-tracer attribute -m gpt2 -t {Path.cwd()}/out/named" in caplog.text


def models_path() -> str:
    return str(artifact.read("runs/topk").config["model"]["path"])


def test_a_directory_of_something_else_is_left_alone(finished: Path) -> None:
    Path("mine").mkdir()
    Path("mine/notes.txt").write_text("keep me")
    with pytest.raises(UserError, match="mine exists and is no export"):
        exported("to=circuit-tracer", "path=mine")
    assert [file.name for file in Path("mine").iterdir()] == ["notes.txt"]
    exported("to=circuit-tracer", "path=out")
    with pytest.raises(UserError, match=r"out holds another export \(other export\)"):
        exported("to=circuit-tracer", "path=out", "export.dtype=bfloat16")
    with pytest.raises(UserError, match=r"out holds another export \(other format"):
        exported("to=huggingface", "path=out")
    Path("out/W_dec_1.safetensors").unlink()
    with pytest.raises(UserError, match=r"W_dec_1\.safetensors is missing or was changed"):
        exported("to=circuit-tracer", "path=out")


def test_a_refusal_leaves_nothing_behind(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="to=circuit-tracer, to=saelens, to=huggingface"):
        exported()
    with pytest.raises(UserError, match="SAELens has transcoders of one layer"):
        exported("to=saelens", "path=a/b/c")
    assert not Path("a").exists()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pipeline.interp.exchange.export_circuit_tracer.save_tensors", full)
    with pytest.raises(UserError, match=r"free some space"):
        exported("to=circuit-tracer", "path=a/b/c")
    assert not Path("a").exists()


def test_a_round_trip_gives_the_same_bits_and_outputs(finished: Path, words_of: list[str]) -> None:
    exported("to=circuit-tracer", "path=out")
    run = import_run.run(compose("import", [*words_of, "path=out", "name=back"]))
    before, after = artifact.read("runs/topk"), artifact.read(run)
    x = normal(7, 3, 20, dtype=torch.float32)
    expected, found = before.transcoder(x), after.transcoder(x)
    assert (expected.features > 0).any()
    assert torch.equal(found.features, expected.features)
    assert torch.equal(found.y_hat, expected.y_hat)
    for name, tensor in before.transcoder.weights().items():
        assert torch.equal(after.transcoder.weights()[name], tensor), name
    assert torch.equal(after.y_mean, before.y_mean)  # of the same cache
    assert after.config["cache"]["key"] == before.config["cache"]["key"]
    assert after.exact() is None


@pytest.mark.slow
def test_an_imported_run_is_measured_and_generates_as_the_first_does(finished: Path, words_of: list[str]) -> None:
    exported("to=circuit-tracer", "path=out")
    import_run.run(compose("import", [*words_of, "path=out", "name=back"]))
    few = ["eval.curves=false", "eval.faithfulness=false", "eval.bootstrap=0"]
    files = [evaluate.run(compose("eval", [f"run={run}", *few])) for run in ("topk", "back")]
    first, second = (json.loads(file.read_text()) for file in files)
    for group in ("l0", "fvu", "replacement", "dead_fraction"):
        assert first[group] == second[group], group
    texts = []
    for run in ("topk", "back"):
        file = generate.run(compose("generate", [f"run={run}", "prompt=The old", "to=out.json", "generate.n_tokens=3"]))
        assert file is not None
        texts.append(json.loads(file.read_text())["replacement"])
    assert texts[0] == texts[1]


def test_without_a_cache_the_mean_is_of_text_that_no_evaluation_sees(
    finished: Path, words_of: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    exported("to=circuit-tracer", "path=out")
    far = ["path=out", "name=back", "cache.dir=elsewhere", "read.contexts=9"]
    with caplog.at_level(logging.INFO):
        run = import_run.run(compose("import", [*words_of, *far]))
    assert not Path("elsewhere").exists()
    assert "clt extract model=local" in caplog.text
    found, cached = artifact.read(run), artifact.read("runs/topk")
    assert found.config["imported"]["y_mean"] == "207 tokens of text's calibration split"
    lm = models.load(ModelOptions(name="local", path=models_path(), device="cpu"))
    assert found.config["model"] == json.loads(json.dumps(cached.config["model"]))
    assert found.y_mean.shape == (lm.n_layers, lm.d_model)
    assert torch.nn.functional.cosine_similarity(found.y_mean, cached.y_mean).min() > 0.9
    with pytest.raises(UserError, match=r"run: clt extract"):
        evaluate.run(compose("eval", ["run=back", "cache.dir=elsewhere"]))
    again = ["dataset=text", words_of[3], "dataset.context=24", "dataset.held_out=2", "eval.curves=false"]
    evaluate.run(compose("eval", ["run=back", *again, "eval.faithfulness=false", "eval.bootstrap=0"]))


def test_encoders_before_the_norms_gain_are_read_as_what_comes_behind_it(finished: Path, words_of: list[str]) -> None:
    exported("to=circuit-tracer", "path=out")
    lm = models.load(ModelOptions(name="tiny", path=models_path(), device="cpu"))
    norm, resid = lm.mlp_norm(), normal(7, 3, 20, dtype=torch.float32)
    expected = artifact.read("runs/topk").transcoder(norm(resid))
    for l in range(3):
        file = Path(f"out/W_enc_{l}.safetensors")
        tensors = load_file(file)
        # h = W (gain n + bias) + b, n what comes before the gain
        tensors[f"b_enc_{l}"] = tensors[f"b_enc_{l}"] + tensors[f"W_enc_{l}"] @ norm.bias[l]
        tensors[f"W_enc_{l}"] = tensors[f"W_enc_{l}"] * norm.gain[l]
        save_file(tensors, file)
    rewrite(Path("out/config.yaml"), feature_input_hook="ln2.hook_normalized")
    run = import_run.run(compose("import", [*words_of, "path=out", "name=back"]))
    found = artifact.read(run).transcoder(norm(resid))
    assert artifact.read(run).config["arch"]["site"] == "mlp_in"
    torch.testing.assert_close(found.pre_acts, expected.pre_acts, rtol=1e-4, atol=1e-4)


def rewrite(file: Path, **values: object) -> None:
    file.write_text(yaml.safe_dump(yaml.safe_load(file.read_text()) | values))


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"feature_input_hook": "attn.hook_z"}, "reads attn.hook_z, and only hook_resid_mid, mlp.hook_in"),
        ({"feature_output_hook": "hook_attn_out"}, "writes hook_attn_out"),
        ({"clt_pipeline": {"base_model": {"name": "x", "weights_sha256": "0" * 64}}}, "made for other weights of x"),
    ],
)
def test_what_cannot_stand_in_for_this_models_mlps_is_refused_and_no_run_is_made(
    finished: Path, words_of: list[str], change: dict[str, Any], why: str
) -> None:
    exported("to=circuit-tracer", "path=out")
    rewrite(Path("out/config.yaml"), **change)
    with pytest.raises(UserError, match=why):
        import_run.run(compose("import", [*words_of, "path=out", "name=back"]))
    assert not Path("runs/back").exists()


def test_a_model_of_other_sizes_is_refused(finished: Path) -> None:
    exported("to=circuit-tracer", "path=out")
    with pytest.raises(UserError, match=r"has \(n_layers, d_model\) = \(3, 20\), .* of model=world have \(4, 128\)"):
        import_run.run(compose("import", ["path=out", "name=back", "read.contexts=2"]))
    with pytest.raises(UserError, match="needs path="):
        import_run.run(compose("import", ["name=back"]))
    assert not Path("runs/back").exists()


def set_run(place: Path, arch: str) -> None:
    """A finished run of random one-layer transcoders on the tiny model."""
    from pipeline.arch import table
    from pipeline.arch.base import Dims
    from pipeline.arch.options import ArchOptions
    from pipeline.core.options import ActivationOptions

    old = artifact.read("runs/topk")
    options = ArchOptions(arch, d_features=14, skip=arch == "skip")
    threshold = normal(3, 14, seed=5, dtype=torch.float32).abs()
    model = table.build(options, Dims(3, 20), FixedThreshold(threshold))
    with torch.no_grad():
        for seed, parameter in enumerate(model.parameters()):
            parameter.copy_(normal(*parameter.shape, seed=seed, dtype=torch.float32))
    kept = {name: old.config[name] for name in ("units", "hooks", "model", "dataset", "cache", "train")}
    described = artifact.describe(options, model.dims, ActivationOptions("jumprelu"))
    artifact.save(place, model, threshold, old.y_mean, described | kept)


@pytest.mark.parametrize("to", ["circuit-tracer", "saelens"])
@pytest.mark.parametrize("arch", ["per_layer", "skip"])
def test_transcoders_of_a_layer_come_back_from_either_format(
    finished: Path, words_of: list[str], arch: str, to: str
) -> None:
    set_run(Path("runs/set"), arch)
    export.run(compose("export", ["run=set", f"to={to}", "path=out"]))
    run = import_run.run(compose("import", [*words_of, "path=out", "name=back"]))
    before, after = artifact.read("runs/set"), artifact.read(run)
    assert after.config["arch"]["name"] == arch
    for name, tensor in before.transcoder.weights().items():
        assert torch.equal(after.transcoder.weights()[name], tensor), name
    x = normal(7, 3, 20, dtype=torch.float32)
    assert torch.equal(after.transcoder(x).y_hat, before.transcoder(x).y_hat)


def test_a_name_on_the_hub_is_fetched_with_what_it_lists(
    finished: Path, words_of: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    set_run(Path("runs/set"), "skip")
    export.run(compose("export", ["run=set", "to=circuit-tracer", "path=set"]))
    asked: list[Any] = []
    Path("snapshot/folder").mkdir(parents=True)
    shutil.copy("set/config.yaml", "snapshot/folder/config.yaml")
    listed = [f"hf://them/weights/deep/l{l}.safetensors?revision=abc" for l in range(3)]
    rewrite(Path("snapshot/folder/config.yaml"), transcoders=listed)

    def snapshot(repository: str, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((repository, revision, "folder/config.yaml" in allow_patterns))
        return str(Path("snapshot").resolve())

    def file(repository: str, name: str, revision: str | None) -> str:
        asked.append((repository, name, revision))
        return str(Path(f"set/layer_{name[-13]}.safetensors").resolve())

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", file)
    hub = ["path=owner/name/folder", "read.revision=v1", "name=back"]
    run = import_run.run(compose("import", [*words_of, *hub]))
    assert asked[0] == ("owner/name", "v1", True)
    assert asked[1:] == [("them/weights", f"deep/l{l}.safetensors", "abc") for l in range(3)]
    x = normal(7, 3, 20, dtype=torch.float32)
    assert torch.equal(pipeline.load(run)(x).y_hat, pipeline.load("runs/set")(x).y_hat)


def test_what_is_neither_a_directory_nor_on_the_hub_is_refused(
    finished: Path, words_of: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in ("./nowhere", "/no/where", "nowhere"):
        with pytest.raises(UserError, match="is no directory"):
            import_run.run(compose("import", [*words_of, f"path={path}", "name=back"]))

    def offline(*_: object, **__: object) -> str:
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(UserError, match=r"the hub did not give it \(OSError\); .*hf download owner/name"):
        import_run.run(compose("import", [*words_of, "path=owner/name", "name=back"]))
