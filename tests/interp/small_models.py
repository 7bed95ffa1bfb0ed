"""Tiny language models with random transcoders in the place of their MLPs, all in float64."""

from pathlib import Path

import torch

from pipeline.arch import table
from pipeline.arch.base import Dims
from pipeline.arch.options import Site
from pipeline.core.activations import FixedThreshold
from pipeline.data import models
from pipeline.data.options import ModelOptions
from pipeline.interp.replacement import ReplacementModel
from tests import oracle
from tests.families import D_MODEL, N_LAYERS

F = 11


def made(path: Path, arch: str = "clt", site: Site = Site.mlp_in, first: int = 0) -> ReplacementModel:
    layers = None if first == 0 else [first, N_LAYERS]
    lm = models.load(ModelOptions(name="tiny", path=str(path), device="cpu", layers=layers))
    lm.weights.double()
    lm.dtype = torch.float64
    n_layers = N_LAYERS - first
    options = oracle.arch_options(arch, d_features=F, site=site)
    transcoder = table.build(options, Dims(n_layers, D_MODEL), FixedThreshold(torch.zeros(n_layers, F)))
    generator = torch.Generator().manual_seed(5)
    for parameter in transcoder.parameters():
        parameter.data.normal_(0, 0.4, generator=generator)
    return ReplacementModel(lm, transcoder.double().eval().requires_grad_(False), site)
