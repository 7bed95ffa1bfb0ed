"""What an export holds, tensor by tensor, against the formulas of the tools that read it; and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

import pipeline
from pipeline.arch.options import Site, Target, Tie
from pipeline.errors import UserError
from pipeline.interp.exchange import export_circuit_tracer, export_huggingface, export_saelens
from pipeline.interp.exchange.export_options import ExportOptions, StoredDtype
from pipeline.interp.exchange.export_weights import Source
from tests.interp.exports import ABOUT, D, F, L, finished, inputs, options

CLTS: dict[str, dict[str, Any]] = {
    "clt": {"name": "clt"},
    "reach": {"name": "clt", "max_reach": 1},
    "matryoshka": {"name": "matryoshka"},
    "tied source": {"name": "tied", "tie": Tie.source},
    "tied target": {"name": "tied", "tie": Tie.target},
}
SETS: dict[str, dict[str, Any]] = {
    "per_layer": {"name": "per_layer"},
    "skip": {"name": "skip"},
    "reach 0": {"name": "clt", "max_reach": 0},
    "reach 0, skip": {"name": "clt", "max_reach": 0, "skip": True},
}


def made(settings: dict[str, Any]) -> Any:
    settings = dict(settings)
    return options(settings.pop("name"), **settings)


def written(kind: Any, run: Path, folder: Path, **settings: Any) -> Source:
    source = Source(run)
    kind.check(source)
    folder.mkdir()
    kind.write(source, folder, ExportOptions(**settings))
    return source


def rule(h: Tensor, threshold: Tensor | None) -> Tensor:
    return h.relu() if threshold is None else h * (h > threshold)


def clt_outputs(folder: Path, x: Tensor) -> tuple[Tensor, Tensor]:
    """circuit-tracer's forward pass, from the files. [B, L, D] -> features [B, L, F], y_hat [B, L, D]"""
    encoders = [load_file(folder / f"W_enc_{l}.safetensors") for l in range(L)]
    decoders = [load_file(folder / f"W_dec_{l}.safetensors")[f"W_dec_{l}"] for l in range(L)]
    a = [
        rule(x[:, l] @ f[f"W_enc_{l}"].float().T + f[f"b_enc_{l}"], f.get(f"threshold_{l}"))
        for l, f in enumerate(encoders)
    ]
    y = [encoders[m][f"b_dec_{m}"] + sum(a[l] @ decoders[l][:, m - l].float() for l in range(m + 1)) for m in range(L)]
    return torch.stack(a, dim=1), torch.stack(y, dim=1)


def set_outputs(folder: Path, x: Tensor) -> tuple[Tensor, Tensor]:
    features, y = [], []
    for l in range(L):
        f = load_file(folder / f"layer_{l}.safetensors")
        features.append(rule(x[:, l] @ f["W_enc"].T + f["b_enc"], f.get("activation_function.threshold")))
        skip = x[:, l] @ f["W_skip"].T if "W_skip" in f else 0
        y.append(features[-1] @ f["W_dec"] + f["b_dec"] + skip)
    return torch.stack(features, dim=1), torch.stack(y, dim=1)


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("name", CLTS)
def test_a_clt_directory_computes_what_the_run_computes(tmp_path: Path, name: str, relu: bool) -> None:
    model = finished(tmp_path / "run", made(CLTS[name]), relu)
    written(export_circuit_tracer, tmp_path / "run", tmp_path / "out")
    features, y_hat = clt_outputs(tmp_path / "out", inputs())
    expected = model(inputs())
    assert (expected.features > 0).any()
    torch.testing.assert_close(features, expected.features, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(y_hat, expected.y_hat, rtol=1e-5, atol=1e-5)
    assert [f"threshold_{l}" in load_file(tmp_path / f"out/W_enc_{l}.safetensors") for l in range(L)] == [not relu] * L
    for l in range(L):
        assert load_file(tmp_path / f"out/W_dec_{l}.safetensors")[f"W_dec_{l}"].shape == (F, L - l, D)


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("name", SETS)
def test_a_transcoder_set_computes_what_the_run_computes(tmp_path: Path, name: str, relu: bool) -> None:
    model = finished(tmp_path / "run", made(SETS[name]), relu)
    written(export_circuit_tracer, tmp_path / "run", tmp_path / "out")
    features, y_hat = set_outputs(tmp_path / "out", inputs())
    expected = model(inputs())
    torch.testing.assert_close(features, expected.features, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(y_hat, expected.y_hat, rtol=1e-5, atol=1e-5)
    kind = yaml.safe_load((tmp_path / "out/config.yaml").read_text())["model_kind"]
    assert kind == "transcoder_set"


def test_thresholds_in_one_layer_are_written_in_all_since_the_first_file_decides(tmp_path: Path) -> None:
    finished(tmp_path / "run", options("clt"))
    file = tmp_path / "run/final/transcoder.safetensors"
    tensors = load_file(file)
    tensors["threshold"][:2] = 0
    save_file(tensors, file)
    written(export_circuit_tracer, tmp_path / "run", tmp_path / "out")
    found = torch.stack([load_file(tmp_path / f"out/W_enc_{l}.safetensors")[f"threshold_{l}"] for l in range(L)])
    assert torch.equal(found, tensors["threshold"])


def test_layers_out_of_reach_are_written_as_zeros(tmp_path: Path) -> None:
    finished(tmp_path / "run", options("clt", max_reach=1))
    written(export_circuit_tracer, tmp_path / "run", tmp_path / "out")
    W_dec = load_file(tmp_path / "out/W_dec_0.safetensors")["W_dec_0"]
    assert W_dec[:, :2].any()
    assert not W_dec[:, 2].any()


@pytest.mark.parametrize(("site", "hook"), [(Site.mlp_in, "mlp.hook_in"), (Site.resid_mid, "hook_resid_mid")])
def test_the_configuration_names_the_hooks_the_model_and_where_examples_lie(
    tmp_path: Path, site: Site, hook: str
) -> None:
    finished(tmp_path / "run", options("clt", site=site))
    written(export_circuit_tracer, tmp_path / "run", tmp_path / "out")
    found = yaml.safe_load((tmp_path / "out/config.yaml").read_text())
    about = found.pop("clt_pipeline")
    assert found == {
        "model_kind": "cross_layer_transcoder",
        "feature_input_hook": hook,
        "feature_output_hook": "hook_mlp_out",
        "model_name": "owner/tiny",
        "scan": "./data/features",
    }
    assert about["base_model"]["weights_sha256"] == "f" * 64
    assert "/home/someone" not in json.dumps(about)


def test_openais_models_go_by_the_names_that_transformer_lens_gives_them(tmp_path: Path) -> None:
    asked = {"name": "gpt2", "path": "openai-community/gpt2", "revision": None, "layers": None}
    finished(tmp_path / "run", options("clt"), about=ABOUT | {"cache": {"key": "k", "request": {"model": asked}}})
    source = written(export_circuit_tracer, tmp_path / "run", tmp_path / "out")
    assert export_circuit_tracer.config(source, ExportOptions())["model_name"] == "gpt2"
    assert export_circuit_tracer.config(source, ExportOptions(model_name="mine"))["model_name"] == "mine"


def test_bfloat16_halves_the_weights_and_keeps_thresholds_as_they_are(tmp_path: Path) -> None:
    finished(tmp_path / "run", options("clt"))
    written(export_circuit_tracer, tmp_path / "run", tmp_path / "out", dtype=StoredDtype.bfloat16)
    file, stored = (
        load_file(tmp_path / "out/W_enc_1.safetensors"),
        load_file(tmp_path / "run/final/transcoder.safetensors"),
    )
    assert file["W_enc_1"].dtype == torch.bfloat16
    assert torch.equal(file["W_enc_1"], stored["W_enc"][1].bfloat16())
    assert torch.equal(file["threshold_1"], stored["threshold"][1])
    assert torch.equal(file["b_enc_1"], stored["b_enc"][1])


REFUSED = [
    (export_circuit_tracer, options("clt", skip=True), "a skip path beside features that write several layers"),
    (export_circuit_tracer, options("tied", skip=True), "a skip path beside features that write several layers"),
    (export_circuit_tracer, options("tied", offset=True), "arch.offset=true"),
    (export_circuit_tracer, options("molt"), "matrices with a gate"),
    (export_circuit_tracer, options("crosscoder"), "read all layers at once"),
    (export_circuit_tracer, options("sae", site=Site.mlp_out), "reconstructs what it reads"),
    (export_saelens, options("clt"), "SAELens has transcoders of one layer"),
    (export_saelens, options("crosscoder"), "read all layers at once"),
]


@pytest.mark.parametrize(("kind", "arch", "why"), REFUSED, ids=[f"{k.__name__[16:]} {a.name}" for k, a, _ in REFUSED])
def test_what_a_format_cannot_say_is_refused_with_the_reason(tmp_path: Path, kind: Any, arch: Any, why: str) -> None:
    finished(tmp_path / "run", arch)
    with pytest.raises(UserError, match=why):
        kind.check(Source(tmp_path / "run"))


def test_a_run_on_some_layers_is_refused_by_circuit_tracer_and_numbered_by_the_model_in_saelens(tmp_path: Path) -> None:
    asked = {"name": "tiny", "path": "owner/tiny", "revision": None, "layers": [4, 7]}
    about = ABOUT | {"cache": {"key": "k", "request": {"model": asked}}}
    finished(tmp_path / "run", options("per_layer"), about=about)
    with pytest.raises(UserError, match="covers layers 4 to 6"):
        export_circuit_tracer.check(Source(tmp_path / "run"))
    written(export_saelens, tmp_path / "run", tmp_path / "out")
    assert sorted(place.name for place in (tmp_path / "out").iterdir()) == ["layer_4", "layer_5", "layer_6"]
    config = json.loads((tmp_path / "out/layer_5/cfg.json").read_text())
    assert config["metadata"]["hook_name"] == "blocks.5.mlp.hook_in"


def test_parallel_blocks_have_no_residual_stream_between_attention_and_mlp(tmp_path: Path) -> None:
    about = ABOUT | {"model": ABOUT["model"] | {"architecture": "GPTNeoXForCausalLM"}}
    finished(tmp_path / "run", options("clt", site=Site.resid_mid), about=about)
    with pytest.raises(UserError, match="blocks are parallel"):
        export_circuit_tracer.check(Source(tmp_path / "run"))


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("skip", [False, True])
def test_saelens_directories_compute_what_the_run_computes(tmp_path: Path, skip: bool, relu: bool) -> None:
    model = finished(tmp_path / "run", options("skip" if skip else "per_layer"), relu)
    written(export_saelens, tmp_path / "run", tmp_path / "out")
    expected, x = model(inputs()), inputs()
    for l in range(L):
        place = tmp_path / f"out/layer_{l}"
        f, config = load_file(place / "sae_weights.safetensors"), json.loads((place / "cfg.json").read_text())
        name = ("" if relu else "jumprelu_") + ("skip_" if skip else "") + "transcoder"
        assert (config["architecture"], config["d_in"], config["d_sae"], config["d_out"]) == (name, D, F, D)
        assert config["apply_b_dec_to_input"] is False
        assert f["W_enc"].shape == (D, F)
        a = rule(x[:, l] @ f["W_enc"] + f["b_enc"], f.get("threshold"))
        y = a @ f["W_dec"] + f["b_dec"] + (x[:, l] @ f["W_skip"].T if skip else 0)
        torch.testing.assert_close(a, expected.features[:, l], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(y, expected.y_hat[:, l], rtol=1e-5, atol=1e-5)


def test_an_sae_is_written_as_one(tmp_path: Path) -> None:
    finished(tmp_path / "run", options("sae", site=Site.resid_mid, target=Target.site))
    written(export_saelens, tmp_path / "run", tmp_path / "out")
    config = json.loads((tmp_path / "out/layer_2/cfg.json").read_text())
    assert config["architecture"] == "jumprelu"
    assert config["metadata"]["hook_name"] == "blocks.2.hook_resid_mid"
    assert "d_out" not in config
    assert "hook_name_out" not in config["metadata"]


@pytest.mark.parametrize("architecture", ["clt", "tied", "molt", "crosscoder", "sae"])
def test_a_folder_for_the_hub_is_loaded_as_a_run_is(tmp_path: Path, architecture: str) -> None:
    model = finished(tmp_path / "run", options(architecture))
    written(export_huggingface, tmp_path / "run", tmp_path / "out")
    loaded = pipeline.load(tmp_path / "out")
    assert torch.equal(loaded(inputs()).y_hat, model(inputs()).y_hat)
    assert "/home/someone" not in (tmp_path / "out/config.json").read_text()


def test_a_bfloat16_folder_is_loaded_too(tmp_path: Path) -> None:
    model = finished(tmp_path / "run", options("clt"))
    written(export_huggingface, tmp_path / "run", tmp_path / "out", dtype=StoredDtype.bfloat16)
    loaded = pipeline.load(tmp_path / "out")
    assert torch.equal(loaded.W_enc, model.W_enc.bfloat16().float())
    assert torch.equal(loaded.b_enc, model.b_enc)


def test_the_card_says_what_was_measured_and_nothing_else(tmp_path: Path) -> None:
    finished(tmp_path / "run", options("clt"))
    written(export_huggingface, tmp_path / "run", tmp_path / "none")
    card = (tmp_path / "none/README.md").read_text()
    header = yaml.safe_load(card.split("---")[1])
    assert header["base_model"] == "owner/tiny"
    assert "license" not in header
    assert "Licence: to be filled in" in card
    assert "Nothing yet" in card
    assert "| 9.57" not in card
    metrics = {
        "n_tokens": 1234,
        "split": "evaluation",
        "l0": {"total": 9.57},
        "fvu": {"pooled": 0.25},
        "replacement": None,
        "ci95": {"fvu": {"pooled": [0.2, 0.3]}},
    }
    (tmp_path / "run/eval").mkdir()
    (tmp_path / "run/eval/metrics.json").write_text(json.dumps(metrics))
    written(export_huggingface, tmp_path / "run", tmp_path / "out", licence="mit", model_name="owner/other")
    card = (tmp_path / "out/README.md").read_text()
    header = yaml.safe_load(card.split("---")[1])
    assert (header["license"], header["base_model"]) == ("mit", "owner/other")
    assert "| 9.57 |" in card
    assert "| 0.2500 | 0.2000 to 0.3000 |" in card
    assert "1,234 held-out tokens" in card
    assert "KL(" not in card
    assert "Licence: to be filled in" not in card


def test_negative_thresholds_are_refused(tmp_path: Path) -> None:
    finished(tmp_path / "run", options("clt"))
    file = tmp_path / "run/final/transcoder.safetensors"
    tensors = load_file(file)
    tensors["threshold"][1, 2] = -0.1
    save_file(tensors, file)
    with pytest.raises(UserError, match="below 0"):
        Source(tmp_path / "run")
