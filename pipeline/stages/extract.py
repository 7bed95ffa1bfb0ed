"""`clt extract`: text + base model -> cache directory.

    clt extract model=world
    clt extract model=local model.path=DIR dataset=text dataset.path=FILE
    clt extract model=gpt2 --dry-run

1. What is asked for names the cache: when it is there, nothing is loaded and nothing is done.
2. Documents are split and packed into contexts.
3. For cache.codec=int8, the model runs over a sample first, which the scales are fitted to.
4. The base model runs over the contexts, block by block; the residual stream before each MLP and the MLP's output are
   scattered over the shards in their final, random order. A stopped extraction goes on with the same command.
   Several processes can make parts of it (`extract.part`, torchrun); the last one to end does step 5.
5. A few contexts are computed again and compared with what is on disk; then the cache is called finished.
"""

import logging
import os
import shlex
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

from pipeline.data import models, tokens
from pipeline.data.address import Place, Remote, cache_place
from pipeline.data.cache import Cache
from pipeline.data.caches import newest
from pipeline.data.commands import overrides_of
from pipeline.data.condition import damage, read_attributes
from pipeline.data.convert import describe as describe_codec
from pipeline.data.conveyor import Conveyor, n_buffers
from pipeline.data.harvest import Buffers, harvest
from pipeline.data.journal import tidy
from pipeline.data.layout import JOURNAL, PACKING, STORED, Json, directory_of, gb, request_of, stored
from pipeline.data.models import LanguageModel
from pipeline.data.options import Codec, Targets
from pipeline.data.parts import Part, one_voice, part_of, speak
from pipeline.data.plan import Block, Plan, describe, free_bytes, make_plan
from pipeline.data.publish import mend_root
from pipeline.data.recompute import try_out
from pipeline.data.scales import as_stored, sample_of
from pipeline.data.spill import check as check_write
from pipeline.data.spot_check import spot_check
from pipeline.data.tokens import Packed, Split
from pipeline.data.writer import Writer
from pipeline.dist import pieces
from pipeline.errors import UserError
from pipeline.files import remove_empty, remove_held, take_lock
from pipeline.progress import Progress
from pipeline.stages import estimate, extract_remote
from pipeline.stages.options import ExtractConfig

logger = logging.getLogger(__name__)


def run(cfg: ExtractConfig) -> Place:
    """Make the cache, or go on with it, or say that it is there. -> its directory, which a dry run does not make. A
    part (`extract.part`, or a rank of torchrun) makes its blocks, and the cache when it is the last to end."""
    if cfg.extract.batch_tokens < 1:
        raise UserError(f"extract.batch_tokens={cfg.extract.batch_tokens} must be at least 1")
    check_write(cfg.cache.write, cfg.cache.codec)
    part = part_of(cfg.extract.part, os.environ)
    place = cache_place(cfg.cache)
    with one_voice(os.environ):
        return extract_remote.run(cfg, place, part, _ensure) if isinstance(place, Remote) else _run(cfg, place, part)


def _run(cfg: ExtractConfig, place: Path, part: Part | None) -> Path:
    request = request_of(cfg.model, cfg.dataset, cfg.cache.codec, cfg.cache.targets)
    path = directory_of(place, request)
    mend_root(path, request)
    if _is_there(path):
        logger.info("already there, nothing to do: %s\n%s", _summary(Cache.open(path)), _next(path, request))
    elif _make(cfg, part, request, path):
        logger.info("%s\n%s", _summary(Cache.open(path)), _next(path, request))
    return path


def _ensure(cfg: ExtractConfig, part: Part | None, request: Json, path: Path) -> bool:
    """Make the cache unless it is there. -> whether it is finished"""
    return _is_there(path) or _make(cfg, part, request, path)


def _make(cfg: ExtractConfig, part: Part | None, request: Json, path: Path) -> bool:
    """Make the cache or a part of it, but for a dry run. -> whether it is finished"""
    model = models.load(replace(cfg.model, device=_device(cfg)))
    model.check_context(cfg.dataset.context)
    bos = tokens.bos_of(cfg.dataset, model.tokenizer)
    if cfg.cache.targets is Targets.recompute:
        try_out(model)
    if cfg.dry_run:
        estimate.say(cfg, model, bos, path)
        return False
    with _workspace(path) as folder:
        packed = _pack(cfg, model, bos, folder, path, part)
        _check_vocabulary(model, packed)
        about = describe(model, cfg.dataset, packed, request, bos)
        plan = make_plan(path, about, model.mlp_norm(), packed, cfg.cache.shard_mb)
        _say(cfg, model, plan)
        is_finished = _fill(cfg, model, plan, part)
        if is_finished:
            _discard(folder, path)
            tidy(path)
            cache = Cache.open(path)
            for line in describe_codec(cache) if cache.codec is not Codec.raw else ():
                logger.info(line)
    return is_finished


def _fill(cfg: ExtractConfig, model: LanguageModel, plan: Plan, part: Part | None) -> bool:
    """Extract what is this process's to extract, and finish the cache if it is the last. -> whether it is finished"""
    sample = partial(sample_of, model, plan)
    with Writer(plan, part=part, write=cfg.cache.write, sample=sample) as writer:
        if writer.is_finished:
            return True
        start = time.monotonic()
        n_tokens = _extract(model, writer, cfg.extract.batch_tokens)
        rate = f"{n_tokens / (time.monotonic() - start):,.0f} tokens/s"
        publishes = writer.finish()
        if publishes:
            speak()
            check = spot_check(model, writer.plan)
            logger.info("spot check: %s", check)
            writer.publish({} if check.recomputed is None else {"recompute": check.recomputed.attributes})
        logger.info("%s, %s", "all blocks" if part is None else f"part {part}", rate)
    if not publishes and not writer.is_finished:
        n_done = f"{writer.n_done} of {len(writer.plan.blocks)} blocks of the cache are"
        logger.info("part %s is done; %s; the last part to end finishes it", part, n_done)
    return publishes or writer.is_finished


def _device(cfg: ExtractConfig) -> str:
    return cfg.model.device if cfg.model.device_map is not None else pieces.own_device(cfg.model.device)


def _pack(
    cfg: ExtractConfig, model: LanguageModel, bos: int | None, folder: Path, path: Path, part: Part | None
) -> dict[Split, Packed]:
    """The tokens. One part packs; the others wait for it and find what it has kept."""
    lock = take_lock(folder, path, wait="it packs the text" if part is not None else "")
    try:
        return tokens.pack(cfg.dataset, model.tokenizer, bos, folder / "tokens")
    finally:
        os.close(lock)


@contextmanager
def _workspace(path: Path) -> Iterator[Path]:
    """Where packing notes how far it has come, beside the cache: kept for the next start unless the request itself was
    refused, and for the other parts until the cache is finished."""
    folder = path.parent / PACKING / path.name
    new = [place for place in (folder, *folder.parents) if not place.exists()]
    try:
        yield folder
    except UserError:
        if not (path / JOURNAL).exists():
            _discard(folder, path)
        raise
    finally:
        if folder.is_dir() and not (folder / "tokens").exists():
            _discard(folder, path)
        remove_empty([folder, folder.parent, *new])


def _discard(folder: Path, path: Path) -> None:
    """Remove the workspace, unless another process packs there: it is that one's to remove then."""
    with suppress(UserError):
        lock = take_lock(folder, path)
        try:
            remove_held(folder)
        finally:
            os.close(lock)


def _is_there(path: Path) -> bool:
    """Whether the cache is finished and whole."""
    if not (path / "zarr.json").exists():
        return False
    found = next(damage(path, read_attributes(path)), None)
    if found is None:
        tidy(path)
        return True
    array, chunk, what = found
    logger.warning("making again what is damaged: %s %s", f"{path}: chunk {chunk} of {array}" if array else "", what)
    return False


def _extract(model: LanguageModel, writer: Writer, batch_tokens: int) -> int:
    """Run the base model over the blocks that are left. -> their tokens"""
    packed, norm = writer.plan.packed, writer.plan.norm.to(str(model.device))
    codes = {name: code.to(model.device) for name, code in writer.codes.items()}
    n_left, n_rows = (sum(_n_rows(block, packed) for block in blocks) for blocks in (writer.todo, writer.share))
    if n_left < n_rows:
        logger.info("going on: %s of %s tokens are done", f"{n_rows - n_left:,}", f"{n_rows:,}")
    context = packed[Split.train].contexts.shape[1]
    buffers = Buffers(model, context, batch_tokens, n_buffers(model.device))
    with (
        Progress(n_rows, unit="tok", desc="extract", initial=n_rows - n_left) as progress,
        Conveyor(writer, model.layers.start) as conveyor,
    ):
        for block in writer.todo:
            for rows in harvest(model, packed[block.split], block.contexts, buffers):
                conveyor.put(block, *as_stored(block.split, rows, norm, codes))
                progress.update(len(rows.resid_mid))
            conveyor.finish(block)
    return n_left


def _n_rows(block: Block, packed: dict[Split, Packed]) -> int:
    contexts, n_rows = packed[block.split]
    width = contexts.shape[1] - 1
    return min(block.contexts.stop * width, n_rows) - block.contexts.start * width


def _check_vocabulary(model: LanguageModel, packed: dict[Split, Packed]) -> None:
    largest = max(int(split.contexts.max()) for split in packed.values())
    if largest >= model.vocab_size:
        why = f"its tokenizer gave token {largest}, its embedding has {model.vocab_size}"
        raise UserError(f"model={model.name}: {why}; put the tokenizer that belongs to it into {model.directory}")


def _say(cfg: ExtractConfig, model: LanguageModel, plan: Plan) -> None:
    """What will be done, before it is done."""
    train, *held_out = (plan.packed[split] for split in Split)
    spec, arrays = plan.specs[STORED[0]], stored(plan.specs)
    most = "at most " if spec.compressor else ""
    lines = {
        "model": str(model),
        "dataset": f"{cfg.dataset.name}, {train.n_rows:,} tokens in {len(train.contexts):,} contexts of "
        f"{cfg.dataset.context}; {' + '.join(f'{len(p.contexts):,}' for p in held_out)} contexts held out",
        "cache": f"{plan.codec}, {most}{plan.bytes_per_token:,} bytes a token, {gb(plan.total_bytes)} in all, "
        f"{len(arrays)} x {spec.n_chunks:,} shards of {spec.file_bytes / 2**20:.3g} MB; "
        f"{gb(free_bytes(plan.path))} free",
        "path": str(plan.path),
    }
    if cfg.cache.targets is Targets.recompute:
        lines["targets"] = estimate.recomputing(model)
    for name, text in lines.items():
        logger.info("%-10s %s", name, text)


def _summary(cache: Cache) -> str:
    n_shards = len(cache.shards())
    return f"{cache.path}: {cache.n_rows:,} rows in {len(cache.stored)} x {n_shards:,} shards, {gb(cache.n_bytes)}"


def _next(path: Path, request: Json) -> str:
    """The command that trains on this cache. Without a model and a dataset it takes the newest one."""
    command = "next: clt train +experiment=batchtopk_across"
    last = newest(path.parent)
    if last is None or last.path != path:
        return f"{command} {overrides_of(request, path.parent)}"
    return command if str(path.parent) == "cache" else f"{command} cache.dir={shlex.quote(str(path.parent))}"
