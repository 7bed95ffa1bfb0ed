"""SAELens's directories, one a layer: layer_{l}/cfg.json and layer_{l}/sae_weights.safetensors (`SAE.load_from_disk`).

    W_enc [D, F] (ours transposed), b_enc [F], W_dec [F, D], b_dec [D], threshold [F] unless the rule is ReLU,
    W_skip [D, D] (added: W_skip x)

SAELens has transcoders and SAEs of one layer and no cross-layer ones. Layers are numbered as the base model's.
"""

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from pipeline.arch.options import Target
from pipeline.errors import UserError
from pipeline.files import save_tensors
from pipeline.interp.exchange import export_weights
from pipeline.interp.exchange.export_options import ExportOptions, StoredDtype
from pipeline.interp.exchange.export_weights import DTYPES, OUTPUT_HOOK, Layer, Source
from pipeline.progress import Progress

VERSION = "6.54.12"
"""Of SAELens, whose formats these are; it writes its version into every cfg.json."""


def check(source: Source) -> None:
    """UserError for a run that is no set of transcoders or SAEs of one layer each."""
    export_weights.check_features(source, "saelens")
    if not source.own_layer_alone():
        raise UserError(
            f"{source.run}: arch={source.arch.name} writes several layers, and SAELens has transcoders of "
            "one layer alone; "
            "use to=circuit-tracer, or train with arch=per_layer or arch.max_reach=0"
        )
    if not _is_sae(source):
        export_weights.check_replaces_mlps(source, "saelens")
    source.input_hook  # noqa: B018  refuses what has no hook


def write(source: Source, folder: Path, options: ExportOptions) -> None:
    """Fill a directory, a layer at a time. `check` comes first."""
    dtype = DTYPES[options.dtype]
    with Progress(source.n_layers, "layers", "export") as progress:
        for l, layer in enumerate(source.layers(), source.first_layer):
            place = folder / f"layer_{l}"
            place.mkdir()
            tensors = _tensors(layer, source.is_relu)
            # One dtype for all: SAELens has a single one in cfg.json, and takes it for products as well.
            stored = {name: tensor.to(dtype).contiguous() for name, tensor in tensors.items()}
            save_tensors(stored, place / "sae_weights.safetensors")
            (place / "cfg.json").write_text(json.dumps(config(source, l, options), indent=2) + "\n")
            progress.update(1)


def architecture(source: Source) -> str:
    """SAELens's name of it."""
    if _is_sae(source):
        return "standard" if source.is_relu else "jumprelu"
    skip = "skip_" if source.arch.skip else ""
    return f"{skip}transcoder" if source.is_relu else f"jumprelu_{skip}transcoder"


def config(source: Source, layer: int, options: ExportOptions) -> dict[str, Any]:
    """cfg.json of a layer, counted as in the base model."""
    D, block = source.d_model, f"blocks.{layer}."
    writes = {} if _is_sae(source) else {"hook_name_out": block + OUTPUT_HOOK}
    dataset = source.config["dataset"]
    return {
        "architecture": architecture(source),
        "d_in": D,
        "d_sae": source.arch.d_features,
        **({} if _is_sae(source) else {"d_out": D}),
        "dtype": options.dtype.value,
        "device": "cpu",
        "apply_b_dec_to_input": False,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {
            "sae_lens_version": VERSION,
            "sae_lens_training_version": None,
            "model_name": export_weights.model_name(source, options.model_name),
            "hook_name": block + source.input_hook,
            **writes,
            "hook_head_index": None,
            "model_class_name": "HookedTransformer",
            "model_from_pretrained_kwargs": {
                "fold_ln": False, "center_writing_weights": False, "center_unembed": False
            },
            "prepend_bos": dataset.get("bos") != "none",
            "context_size": dataset.get("context"),
            "dataset_path": dataset.get("path") or dataset.get("name"),
            "clt_pipeline": export_weights.about(source, StoredDtype(options.dtype)),
        },
    }  # fmt: skip


def _is_sae(source: Source) -> bool:
    return source.arch.target == Target.site


def _tensors(layer: Layer, is_relu: bool) -> dict[str, Tensor]:
    tensors = {"W_enc": layer.W_enc.T, "b_enc": layer.b_enc, "W_dec": layer.W_dec[:, 0], "b_dec": layer.b_dec}
    if not is_relu:
        tensors["threshold"] = layer.threshold
    return tensors if layer.W_skip is None else tensors | {"W_skip": layer.W_skip}
