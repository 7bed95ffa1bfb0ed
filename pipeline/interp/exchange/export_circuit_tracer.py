"""circuit-tracer's directories: a cross-layer transcoder (CLT), or a set of transcoders of one layer each.

    config.yaml              model_kind, the hooks (within a block), model_name, scan; what it does not know it leaves
    W_enc_{l}.safetensors    W_enc_{l} [F, D], b_enc_{l} [F], b_dec_{l} [D], threshold_{l} [F] unless the rule is ReLU
    W_dec_{l}.safetensors    W_dec_{l} [F, L - l, D]; [:, j] writes layer l + j
    layer_{l}.safetensors    of a set: W_enc [F, D], W_dec [F, D], b_enc, b_dec, activation_function.threshold, W_skip
                             [D, D] (added: W_skip x)

A layer's tensors are in memory at a time. The files are plain safetensors, since circuit-tracer reads decoder rows from
them as it needs them.
"""

from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from pipeline.errors import UserError
from pipeline.files import save_tensors
from pipeline.interp.exchange import export_weights
from pipeline.interp.exchange.export_options import ExportOptions, StoredDtype
from pipeline.interp.exchange.export_weights import DTYPES, OUTPUT_HOOK, Layer, Source
from pipeline.progress import Progress

FEATURES = "./data/features"
"""Where circuit-tracer's front end looks for examples of features, beside the graphs that it serves."""

CLT, SET = "cross_layer_transcoder", "transcoder_set"


def check(source: Source) -> None:
    """UserError for a run that cannot be said exactly in this format."""
    to = "circuit-tracer"
    export_weights.check_features(source, to)
    export_weights.check_replaces_mlps(source, to)
    layers = source.config["cache"]["request"]["model"]["layers"]
    if layers is not None:
        raise UserError(
            f"{source.run} covers layers {layers[0]} to {layers[1] - 1} of its model (model.layers), and "
            "circuit-tracer "
            "replaces the MLPs of all; extract and train with model.layers=null"
        )
    if source.arch.skip and not source.own_layer_alone():
        raise UserError(
            f"{source.run}: arch={source.arch.name} has a skip path beside features that write several layers; "
            "circuit-tracer drops that path without a word; use to=huggingface, or train with arch.skip=false or "
            "arch=skip"
        )
    source.input_hook  # noqa: B018  refuses what has no hook


def kind(source: Source) -> str:
    return SET if source.own_layer_alone() else CLT


def write(source: Source, folder: Path, options: ExportOptions) -> None:
    """Fill a directory, a layer at a time. `check` comes first."""
    dtype = DTYPES[options.dtype]
    per_layer = kind(source) == SET
    with Progress(source.n_layers, "layers", "export") as progress:
        for l, layer in enumerate(source.layers()):
            if per_layer:
                save_tensors(_of_set(layer, source.is_relu, dtype), folder / f"layer_{l}.safetensors")
            else:
                tail = source.n_layers - l
                save_tensors(_encoder(layer, l, source.is_relu, dtype), folder / f"W_enc_{l}.safetensors")
                save_tensors({f"W_dec_{l}": padded(layer.W_dec, tail).to(dtype)}, folder / f"W_dec_{l}.safetensors")
            progress.update(1)
    (folder / "config.yaml").write_text(yaml.safe_dump(config(source, options), sort_keys=False))


def config(source: Source, options: ExportOptions) -> dict[str, Any]:
    return {
        "model_kind": kind(source),
        "feature_input_hook": source.input_hook,
        "feature_output_hook": OUTPUT_HOOK,
        "model_name": export_weights.model_name(source, options.model_name),
        "scan": FEATURES,
        "clt_pipeline": export_weights.about(source, StoredDtype(options.dtype)),
    }


def padded(W_dec: Tensor, n: int) -> Tensor:
    """Zeros for the targets beyond a reach. [F, M, D] -> [F, n, D]"""
    missing = n - W_dec.shape[1]
    if not missing:
        return W_dec.contiguous()
    return torch.cat([W_dec, W_dec.new_zeros(W_dec.shape[0], missing, W_dec.shape[2])], dim=1)


def _encoder(layer: Layer, l: int, is_relu: bool, dtype: torch.dtype) -> dict[str, Tensor]:
    rule = {} if is_relu else {f"threshold_{l}": layer.threshold.contiguous()}
    return {
        f"W_enc_{l}": layer.W_enc.to(dtype).contiguous(),
        f"b_enc_{l}": layer.b_enc.contiguous(),
        f"b_dec_{l}": layer.b_dec.contiguous(),
        **rule,
    }


def _of_set(layer: Layer, is_relu: bool, dtype: torch.dtype) -> dict[str, Tensor]:
    rule = {} if is_relu else {"activation_function.threshold": layer.threshold.contiguous()}
    skip = {} if layer.W_skip is None else {"W_skip": layer.W_skip.to(dtype).contiguous()}
    return {
        "W_enc": layer.W_enc.to(dtype).contiguous(),
        "W_dec": layer.W_dec[:, 0].to(dtype).contiguous(),
        "b_enc": layer.b_enc.contiguous(),
        "b_dec": layer.b_dec.contiguous(),
        **rule,
        **skip,
    }
