"""Finished runs with random weights, to export."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.arch.base import Dims, Transcoder
from pipeline.arch.options import ArchOptions
from pipeline.arch.table import n_sources
from pipeline.core.activations import FixedThreshold
from pipeline.core.options import ActivationOptions
from pipeline.train import artifact
from tests import oracle

L, F, D = 3, 11, 6

ABOUT: dict[str, Any] = {
    "units": "model",
    "hooks": {"resid_mid": "blocks.{l}.ln2.hook_in", "mlp_out": "blocks.{l}.hook_mlp_out"},
    "model": {
        "name": "tiny", "path": "owner/tiny", "revision": "0123abc", "architecture": "GPT2LMHeadModel", "n_layers": L,
        "d_model": D, "vocab_size": 61, "weights_sha256": "f" * 64, "layers": [0, L],
    },
    "dataset": {"name": "text", "kind": "text", "path": "x.txt", "bos": "auto", "context": 32},
    "cache": {
        "key": "none",
        "path": "/home/someone/cache/none",
        "request": {"model": {"name": "tiny", "path": "owner/tiny", "revision": None, "layers": None}},
    },
    "train": {"n_tokens": "400k", "batch_tokens": 256, "seed": 0},
}  # fmt: skip
"""The part of config.json that is not about the transcoder."""


def finished(run: Path, options: ArchOptions, relu: bool = False, about: dict[str, Any] | None = None) -> Transcoder:
    """A run with random weights and thresholds (0 with relu), in float32. -> its transcoder"""
    threshold: Tensor = torch.rand(n_sources(options, Dims(L, D)), F, generator=torch.Generator().manual_seed(2))
    threshold = torch.zeros_like(threshold) if relu else threshold
    model = oracle.transcoder(options, FixedThreshold(threshold), dtype=torch.float32)
    rule = ActivationOptions("relu") if relu else oracle.activation_options("topk")
    described = artifact.describe(options, model.dims, rule)
    artifact.save(run, model, threshold, oracle.normal(L, D, seed=4), {**described, **(about or ABOUT)})
    return model


def options(architecture: str, **settings: Any) -> ArchOptions:
    return replace(oracle.arch_options(architecture), d_features=F, **settings)


def inputs() -> Tensor:
    """x [B, L, D]"""
    return oracle.normal(5, L, D, dtype=torch.float32)
