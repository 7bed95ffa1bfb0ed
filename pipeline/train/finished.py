"""A finished transcoder as it is used: in memory, or in its files, which are read by rows (`arch/on_disk.py`)."""

import logging
from pathlib import Path

import torch

from pipeline import ranks
from pipeline.arch.base import Transcoder
from pipeline.arch.options import ArchOptions
from pipeline.arch.table import ARCHS
from pipeline.data.layout import gb
from pipeline.data.loader import available_memory
from pipeline.data.model_loading import resolve_device
from pipeline.errors import UserError
from pipeline.plain import from_plain
from pipeline.train import artifact
from pipeline.train.artifact import Trained
from pipeline.train.options import WeightsIn

logger = logging.getLogger(__name__)

SHARE = 0.5
"""Of what is free, for a transcoder in memory: the rest is for the language model and the work itself."""

FLOAT = 4


def load(run: str | Path, device: str | torch.device = "cpu", transcoder: str = "memory") -> Transcoder:
    """The finished transcoder of a run, in the base model's units: `pipeline.load("runs/demo")`.

    x [B, L, D] at the site that it was trained on (`config["arch"]["site"]`) goes in; `forward` gives Output(pre_acts
    [B, L, F], features [B, L, F], y_hat [B, L, D]), a crosscoder's features being [B, 1, F]. `.config` is config.json.
    transcoder: memory, disk (for one larger than memory: rows are read as they are needed, and features come in sparse
    form, without pre-activations) or auto. UserError when the run is not finished.
    """
    trained = read(run, chosen(transcoder), device)
    trained.transcoder.config = trained.config
    return trained.transcoder.to(device)


def chosen(transcoder: str) -> WeightsIn:
    """UserError for a word that says nothing."""
    if transcoder not in set(WeightsIn):
        raise UserError(f"transcoder={transcoder} says nothing; use {', '.join(WeightsIn)}")
    return WeightsIn(transcoder)


def read(run: str | Path, where: WeightsIn, device: str | torch.device) -> Trained:
    """A finished run, for use on `device` (auto, cpu, cuda, ...). The transcoder is still on the CPU. UserError as
    `artifact.read`, and for an architecture that cannot be read by rows with `where` disk."""
    place = artifact.folder(run)
    arch = from_plain(ArchOptions, artifact.config_of(place)["arch"])
    by_rows = ARCHS[arch.name].directions if arch.name in ARCHS else True
    if where is WeightsIn.disk and not by_rows:
        raise UserError(f"{run}: arch={arch.name} has no decoder rows to be read one by one; use transcoder=memory")
    on_disk, size, free = where is WeightsIn.disk, _n_bytes(place), ""
    if where is WeightsIn.auto:
        n_free = _free_bytes(device)
        on_disk, free = size > SHARE * n_free, f", of {gb(n_free)} free"
    if on_disk and not by_rows:
        why = f"arch={arch.name} has no decoder rows to be read one by one"
        logger.warning("transcoder=auto: %s go into memory%s: %s", gb(size), free, why)
        on_disk = False
    trained = artifact.read(run, on_disk=on_disk)
    if on_disk:
        needs = f", and would take {gb(size)} of memory{free}"
        logger.info("the transcoder stays in %s, where rows are read as they are needed%s", place, needs)
    else:
        logger.debug("the transcoder is in memory: %s%s", gb(size), free)
    return trained


def _n_bytes(place: Path) -> int:
    """In memory, where all of it is float32."""
    with artifact.stored(place) as tensors:
        return FLOAT * sum(torch.Size(tensors.shape(name)).numel() for name in tensors.names())


def _free_bytes(device: str | torch.device) -> int:
    """For this rank: of the device, and of the machine, through whose memory weights go there."""
    place = resolve_device(str(device))
    free = available_memory() // ranks.on_this_machine()
    return min(free, torch.cuda.mem_get_info(place)[0]) if place.type == "cuda" else free
