"""A finished transcoder on disk: `runs/NAME/final/`.

    transcoder.safetensors   the architecture's weights (a CLT's: W_enc [L, F, D], b_enc [L, F], W_dec.{l} [F, L - l, D]
                             and b_dec [L, D]), threshold [S, F] for S feature spaces (L, or 1 of a crosscoder),
                             y_mean [L, D] (mean MLP output over the training rows: the mean-ablation baseline)
    config.json              what it is: architecture, sites, base model, cache, training rule, metrics

Everything is in the base model's own units. The features are a = h 1[h > threshold]; a rule of the TopK family, which
the thresholds stand in for, is rebuilt from config.json on request.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline.arch.base import Dims, Transcoder
from pipeline.arch.options import ArchOptions, Site, Target
from pipeline.arch.table import build
from pipeline.core import activations
from pipeline.core.activations import FixedThreshold
from pipeline.core.options import ActivationOptions
from pipeline.errors import UserError
from pipeline.files import atomic_directory
from pipeline.plain import from_plain, to_plain

SCHEMA = 1


@dataclass
class Trained:
    """A finished transcoder and what is known about it."""

    path: Path
    """The run directory."""
    transcoder: Transcoder
    """In the model's units, with fixed thresholds."""
    y_mean: Tensor
    """[L, D]"""
    config: dict[str, Any]
    """config.json."""

    @property
    def site(self) -> Site:
        return self.transcoder.options.site

    @property
    def target(self) -> Target:
        return self.transcoder.options.target

    def exact(self) -> Transcoder | None:
        """The same weights under the rule that they were trained with; None where the thresholds are that rule."""
        options = from_plain(ActivationOptions, self.config["activation"])
        if options.name not in activations.ACTIVATIONS:
            raise UserError(f"{self.path}: activation {options.name} is not known to this version")
        if not activations.ACTIVATIONS[options.name].chooses:
            return None
        model = self.transcoder
        return model.under(activations.build(options, model.n_sources, model.d_features)).eval()


def save(run: Path, transcoder: Transcoder, threshold: Tensor, y_mean: Tensor, config: dict[str, Any]) -> Path:
    """Write runs/NAME/final at once. `transcoder` is folded; `config` holds everything but the schema."""
    tensors = {**transcoder.weights(), "threshold": threshold, "y_mean": y_mean}
    with atomic_directory(run / "final") as aside:
        save_file(
            {k: v.detach().float().contiguous().cpu() for k, v in tensors.items()}, aside / "transcoder.safetensors"
        )
        (aside / "config.json").write_text(json.dumps({"schema": SCHEMA, **config}, indent=2) + "\n")
    return run / "final"


def describe(arch: ArchOptions, dims: Dims, activation: ActivationOptions) -> dict[str, Any]:
    """The part of config.json from which the transcoder is rebuilt."""
    return {
        "arch": to_plain(arch),
        "dims": dims._asdict(),
        "activation": to_plain(activation),
        "inference": "threshold",
    }


def read(run: str | Path) -> Trained:
    """A finished run. UserError when there is none or it is of another schema."""
    path = Path(run)
    file = path / "final" / "config.json"
    if not file.exists():
        raise UserError(f"{path} holds no finished transcoder (no {file}); finish it with clt train name={path.name}")
    config = json.loads(file.read_text())
    if config.get("schema") != SCHEMA:
        raise UserError(f"{file} has schema {config.get('schema')}, this version reads {SCHEMA}; train the run again")
    tensors = load_file(file.with_name("transcoder.safetensors"))
    transcoder = build(
        from_plain(ArchOptions, config["arch"]), Dims(**config["dims"]), FixedThreshold(tensors["threshold"])
    )
    transcoder.load_weights(tensors)
    return Trained(path, transcoder.eval().requires_grad_(False), tensors["y_mean"], config)


def load(run: str | Path, device: str | torch.device = "cpu") -> Transcoder:
    """The finished transcoder of a run, in the base model's units: `pipeline.load("runs/demo")`.

    x [B, L, D] at the site that it was trained on (`config["arch"]["site"]`) goes in; `forward` gives Output(pre_acts
    [B, L, F], features [B, L, F], y_hat [B, L, D]), a crosscoder's features being [B, 1, F]. `.config` is config.json.
    UserError when the run is not finished.
    """
    trained = read(run)
    trained.transcoder.config = trained.config
    return trained.transcoder.to(device)
