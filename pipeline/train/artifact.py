"""A finished transcoder on disk: `runs/NAME/final/`.

    transcoder.safetensors   the architecture's weights (a CLT's: W_enc [L, F, D], b_enc [L, F], W_dec.{l} [F, L - l, D]
                             and b_dec [L, D]), threshold [S, F] for S feature spaces (L, or 1 of a crosscoder),
                             y_mean [L, D] (mean MLP output over the training rows: the mean-ablation baseline); for
                             a rule that ranks by decoder norms also rank_norms [S, F], those before folding
    config.json              what it is: architecture, sites, base model, cache, training rule, metrics

Written by several ranks, the tensors lie by rows of features in transcoder-00001-of-00004.safetensors and so on, with
index.json (`train/row_files.py`); `read` and all that goes through it take either.

Everything is in the base model's own units. The features are a = h 1[h > threshold]; a rule of the TopK family, which
the thresholds stand in for, is rebuilt from config.json on request.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from pipeline.arch.base import Dims, Transcoder
from pipeline.arch.options import ArchOptions, Site, Target
from pipeline.arch.rows import FeatureRows, by_feature
from pipeline.arch.table import build
from pipeline.core import activations
from pipeline.core.activations import Choosing, FixedThreshold
from pipeline.core.options import ActivationOptions
from pipeline.core.peers import ALONE, Peers
from pipeline.dist.mesh import Mesh
from pipeline.dist.shard import Shard, whole
from pipeline.dist.sharded import held_arch
from pipeline.errors import UserError
from pipeline.files import atomic_directory, save_tensors
from pipeline.plain import from_plain, to_plain
from pipeline.train import row_files
from pipeline.train.row_files import Held, Stored
from pipeline.train.together import Together

SCHEMA = 1

STEM = "transcoder"

WEIGHTS = f"{STEM}.safetensors"

PER_FEATURE = {"threshold", "rank_norms"}
"""Tensors [S, F] beside the architecture's weights."""


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

    def exact(self, peers: Peers = ALONE) -> Transcoder | None:
        """The same weights under the rule that they were trained with; None where the thresholds are that rule.
        peers: whom the features compete with, where others are elsewhere."""
        options = from_plain(ActivationOptions, self.config["activation"])
        if options.name not in activations.ACTIVATIONS:
            raise UserError(f"{self.path}: activation {options.name} is not known to this version")
        if not activations.ACTIVATIONS[options.name].chooses:
            return None
        model = self.transcoder
        rule = activations.build(options, model.n_sources, model.d_features, peers)
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
    mesh: Mesh | None = None,
    shard: Shard | None = None,
) -> Path:
    """Write runs/NAME/final at once. `transcoder` is folded; `config` holds everything but the schema. All ranks of
    `mesh` call it, each with the transcoder, thresholds and norms [S, n] of the features of its `shard`; y_mean, b_dec,
    W_skip and config are those of rank 0. It returns on every rank when the directory is there."""
    tensors = {**transcoder.weights(), "threshold": threshold, "y_mean": y_mean}
    tensors |= {} if rank_norms is None else {"rank_norms": rank_norms}
    if mesh is None or mesh.world.size == 1:
        return write(run, tensors, config)
    shard = shard or whole(transcoder.d_features)
    together = Together.begin(run / "final", mesh)
    floats = {name: tensor.detach().float() for name, tensor in tensors.items()}
    held = row_files.shared_out({name: _held(transcoder, name, t, shard) for name, t in floats.items()}, mesh)
    together.write(lambda at: {STEM: row_files.write(at, STEM, held, together.rank, together.n_ranks)})
    if mesh.speaks:
        together.finish(lambda at: _write_config(at, config))
    mesh.world.barrier()
    return run / "final"


def write(run: Path, tensors: dict[str, Tensor], config: dict[str, Any]) -> Path:
    """The same from tensors by their names in the file, by one process."""
    with atomic_directory(run / "final") as aside:
        save_tensors({k: v.detach().float().contiguous().cpu() for k, v in tensors.items()}, aside / WEIGHTS)
        _write_config(aside, config)
    return run / "final"


def _write_config(folder: Path, config: dict[str, Any]) -> None:
    (folder / "config.json").write_text(json.dumps({"schema": SCHEMA, **config}, indent=2) + "\n")


def _held(transcoder: Transcoder, name: str, tensor: Tensor, shard: Shard) -> Held:
    rows = _rows(transcoder, name, shard.d_features)
    return Held(tensor) if rows is None else Held(tensor, rows.axis, tuple(rows.of(shard.ranges)), rows.length)


def _rows(transcoder: Transcoder, name: str, d_features: int) -> FeatureRows | None:
    """Where a tensor of the file has its features."""
    if name == "y_mean":
        return None
    return by_feature(d_features) if name in PER_FEATURE else transcoder.stored_rows(name, d_features)


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
        if (place / "config.json").exists() and ((place / WEIGHTS).exists() or (place / row_files.INDEX).exists()):
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


def stored(place: Path) -> Stored:
    """The tensors of a transcoder's folder (`folder`), to be read by rows. A context."""
    return Stored(place, STEM)


def weight_files(place: Path) -> list[Path]:
    """The files in which they lie, the index too where there is one."""
    index = place / row_files.INDEX
    return [*row_files.files_of(place, STEM), *([index] if index.exists() else [])]


def weights_sha256(place: Path) -> str:
    """Of the file of weights; of several the hash of their hashes."""
    hashes = []
    for file in weight_files(place):
        with file.open("rb") as opened:
            hashes.append(hashlib.file_digest(opened, "sha256").hexdigest())
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()


class _Floats(Mapping[str, Tensor]):
    """The rows of a shard, float32, each tensor read when it is asked for."""

    def __init__(self, tensors: Stored, transcoder: Transcoder, shard: Shard) -> None:
        self._tensors, self._transcoder, self._shard = tensors, transcoder, shard

    def __getitem__(self, name: str) -> Tensor:
        return _read(self._tensors, name, _rows(self._transcoder, name, self._shard.d_features), self._shard)

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors.names())

    def __len__(self) -> int:
        return len(self._tensors.names())


def _read(tensors: Stored, name: str, rows: FeatureRows | None, shard: Shard) -> Tensor:
    if rows is None or shard.is_whole:
        return tensors.read(name).float()
    return tensors.read(name, rows.axis, rows.of(shard.ranges)).float()


def read(run: str | Path, shard: Shard | None = None, on_disk: bool = False) -> Trained:
    """A finished run; with a shard, of one of that many features, an ordinary transcoder with its features alone, whose
    other rows are not read (b_dec, W_skip and y_mean are whole in each). on_disk: the tables stay there, and are read
    by rows as they are needed (`arch/on_disk.py`). UserError when there is none, it is of another schema, or its
    architecture cannot be read so."""
    place = folder(run)
    config = config_of(place)
    arch = from_plain(ArchOptions, config["arch"])
    if on_disk:
        assert shard is None
        return _on_disk(Path(run), place, config, arch)
    shard = shard or whole(arch.d_features)
    assert shard.d_features == arch.d_features, "a shard of another transcoder"
    with stored(place) as tensors:
        rows = by_feature(arch.d_features)
        fixed = FixedThreshold(_read(tensors, "threshold", rows, shard))
        transcoder = build(held_arch(arch, shard), Dims(**config["dims"]), fixed)
        floats = _Floats(tensors, transcoder, shard)
        transcoder.load_weights(floats)
        y_mean, norms = floats["y_mean"], floats["rank_norms"] if "rank_norms" in tensors else None
    frozen = transcoder.eval().requires_grad_(False)
    return Trained(Path(run), frozen, y_mean, config, norms)


def _on_disk(run: Path, place: Path, config: dict[str, Any], arch: ArchOptions) -> Trained:
    tensors = stored(place)  # open for as long as the transcoder is there
    fixed = FixedThreshold(tensors.read("threshold").float())
    transcoder = build(arch, Dims(**config["dims"]), fixed, tensors)
    floats = _Floats(tensors, transcoder, whole(arch.d_features))
    transcoder.load_small(floats)
    y_mean, norms = floats["y_mean"], floats["rank_norms"] if "rank_norms" in tensors else None
    return Trained(run, transcoder.eval().requires_grad_(False), y_mean, config, norms)
