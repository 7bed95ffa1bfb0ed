"""What has to be written for a cache to be finished: everything, the rest, or what is damaged. Nothing is written here.

Work is cut into blocks of contexts, which are numbered by what is extracted: their size follows from the model, not
from speed, batch or process count.
"""

import importlib.metadata
import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

import pipeline
from pipeline.core.normalize import MlpNorm
from pipeline.data import tokens
from pipeline.data.codecs import COMPRESSED
from pipeline.data.commands import command_to_go_on, is_conversion
from pipeline.data.condition import read_attributes
from pipeline.data.journal import read_state
from pipeline.data.layout import (
    HOOKS,
    KIND,
    SCHEMA,
    STORED,
    Json,
    Size,
    Spec,
    file_bytes,
    gb,
    hierarchy,
    prefix,
    spec_of,
    stored,
    sums_shape,
    targets_of,
    token_bytes,
    total_bytes,
    with_codec,
)
from pipeline.data.models import LanguageModel
from pipeline.data.options import Codec, DatasetOptions
from pipeline.data.shuffle import Permutation
from pipeline.data.tokens import Packed, Split
from pipeline.errors import UserError
from pipeline.files import existing

BLOCK_FLOP = 1e12
"""Work of a block in the MLPs and attention projections: about 10 s of one CPU core."""
BLOCK_TOKENS = (8192, 65536)
"""Fewest and most tokens of a block. Its sums take 12/tokens of the disk that its rows take."""


class Block(NamedTuple):
    """A run of contexts of one split."""

    number: int
    split: Split
    contexts: range


class Plan(NamedTuple):
    path: Path
    about: Json
    """Attributes that are known before anything is extracted."""
    norm: MlpNorm
    packed: dict[Split, Packed]
    specs: dict[str, Spec]
    blocks: list[Block]
    """All of them, whether needed or not."""
    finished: dict[str, dict[int, int]]
    """Chunks that stay as they are: array -> chunk -> checksum."""
    before: Json | None
    """What was there: the attributes of a damaged cache, or the state of an unfinished one."""

    @property
    def n_rows(self) -> int:
        """Of all splits."""
        return sum(packed.n_rows for packed in self.packed.values())

    @property
    def codec(self) -> Codec:
        return _codec_of(self.about)

    @property
    def bytes_per_token(self) -> int:
        """Of a training row, before compression."""
        return token_bytes(self.specs)

    @property
    def total_bytes(self) -> int:
        return total_bytes(self.specs)

    @property
    def missing_bytes(self) -> int:
        """What is not on disk yet, the journal's sums included. Compressed chunks count as they are spilled: raw."""
        sums = 8 * len(self.blocks) * int(np.prod(self.sums_shape))
        return sums + sum(spec.file_bytes for name, spec, i in self.chunks() if not self.is_whole(name, i))

    @property
    def sums_shape(self) -> tuple[int, ...]:
        """Of a block (`layout.sums_shape`)."""
        return sums_shape(self.codec, *self.norm.gain.shape)

    def chunks(self) -> Iterator[tuple[str, Spec, int]]:
        return ((name, spec, i) for name, spec in self.specs.items() for i in range(spec.n_chunks))

    def is_whole(self, name: str, chunk: int) -> bool:
        """Whether a chunk's file is there at its full size. A compressed one gets its name when it is whole, and a
        damaged one is removed before anything is made (`data/setting_up.py`)."""
        spec = self.specs[name]
        file = spec.file(self.path, name, chunk)
        return file.exists() and (spec.compressor is not None or file.stat().st_size == spec.file_bytes)

    def is_finished(self, name: str) -> bool:
        return len(self.finished.get(name, {})) == self.specs[name].n_chunks

    def needed(self) -> list[Block]:
        """The blocks with rows in unfinished chunks, and all training blocks when statistics are missing."""
        stats = all(self.is_finished(name) for name in self.specs if name.startswith("stats/"))
        wanted: set[int] = set()
        for split in Split:
            numbers = np.array([block.number for block in self.blocks if block.split is split])
            if (split is Split.train and not stats) or not any(self.finished.get(prefix(split) + n) for n in STORED):
                wanted |= set(numbers.tolist())
                continue
            n_rows, width = self.packed[split].n_rows, self.packed[split].contexts.shape[1] - 1
            for rows in self._unfinished_rows(split):
                t = Permutation(n_rows, self.about["seed"]).inverse(rows) if split is Split.train else rows
                wanted |= set(numbers[np.unique(t // (width * self.about["block_contexts"]))].tolist())
        return [block for block in self.blocks if block.number in wanted]

    def _unfinished_rows(self, split: Split) -> Iterator[NDArray[np.int64]]:
        for name in (prefix(split) + name for name in stored(self.specs, split)):
            spec, done = self.specs[name], self.finished.get(name, {})
            for chunk in set(range(spec.n_chunks)) - set(done):
                yield np.arange(chunk * spec.chunk_rows, chunk * spec.chunk_rows + spec.rows_in(chunk))


def describe(
    model: LanguageModel,
    dataset: DatasetOptions,
    packed: dict[Split, Packed],
    request: Json,
    bos_token_id: int | None,
) -> Json:
    """The attributes that are known before anything is extracted. bos_token_id: what stands at position 0 of each
    context, None for ordinary tokens."""
    names = ("torch", "transformers", "transformer-lens", "datasets", "zarr", "numpy")
    norm = model.mlp_norm()
    targets = {"targets": request["targets"]} if "targets" in request else {}
    return {
        "kind": KIND,
        "schema": SCHEMA,
        "request": request,
        "model": about_model(model),
        "dataset": json.loads(json.dumps(asdict(dataset)))
        | {"fingerprint": tokens.fingerprint(packed), "resolved": tokens.resolved(dataset)},
        "hooks": HOOKS,
        **targets,
        "norm": {"kind": norm.kind, "eps": norm.eps},
        "context": dataset.context,
        "bos_token_id": bos_token_id,
        "eos_token_id": model.eos_token_id,
        "n_rows": {str(split): packed[split].n_rows for split in Split},
        "rows": "positions 1 to T-1 of every context; padding at the end of the last one is left out",
        "order": "row perm(t) holds token t; perm: the Feistel permutation of pipeline/data/shuffle.py with this seed",
        "seed": dataset.seed,
        "block_contexts": _block_contexts(model.n_layers, model.d_model, dataset.context),
        "versions": {n: importlib.metadata.version(n) for n in names} | {"clt-pipeline": pipeline.__version__},
    }


def about_model(model: LanguageModel) -> Json:
    """What identifies a base model, for those who come later."""
    fields = ("name", "path", "revision", "architecture", "n_layers", "d_model", "vocab_size")
    return (
        {field: getattr(model, field) for field in fields}
        | {"weights_sha256": model.weights_hash(), "tokenizer_sha256": model.tokenizer_hash()}
        | {"dtype": str(model.dtype).removeprefix("torch."), "attention": model.attention}
        | {"layers": [model.layers.start, model.layers.stop]}
    )


def make_plan(path: Path, about: Json, norm: MlpNorm, packed: dict[Split, Packed], shard_mb: str) -> Plan:
    """Raises UserError when another model or other tokens were being extracted to `path`, and for a shard size that is
    none. An extraction that goes on keeps the shard size that it began with."""
    sizes = {split: Size(len(packed[split].contexts), packed[split].n_rows) for split in Split}
    n_layers, d_model = norm.gain.shape
    codec = _codec_of(about)
    raw = hierarchy(n_layers, d_model, about["context"], sizes, shard_mb, targets_of(about["request"]))
    specs = with_codec(raw, codec)
    before = read_attributes(path) if (path / "zarr.json").exists() else read_state(path)
    if before is not None and is_conversion(before):
        fix = f"go on with {command_to_go_on(before, path.parent)}, or remove it"
        raise UserError(f"{path} is being made by clt cache convert, which is not finished; {fix}")
    about = about | {"block_contexts": (before or about)["block_contexts"]}
    if codec is not Codec.raw:
        about |= {"codec": {"name": codec.value, "from": None}}
    if before is not None and "codec" in before:  # with what it lost, which only its first extraction knows
        about |= {"codec": before["codec"]}
    blocks = _blocks(sizes, about["block_contexts"])
    plan = Plan(path, about, norm, packed, specs, blocks, {}, before)
    if before is None:
        return plan
    _check_same(path, before, about)
    arrays = before["manifest"]["arrays"]
    plan = plan._replace(specs={name: spec_of(entry) for name, entry in arrays.items()})
    for name, _, chunk in plan.chunks():
        crc = arrays[name]["crc32c"][chunk]
        file = plan.specs[name].file(path, name, chunk)
        if crc is not None and file.exists() and file.stat().st_size == file_bytes(arrays[name], chunk):
            plan.finished.setdefault(name, {})[chunk] = crc
    return plan


def planned_again(plan: Plan) -> Plan:
    """The same plan for what is there now: another part has begun meanwhile. Raises UserError as `make_plan` does."""
    return make_plan(plan.path, plan.about, plan.norm, plan.packed, "auto")  # it goes on with the shards that it has


def check_space(plan: Plan, more: int = 0) -> None:
    """Raises UserError when what is missing, and `more` bytes, do not fit on the disk."""
    free, needed = free_bytes(plan.path), plan.missing_bytes + more
    if needed > free:
        sizes = f"{gb(needed)} to write, {gb(free)} free on {disk_of(plan.path)}"
        fix = "use a smaller dataset.n_tokens, or cache.dir= (of a remote cache: cache.local_dir=) on another disk"
        spilled = ", which wait uncompressed until they are sorted" if plan.codec in COMPRESSED else ""
        raise UserError(f"the cache does not fit: {sizes} ({plan.bytes_per_token:,} bytes a token{spilled}); {fix}")


def free_bytes(path: Path) -> int:
    return shutil.disk_usage(existing(path)).free


def disk_of(path: Path) -> Path:
    """Where the disk that holds (or will hold) `path` is mounted."""
    place = existing(path).resolve()
    while not place.is_mount():
        place = place.parent
    return place


def _codec_of(about: Json) -> Codec:
    return Codec(about.get("request", {}).get("codec", Codec.raw.value))


def _check_same(path: Path, before: Json, about: Json) -> None:
    """One cache holds the activations of one model on one text."""
    places = {
        "weights of the model": ("model", "weights_sha256"),
        "tokenizer": ("model", "tokenizer_sha256"),
        "revision of the model": ("model", "revision"),
        "arithmetic (model.dtype)": ("model", "dtype"),
        "text": ("dataset", "fingerprint"),
    }
    differ = [what for what, (part, key) in places.items() if before[part][key] != about[part][key]]
    if differ:
        fix = f"put back what it was begun with, or remove {path} to start anew"
        raise UserError(f"{path} was begun with another {' and another '.join(differ)}; {fix}")


def _block_contexts(n_layers: int, d_model: int, context: int) -> int:
    fewest, most = BLOCK_TOKENS
    n_tokens = BLOCK_FLOP / (24 * n_layers * d_model**2)
    return max(1, int(min(max(n_tokens, fewest), most)) // context)


def _blocks(sizes: dict[Split, Size], n_contexts: int) -> list[Block]:
    blocks: list[Block] = []
    for split, size in sizes.items():
        for start in range(0, size.n_contexts, n_contexts):
            blocks.append(Block(len(blocks), split, range(start, min(start + n_contexts, size.n_contexts))))
    return blocks
