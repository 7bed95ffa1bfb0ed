"""A finished run's weights a layer at a time, in the model's units, and what of a run other formats can say."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pipeline.arch.options import ArchOptions, Site, Target
from pipeline.errors import UserError
from pipeline.interp.exchange.export_options import StoredDtype
from pipeline.plain import from_plain
from pipeline.train import artifact

DTYPES = {StoredDtype.float32: torch.float32, StoredDtype.bfloat16: torch.bfloat16}

PARALLEL = {"GPTNeoXForCausalLM", "GPTJForCausalLM", "PhiForCausalLM", "FalconForCausalLM", "CohereForCausalLM"}
"""Architectures whose MLP reads the block's input: transformer_lens has no hook_resid_mid in them."""


class Layer(NamedTuple):
    """One layer. a = h 1[h > threshold] of h = W_enc x + b_enc; slot j of W_dec writes layer l + j."""

    W_enc: Tensor
    """[F, D]"""
    b_enc: Tensor
    """[F]"""
    W_dec: Tensor
    """[F, M, D]"""
    b_dec: Tensor
    """[D], added to this layer's output."""
    threshold: Tensor
    """[F]"""
    W_skip: Tensor | None
    """[D, D]: W_skip x is added to this layer's output."""


class Source:
    """A finished run, opened for export: its weights are read as they are asked for."""

    def __init__(self, run: Path) -> None:
        """UserError for a run that is not finished, and for thresholds that no format can hold."""
        self.run = run
        self.folder = artifact.folder(run)
        self.config: dict[str, Any] = artifact.config_of(self.folder)
        self.arch = from_plain(ArchOptions, self.config["arch"])
        self.n_layers, self.d_model = (int(self.config["dims"][name]) for name in ("n_layers", "d_model"))
        with artifact.stored(self.folder) as tensors:
            self.threshold: Tensor = tensors.read("threshold")
        if not bool((self.threshold >= 0).all()):
            raise UserError(
                f"{run}: some thresholds are below 0 or not numbers, under which a = h 1[h > threshold] would be "
                "negative elsewhere; convert or train the run again"
            )

    @property
    def is_relu(self) -> bool:
        """Whether the rule is max(h, 0): all thresholds are 0."""
        return not bool(self.threshold.any())

    @property
    def first_layer(self) -> int:
        """The base model's layer that is called 0 here."""
        layers = self.config["cache"]["request"]["model"]["layers"]
        return 0 if layers is None else int(layers[0])

    @property
    def input_hook(self) -> str:
        """What is read, as transformer_lens and circuit-tracer call it within a block."""
        architecture = self.config["model"]["architecture"]
        if self.arch.site == Site.resid_mid and architecture in PARALLEL:
            raise UserError(
                f"{self.run} reads arch.site=resid_mid, for which {architecture}, whose blocks are parallel, has "
                "no hook "
                "in transformer_lens; train with arch.site=mlp_in"
            )
        return {Site.mlp_in: "mlp.hook_in", Site.resid_mid: "hook_resid_mid", Site.mlp_out: OUTPUT_HOOK}[self.arch.site]

    def own_layer_alone(self) -> bool:
        """Whether each layer's features write that layer and no other."""
        return self.arch.name in {"per_layer", "skip", "sae"} or self.arch.max_reach == 0 or self.n_layers == 1

    def layers(self) -> Iterator[Layer]:
        """All layers, one in memory at a time."""
        if self.arch.name == "tied":
            yield from self._tied()
            return
        with artifact.stored(self.folder) as tensors:
            for layer in range(self.n_layers):
                skip = tensors.read("W_skip", layer=layer) if "W_skip" in tensors else None
                W_enc, b_enc, b_dec = (tensors.read(name, layer=layer) for name in ("W_enc", "b_enc", "b_dec"))
                yield Layer(W_enc, b_enc, tensors.read(f"W_dec.{layer}"), b_dec, self.threshold[layer], skip)

    def _tied(self) -> Iterator[Layer]:
        model = artifact.read(self.run, on_disk=True).transcoder
        with torch.no_grad():
            for layer in range(self.n_layers):
                W_dec = torch.stack([model.table(layer, target) for target in model.targets(layer)], dim=1)
                skip = None if model.W_skip is None else model.W_skip[layer]
                parts = (
                    model.encoder_rows(layer),
                    model.b_enc[layer],
                    W_dec,
                    model.b_dec[layer],
                    self.threshold[layer],
                )
                W_enc, b_enc, table, b_dec, threshold = (part.detach() for part in parts)
                yield Layer(W_enc, b_enc, table, b_dec, threshold, skip)


OUTPUT_HOOK = "hook_mlp_out"
"""What is written: what the MLP adds to the residual stream, behind the second norm where there is one (Gemma-2)."""


def check_features(source: Source, to: str) -> None:
    """UserError for what is no set of features with an encoder row and decoder rows at a layer."""
    arch, n = source.arch, source.run
    why = {
        "molt": "its transforms are matrices with a gate, and no format for features holds them",
        "crosscoder": "its features read all layers at once, and no format holds an encoder of several layers",
    }
    if arch.name in why:
        raise UserError(f"{n}: arch={arch.name} cannot be exported to {to}: {why[arch.name]}; use to=huggingface")
    if arch.name == "tied" and arch.offset:
        raise UserError(
            f"{n}: arch.offset=true adds to what an active feature writes, whatever its value, which {to} cannot say; "
            "use to=huggingface, or train with arch.offset=false"
        )


def check_replaces_mlps(source: Source, to: str) -> None:
    """UserError for what does not compute MLP outputs."""
    if source.arch.writes != Site.mlp_out or source.arch.target == Target.site:
        raise UserError(
            f"{source.run}: arch={source.arch.name} reconstructs what it reads; {to} holds transcoders, from one place "
            "of the model to the MLPs' outputs; use to=huggingface, or export a transcoder"
        )


def model_name(source: Source, given: str | None) -> str:
    """What others call the base model: its name on the hub, or its directory."""
    from pipeline.data.model_files import local_directory
    from pipeline.data.options import ModelOptions

    if given:
        return given
    asked = source.config["cache"]["request"]["model"]
    path = str(asked["path"])
    directory = local_directory(ModelOptions(name=asked["name"], path=path))
    if directory is not None:
        return str(directory)
    # transformer_lens knows OpenAI's models without their owner.
    return path.removeprefix("openai-community/")


def about(source: Source, dtype: StoredDtype) -> dict[str, Any]:
    """What every export says of where it comes from."""
    import pipeline

    config = source.config
    kept = ("name", "path", "revision", "architecture", "weights_sha256")
    return {
        "generator": f"clt-pipeline {pipeline.__version__}",
        "run": source.run.name,
        "arch": config["arch"],
        "activation": config["activation"],
        "rule": "a = h * (h > threshold), h = W_enc x + b_enc",
        "units": "the model's own: nothing to normalise",
        "base_model": {name: config["model"][name] for name in kept},
        "dataset": {name: config["dataset"].get(name) for name in ("name", "kind", "path", "bos", "context")},
        "dtype": dtype.value,
    }
