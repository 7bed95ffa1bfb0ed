"""A finished transcoder on disk: `runs/NAME/final/`.

    transcoder.safetensors   the architecture's weights (a CLT's: W_enc [L, F, D], b_enc [L, F], W_dec.{l} [F, L - l, D]
                             and b_dec [L, D]), threshold [S, F] for S feature spaces (L, or 1 of a crosscoder),
                             y_mean [L, D] (mean MLP output over the training rows: the mean-ablation baseline); for
                             a rule that ranks by decoder norms also rank_norms [S, F], those before folding
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
from pipeline.core.activations import Choosing, FixedThreshold
from pipeline.core.options import ActivationOptions
from pipeline.errors import UserError
from pipeline.files import atomic_directory
from pipeline.plain import from_plain, to_plain

SCHEMA = 1

WEIGHTS = "transcoder.safetensors"


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
    rank_norms: Tensor | None = None
    """[L, F] decoder norms in the transcoder's units, which the rule of training ranks by."""

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
        rule = activations.build(options, model.n_sources, model.d_features)
        if isinstance(rule, Choosing) and rule.by_norm:
            rule.fixed_norms = self.rank_norms
        return model.under(rule.to(model.b_enc.device)).eval()


def save(
    run: Path,
    transcoder: Transcoder,
    threshold: Tensor,
    y_mean: Tensor,
    config: dict[str, Any],
    rank_norms: Tensor | None = None,
) -> Path:
    """Write runs/NAME/final at once. `transcoder` is folded; `config` holds everything but the schema."""
    tensors = {**transcoder.weights(), "threshold": threshold, "y_mean": y_mean}
    tensors |= {} if rank_norms is None else {"rank_norms": rank_norms}
    return write(run, tensors, config)


def write(run: Path, tensors: dict[str, Tensor], config: dict[str, Any]) -> Path:
    """The same from tensors by their names in the file."""
    with atomic_directory(run / "final") as aside:
        save_file({k: v.detach().float().contiguous().cpu() for k, v in tensors.items()}, aside / WEIGHTS)
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


def folder(run: str | Path) -> Path:
    """Where a run's transcoder lies: in its final/, or, of an exported one (`clt export to=huggingface`), in the
    directory itself. UserError when there is none."""
    path = Path(run)
    for place in (path / "final", path):
        if (place / "config.json").exists() and (place / WEIGHTS).exists():
            return place
    raise UserError(
        f"{path} holds no finished transcoder (no {path / 'final' / 'config.json'}); "
        f"finish it with clt train name={path.name}"
    )


def config_of(place: Path) -> dict[str, Any]:
    """config.json of a transcoder's folder. UserError when it is of another schema."""
    file = place / "config.json"
    config: dict[str, Any] = json.loads(file.read_text())
    if config.get("schema") != SCHEMA:
        raise UserError(f"{file} has schema {config.get('schema')}, this version reads {SCHEMA}; train the run again")
    return config


def read(run: str | Path) -> Trained:
    """A finished run. UserError when there is none or it is of another schema."""
    place = folder(run)
    config = config_of(place)
    tensors = {name: tensor.float() for name, tensor in load_file(place / WEIGHTS).items()}
    transcoder = build(
        from_plain(ArchOptions, config["arch"]), Dims(**config["dims"]), FixedThreshold(tensors["threshold"])
    )
    transcoder.load_weights(tensors)
    frozen = transcoder.eval().requires_grad_(False)
    return Trained(Path(run), frozen, tensors["y_mean"], config, tensors.get("rank_norms"))


def load(run: str | Path, device: str | torch.device = "cpu") -> Transcoder:
    """The finished transcoder of a run, in the base model's units: `pipeline.load("runs/demo")`.

    x [B, L, D] at the site that it was trained on (`config["arch"]["site"]`) goes in; `forward` gives Output(pre_acts
    [B, L, F], features [B, L, F], y_hat [B, L, D]), a crosscoder's features being [B, 1, F]. `.config` is config.json.
    UserError when the run is not finished.
    """
    trained = read(run)
    trained.transcoder.config = trained.config
    return trained.transcoder.to(device)
