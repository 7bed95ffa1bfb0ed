"""Directories of other tools, read and checked: circuit-tracer's CLTs and sets of transcoders, SAELens's transcoders.

What comes out is what our files hold (`train/artifact.py`), in float32. What the rule a = h 1[h > threshold] with
thresholds of 0 or more cannot say is refused with a reason, as is a directory with a layer too few.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pipeline.errors import UserError

TRANSCODERS = {"transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder"}
"""SAELens's architectures that are read."""

Tensors = dict[str, Tensor]


class Found(NamedTuple):
    """A set of features for each layer of a model."""

    arch: str
    """clt, per_layer or skip."""
    weights: Tensors
    """As `Transcoder.weights` names them, float32."""
    threshold: Tensor
    """[L, F]; 0: ReLU."""
    input_hook: str
    """Within a block."""
    output_hook: str
    model_name: str | None
    about: dict[str, Any]
    """What our own export wrote beside it; else empty."""

    @property
    def n_layers(self) -> int:
        return self.threshold.shape[0]

    @property
    def d_features(self) -> int:
        return self.threshold.shape[1]

    @property
    def d_model(self) -> int:
        return self.weights["b_dec"].shape[1]


def read(folder: Path) -> Found:
    """UserError for what is no such directory, and for one that is broken or incomplete."""
    if (folder / "config.yaml").is_file():
        return _circuit_tracer(folder)
    if any(folder.glob("*/cfg.json")):
        return _saelens(folder)
    raise UserError(
        f"{folder} holds neither config.yaml (circuit-tracer) nor LAYER/cfg.json (SAELens); give the "
        "directory that does"
    )


def config_of(folder: Path) -> dict[str, Any]:
    """config.yaml of a circuit-tracer directory."""
    try:
        config = yaml.safe_load((folder / "config.yaml").read_text())
    except yaml.YAMLError as error:
        raise UserError(f"{folder / 'config.yaml'} is no YAML ({error}); mend it") from error
    needed = ("model_kind", "feature_input_hook", "feature_output_hook")
    missing = [key for key in needed if not isinstance(config, dict) or not isinstance(config.get(key), str)]
    if missing:
        raise UserError(
            f"{folder / 'config.yaml'} says no {', '.join(missing)}; add what the transcoders were made with"
        )
    found: dict[str, Any] = config
    return found


def _circuit_tracer(folder: Path) -> Found:
    config = config_of(folder)
    if config.get("activation") not in (None, "relu", "jump_relu", "jumprelu") or config.get("k") is not None:
        what = f"activation={config.get('activation')}, k={config.get('k')}"
        raise UserError(
            f"{folder}: {what} in its config.yaml ranks features against each other, and only thresholds are imported; "
            "export the transcoders with fixed thresholds"
        )
    kinds: dict[str, Callable[[Path], list[Tensors]]] = {"cross_layer_transcoder": _clt, "transcoder_set": _set}
    if config["model_kind"] not in kinds:
        raise UserError(
            f"{folder}: model_kind={config['model_kind']} is not known; it must be one of {', '.join(kinds)}"
        )
    layers = kinds[config["model_kind"]](folder)
    return _found(
        folder,
        layers,
        is_clt=config["model_kind"] == "cross_layer_transcoder",
        input_hook=config["feature_input_hook"],
        output_hook=config["feature_output_hook"],
        model_name=config.get("model_name"),
        about=config.get("clt_pipeline") or {},
    )


def _clt(folder: Path) -> list[Tensors]:
    encoders, decoders = _numbered(folder, "W_enc_"), _numbered(folder, "W_dec_")
    if len(decoders) != len(encoders):
        raise UserError(f"{folder}: {len(encoders)} W_enc files, {len(decoders)} W_dec files; one is missing")
    layers = []
    for l, files in enumerate(zip(encoders, decoders, strict=True)):
        tensors = _tensors(files[0]) | _tensors(files[1])
        if f"W_skip_{l}" in tensors:
            raise UserError(
                f"{files[0]}: W_skip_{l}, a skip path beside features that write several layers: circuit-tracer "
                "leaves it "
                "out without a word and says nowhere which way round it is; leave it out of the file to do the same"
            )
        layers.append({name.removesuffix(f"_{l}"): tensor for name, tensor in tensors.items()})
    return layers


def _set(folder: Path) -> list[Tensors]:
    layers = []
    for file in _numbered(folder, "layer_"):
        tensors = _tensors(file)
        if "activation_function.threshold" in tensors:
            tensors["threshold"] = tensors.pop("activation_function.threshold")
        if tensors.get("W_dec", torch.empty(0)).ndim == 2:
            tensors["W_dec"] = tensors["W_dec"][:, None]
        layers.append(tensors)
    return layers


def _saelens(folder: Path) -> Found:
    places: dict[int, tuple[Path, dict[str, Any]]] = {}
    for file in sorted(folder.glob("*/cfg.json")):
        config = json.loads(file.read_text())
        layer = _saelens_layer(file, config)
        if layer in places:
            raise UserError(
                f"{folder}: {places[layer][0]} and {file.parent} are both of layer {layer}; keep one of them"
            )
        places[layer] = (file.parent, config)
    _check_numbers(folder, sorted(places), "directories of a layer")
    layers = []
    for _, (place, _config) in sorted(places.items()):
        tensors = _tensors(place / "sae_weights.safetensors")
        missing = {"W_enc", "W_dec"} - tensors.keys()
        if missing:
            raise UserError(f"{place}: no {', '.join(sorted(missing))} in its weights; export it again")
        tensors["W_enc"], tensors["W_dec"] = tensors["W_enc"].T.contiguous(), tensors["W_dec"][:, None]
        layers.append(tensors)
    metadata = places[0][1]["metadata"]
    read, written = (re.sub(r"^blocks\.\d+\.", "", metadata[name]) for name in ("hook_name", "hook_name_out"))
    about = metadata.get("clt_pipeline") or {}
    return _found(folder, layers, False, read, written, metadata.get("model_name"), about)


def _saelens_layer(file: Path, config: dict[str, Any]) -> int:
    """Of the base model. UserError for what is no plain transcoder."""
    architecture, metadata = config.get("architecture"), config.get("metadata") or {}
    if architecture not in TRANSCODERS:
        raise UserError(
            f"{file}: architecture {architecture} is not imported; it must be one of {', '.join(TRANSCODERS)}"
        )
    for key, plain in (
        ("normalize_activations", "none"),
        ("reshape_activations", "none"),
        ("apply_b_dec_to_input", False),
    ):
        if config.get(key, plain) != plain:
            raise UserError(f"{file}: {key}={config[key]} is no part of the weights; fold it into them, then import")
    match = re.fullmatch(r"blocks\.(\d+)\..+", str(metadata.get("hook_name")))
    if match is None or not str(metadata.get("hook_name_out")).startswith(f"blocks.{match[1]}."):
        raise UserError(
            f"{file}: metadata needs hook_name and hook_name_out of one layer (blocks.3.mlp.hook_in); add them"
        )
    return int(match[1])


def _found(
    folder: Path,
    layers: list[Tensors],
    is_clt: bool,
    input_hook: str,
    output_hook: str,
    model_name: str | None,
    about: dict[str, Any],
) -> Found:
    """The layers' tensors, checked against each other and stacked."""
    with_rule = {"threshold" in layer for layer in layers}
    if len(with_rule) > 1:
        raise UserError(f"{folder}: some layers have thresholds and some have none; a layer's file is not of this set")
    with_skip = {"W_skip" in layer for layer in layers}
    if len(with_skip) > 1:
        raise UserError(f"{folder}: some layers have W_skip and some have none; a layer's file is not of this set")
    _check_shapes(folder, layers, is_clt)
    threshold = torch.stack([layer.get("threshold", torch.zeros_like(layer["b_enc"])) for layer in layers])
    if not bool((threshold >= 0).all()):
        n = int((~(threshold >= 0)).sum())
        raise UserError(
            f"{folder}: {n} thresholds are below 0 or not numbers, so that features could be active at "
            "negative values, "
            "which attribution has no place for; raise them to 0"
        )
    weights = {name: torch.stack([layer.pop(name) for layer in layers]) for name in ("W_enc", "b_enc", "b_dec")}
    weights |= {f"W_dec.{l}": layer["W_dec"] for l, layer in enumerate(layers)}
    weights |= {"W_skip": torch.stack([layer["W_skip"] for layer in layers])} if with_skip == {True} else {}
    arch = "clt" if is_clt else "skip" if "W_skip" in weights else "per_layer"
    return Found(arch, weights, threshold, input_hook, output_hook, model_name, about)


def _check_shapes(folder: Path, layers: list[Tensors], is_clt: bool) -> None:
    L = len(layers)
    if "W_enc" not in layers[0] or layers[0]["W_enc"].ndim != 2:
        raise UserError(f"{folder}: layer 0 has no matrix W_enc; export it again")
    F, D = layers[0]["W_enc"].shape
    for l, layer in enumerate(layers):
        wanted = {"W_enc": (F, D), "b_enc": (F,), "b_dec": (D,), "W_dec": (F, L - l if is_clt else 1, D)}
        wanted |= {name: shape for name, shape in (("threshold", (F,)), ("W_skip", (D, D))) if name in layer}
        for name, shape in wanted.items():
            found = tuple(layer[name].shape) if name in layer else None
            if found != shape:
                says = "is missing" if found is None else f"is {list(found)}"
                raise UserError(
                    f"{folder}: {name} of layer {l} {says}, {list(shape)} is needed ({L} layers, layer 0 has {F} "
                    "features "
                    f"of width {D}); the files are not of one set"
                )
            if not bool(torch.isfinite(layer[name]).all()) and name != "threshold":
                raise UserError(f"{folder}: {name} of layer {l} is not finite everywhere; export it again")


def _numbered(folder: Path, prefix: str) -> list[Path]:
    """PREFIX0.safetensors, PREFIX1.safetensors, ... UserError when there is none or a number is left out."""
    numbers = [re.fullmatch(rf"{prefix}(\d+)", file.stem) for file in folder.glob(f"{prefix}*.safetensors")]
    layers = sorted(int(match[1]) for match in numbers if match)
    _check_numbers(folder, layers, f"files {prefix}*.safetensors")
    return [folder / f"{prefix}{l}.safetensors" for l in layers]


def _check_numbers(folder: Path, layers: list[int], what: str) -> None:
    if layers != list(range(len(layers))) or not layers:
        missing = sorted(set(range(max(layers, default=0) + 1)) - set(layers))
        raise UserError(f"{folder}: {what} for layers {layers}, without {missing}; every layer of the model is needed")


def _tensors(file: Path) -> Tensors:
    """All tensors of a file as float32, which holds float16 and bfloat16 exactly."""
    try:
        with safe_open(file, framework="pt") as opened:
            return {name: opened.get_tensor(name).float() for name in opened.keys()}  # noqa: SIM118  no mapping
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file} cannot be read ({error}); copy or export it again") from error
