"""Directories of other tools that are not whole, or say what cannot be said here, are refused with the reason."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline.errors import UserError
from pipeline.interp.exchange import export_circuit_tracer, export_saelens, import_files
from pipeline.interp.exchange.export_options import ExportOptions
from pipeline.interp.exchange.export_weights import Source
from tests.interp.exports import D, F, L, finished, options


def directory(place: Path, architecture: str, kind: Any = export_circuit_tracer) -> Path:
    finished(place / "run", options(architecture))
    (place / "out").mkdir()
    kind.write(Source(place / "run"), place / "out", ExportOptions())
    return place / "out"


def rewrite(file: Path, **values: object) -> None:
    file.write_text(yaml.safe_dump(yaml.safe_load(file.read_text()) | values))


def change(file: Path, name: str, value: Callable[[Tensor], Tensor] | Tensor | None) -> None:
    """Another tensor in a file; None takes it out."""
    tensors = load_file(file)
    old = tensors.pop(name, None)
    if value is not None:
        tensors[name] = value if isinstance(value, Tensor) else value(old)  # type: ignore[arg-type]
    save_file(tensors, file)


BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a layer too few": (
        lambda out: [(out / f"W_{w}_1.safetensors").unlink() for w in ("enc", "dec")],
        r"without \[1\]; every layer of the model is needed",
    ),
    "a decoder too few": (lambda out: (out / "W_dec_2.safetensors").unlink(), "3 W_enc files, 2 W_dec files"),
    "another number of features": (
        lambda out: change(out / "W_enc_1.safetensors", "W_enc_1", lambda W: W[:5].clone()),
        rf"W_enc of layer 1 is \[5, {D}\], \[{F}, {D}\] is needed",
    ),
    "a target too few": (
        lambda out: change(out / "W_dec_0.safetensors", "W_dec_0", lambda W: W[:, :2].clone()),
        rf"W_dec of layer 0 is \[{F}, 2, {D}\], \[{F}, {L}, {D}\] is needed",
    ),
    "a bias too few": (lambda out: change(out / "W_enc_1.safetensors", "b_dec_1", None), "b_dec of layer 1 is missing"),
    "not a number": (
        lambda out: change(out / "W_enc_2.safetensors", "b_dec_2", lambda b: b * float("nan")),
        "b_dec of layer 2 is not finite",
    ),
    "a negative threshold": (
        lambda out: change(out / "W_enc_2.safetensors", "threshold_2", lambda t: t - 1e3),
        f"{F} thresholds are below 0",
    ),
    "a threshold missing": (
        lambda out: change(out / "W_enc_2.safetensors", "threshold_2", None),
        "some layers have thresholds",
    ),
    "a skip path": (
        lambda out: change(out / "W_enc_1.safetensors", "W_skip_1", torch.eye(D)),
        "circuit-tracer leaves it out without a word",
    ),
    "a torn file": (lambda out: (out / "W_dec_1.safetensors").write_bytes(b"12345678"), "cannot be read"),
    "ranked features": (lambda out: rewrite(out / "config.yaml", activation="topk", k=8), "activation=topk, k=8"),
    "another kind": (lambda out: rewrite(out / "config.yaml", model_kind="lorsa"), "model_kind=lorsa is not known"),
    "a hook missing": (lambda out: rewrite(out / "config.yaml", feature_input_hook=None), "says no feature_input_hook"),
    "no configuration": (lambda out: (out / "config.yaml").unlink(), "holds neither config.yaml"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_clt_directory_that_is_not_whole_is_refused(tmp_path: Path, what: str) -> None:
    out, (breaking, why) = directory(tmp_path, "clt"), BROKEN[what]
    import_files.read(out)
    breaking(out)
    with pytest.raises(UserError, match=why):
        import_files.read(out)


def test_a_set_with_a_skip_path_in_some_layers_is_refused(tmp_path: Path) -> None:
    out = directory(tmp_path, "skip")
    change(out / "layer_1.safetensors", "W_skip", None)
    with pytest.raises(UserError, match="some layers have W_skip and some have none"):
        import_files.read(out)


@pytest.mark.parametrize("kind", [export_circuit_tracer, export_saelens])
@pytest.mark.parametrize("architecture", ["per_layer", "skip"])
def test_what_was_exported_is_read_as_it_was(tmp_path: Path, architecture: str, kind: Any) -> None:
    out = directory(tmp_path, architecture, kind)
    found, stored = import_files.read(out), load_file(tmp_path / "run/final/transcoder.safetensors")
    assert found.arch == architecture
    assert (found.input_hook, found.output_hook, found.model_name) == ("mlp.hook_in", "hook_mlp_out", "owner/tiny")
    for name, tensor in found.weights.items():
        assert torch.equal(tensor, stored[name]), name
    assert torch.equal(found.threshold, stored["threshold"])


def test_more_than_nine_layers_are_in_their_order(tmp_path: Path) -> None:
    for l in range(11):
        save_file(
            {
                "W_enc": torch.full((F, D), float(l)),
                "W_dec": torch.zeros(F, D),
                "b_enc": torch.zeros(F),
                "b_dec": torch.zeros(D),
            },
            tmp_path / f"layer_{l}.safetensors",
        )
    hooks = {"feature_input_hook": "mlp.hook_in", "feature_output_hook": "hook_mlp_out"}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"model_kind": "transcoder_set", **hooks}))
    found = import_files.read(tmp_path)
    assert found.weights["W_enc"][:, 0, 0].tolist() == list(range(11))
    assert not found.threshold.any()


def test_bfloat16_files_are_read_exactly(tmp_path: Path) -> None:
    out = directory(tmp_path, "clt")
    change(out / "W_dec_1.safetensors", "W_dec_1", lambda W: W.bfloat16())
    expected = load_file(tmp_path / "run/final/transcoder.safetensors")["W_dec.1"].bfloat16().float()
    assert torch.equal(import_files.read(out).weights["W_dec.1"], expected)


def test_saelens_settings_that_are_no_part_of_the_weights_are_refused(tmp_path: Path) -> None:
    out = directory(tmp_path, "per_layer", export_saelens)
    file = out / "layer_1/cfg.json"
    whole = json.loads(file.read_text())
    for settings, why in (
        ({"normalize_activations": "expected_average_only_in"}, "normalize_activations=expected"),
        ({"apply_b_dec_to_input": True}, "apply_b_dec_to_input=True"),
        ({"architecture": "topk"}, "architecture topk is not imported"),
        ({"metadata": {}}, "metadata needs hook_name"),
        ({"metadata": whole["metadata"] | {"hook_name": "blocks.0.mlp.hook_in"}}, "metadata needs hook_name"),
    ):
        file.write_text(json.dumps(whole | settings))
        with pytest.raises(UserError, match=why):
            import_files.read(out)
    shutil.rmtree(out / "layer_1")
    with pytest.raises(UserError, match=r"for layers \[0, 2\], without \[1\]"):
        import_files.read(out)
