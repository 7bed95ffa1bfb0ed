"""A language model that is a formula, and caches made with it, for the tests of the rooms around the cache.

python -m tests.data.fake DIRECTORY SECONDS [PART [WRITE [CODEC]]]     what `extract(DIRECTORY)` makes, slowly
"""

import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from pipeline.core.normalize import MlpNorm
from pipeline.data.cache import Cache
from pipeline.data.harvest import Buffers, harvest
from pipeline.data.layout import SITES, directory_of
from pipeline.data.models import LanguageModel
from pipeline.data.options import Codec, DatasetKind, DatasetOptions, Write
from pipeline.data.parts import part_of
from pipeline.data.plan import Block, Plan, describe, make_plan
from pipeline.data.publish import mend_root
from pipeline.data.root import COPY, sealed
from pipeline.data.scales import as_stored, sample_of
from pipeline.data.tokens import Packed, Split
from pipeline.data.writer import Writer

L, D, T, VOCAB = 3, 5, 7, 50
SIZES = {Split.train: (41, 2), Split.calibration: (4, 0), Split.evaluation: (3, 0)}
"""Contexts, and padding tokens at the end of the last one."""


class FakeModel:
    """Activations are sines of token, position, layer and dimension, so that no two are alike."""

    name, path, revision, architecture = "fake", "fake", None, "Sines"
    n_layers, d_model, vocab_size, eos_token_id = L, D, VOCAB, 1
    layers, attention = range(L), "eager"
    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self, weight: float = 1.0) -> None:
        self.weight = weight
        self.n_calls = 0
        self.before_call: Callable[[int], None] = lambda n: None

    def collect(
        self, tokens: Tensor, first: int = 0, out: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        self.before_call(self.n_calls)
        self.n_calls += 1
        context = tokens.shape[1]
        token = tokens.float()[:, :, None, None]
        position = torch.arange(context).float()[None, :, None, None]
        layer = torch.arange(L).float()[:, None]
        phase = token * 1.7 + position * 0.31 + layer * 0.9 + torch.arange(D) * 2.3
        values = 3 * torch.sin(phase * self.weight) + 0.5, torch.cos(phase * 1.1)
        if out is None:
            return values[0][:, first:], values[1][:, first:]
        return out[0].copy_(values[0][:, first:]), out[1].copy_(values[1][:, first:])

    def mlp_norm(self) -> MlpNorm:
        gain = 1 + torch.arange(L * D).float().view(L, D) / 10
        return MlpNorm("layer", gain, gain.flip(1) - 1, 1e-5)

    def weights_hash(self) -> str:
        return f"weights {self.weight}"

    def tokenizer_hash(self) -> str:
        return "tokenizer"


def as_model(model: FakeModel) -> LanguageModel:
    return cast(LanguageModel, model)


def pack(seed: int = 0, sizes: dict[Split, tuple[int, int]] | None = None, context: int = T) -> dict[Split, Packed]:
    """Random tokens; position 0 is 0."""
    rng = np.random.default_rng(seed)
    packed = {}
    for split, (n, padding) in (sizes or SIZES).items():
        contexts = rng.integers(2, VOCAB, (n, context), dtype=np.int32)
        contexts[:, 0] = 0
        contexts[-1, context - padding :] = 1
        packed[split] = Packed(contexts, n * (context - 1) - padding)
    return packed


class Crash(Exception):
    """What a test stops an extraction with."""


def stop_after(number: int) -> Callable[[int], None]:
    """For `after_block` of `extract`: a crash after so many blocks."""

    def after_block(done: int) -> None:
        if done == number:
            raise Crash

    return after_block


def request(**changes: Any) -> dict[str, Any]:
    model = {"name": "fake", "path": "fake", "revision": None, "dtype": "auto", "attention": "auto", "layers": None}
    options = {"name": "text", "kind": "text", "n_tokens": "244", "path": "x.txt", "split_by": None, "context": T}
    dataset = options | {"held_out": 3, "seed": 7} | changes
    return {"schema": 1, "model": model, "dataset": dataset, "codec": "raw", "source": {}}


def _asked(seed: int, context: int, codec: Codec, targets: str | None) -> dict[str, Any]:
    return request(seed=seed, context=context) | {"codec": codec.value} | ({"targets": targets} if targets else {})


def plan_of(
    cache_dir: Path,
    model: FakeModel,
    packed: dict[Split, Packed],
    shard_mb: str,
    block_contexts: int,
    seed: int,
    codec: Codec = Codec.raw,
    targets: str | None = None,
) -> Plan:
    options = DatasetOptions("text", DatasetKind.text, "244", path="x.txt", context=T, held_out=3, seed=seed)
    options.context = packed[Split.train].contexts.shape[1]
    asked = _asked(seed, options.context, codec, targets)
    about = describe(as_model(model), options, packed, asked, bos_token_id=0) | {"block_contexts": block_contexts}
    return make_plan(directory_of(cache_dir, asked), about, model.mlp_norm(), packed, shard_mb)


def extract(
    cache_dir: Path,
    model: FakeModel | None = None,
    packed: dict[Split, Packed] | None = None,
    shard_mb: str = "0.0015",  # 52 rows: the 244 of SIZES are five shards, the last with 8 rows of padding
    block_contexts: int = 6,
    commit_seconds: float | None = None,
    seed: int = 7,
    after_block: Callable[[int], None] | None = None,
    batch_tokens: int = 2 * T,
    part: str | None = None,
    write: Write = Write.auto,
    codec: Codec = Codec.raw,
    targets: str | None = None,
) -> Path:
    """What the extract stage does, without its model, text and words. Where a test steps in after a block, the block
    is in the journal. targets: as in the request."""
    model, packed = model or FakeModel(), packed or pack()
    asked = _asked(seed, packed[Split.train].contexts.shape[1], codec, targets)
    mend_root(directory_of(cache_dir, asked), asked)
    plan = plan_of(cache_dir, model, packed, shard_mb, block_contexts, seed, codec, targets)
    if commit_seconds is None:
        commit_seconds = 1e9 if after_block is None else 0
    with Writer(plan, commit_seconds, part_of(part, {}), write, partial(sample_of, as_model(model), plan)) as writer:
        for block in writer.todo:
            fill(writer, model, block, batch_tokens)
            if after_block is not None:
                after_block(block.number)
        if not writer.is_finished and writer.finish():
            writer.publish()
    return plan.path


def fill(writer: Writer, model: FakeModel, block: Block, batch_tokens: int = 2 * T) -> None:
    """Extract a block."""
    packed = writer.plan.packed[block.split]
    buffers = Buffers(as_model(model), packed.contexts.shape[1], batch_tokens, n=1)
    total = np.zeros(writer.plan.sums_shape)
    for rows in harvest(as_model(model), packed, block.contexts, buffers):
        rows, own = as_stored(block.split, rows, writer.plan.norm, writer.codes)
        writer.write(block.split, rows)
        total[: len(own)] += own.numpy()
    writer.finish_block(block, total)


def stored_files(path: Path) -> dict[str, bytes]:
    """Content of every file of a cache but for its date and the copy of zarr.json, which has to be one."""
    files = {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}
    if "tokens/zarr.json" in files:  # a merged cache has neither
        assert files.pop(COPY) == sealed(files["zarr.json"])
    root = json.loads(files["zarr.json"])
    del root["attributes"]["created"], root["attributes"]["checksum"]
    files["zarr.json"] = json.dumps(root).encode()
    return files


def read_everything(path: Path) -> None:
    """Every array of a finished cache, as its readers do."""
    cache = Cache.open(path)
    assert cache.tokens.size
    assert cache.norm.gain.numel()
    for site in SITES:
        cache.stats(site)
    for split in (Split.calibration, Split.evaluation):
        cache.held_out(split)
    for shard in cache.shards():
        for name in cache.stored:
            cache.map_chunk(name, shard.chunk)


if __name__ == "__main__":
    slow = FakeModel()
    slow.before_call = lambda n: time.sleep(float(sys.argv[2]))
    directory, _, *more = sys.argv[1:]
    one, way, codec = [*more, *[None, "auto", "raw"][len(more) :]]
    extract(Path(directory), slow, commit_seconds=0, part=one, write=Write(way), codec=Codec(codec))
