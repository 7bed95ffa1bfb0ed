"""`clt extract ... --dry-run`: what an extraction would cost, before anything is written."""

import logging
import time
from pathlib import Path

import numpy as np

from pipeline.data import tokens
from pipeline.data.codecs import COMPRESSED
from pipeline.data.harvest import Buffers, harvest, sums
from pipeline.data.layout import (
    Size,
    Spec,
    gb,
    hierarchy,
    stored,
    token_bytes,
    total_bytes,
    with_codec,
)
from pipeline.data.models import LanguageModel
from pipeline.data.options import Codec, Targets
from pipeline.data.plan import disk_of, free_bytes
from pipeline.data.tokens import Packed, Split
from pipeline.progress import clock_time
from pipeline.stages.options import ExtractConfig

logger = logging.getLogger(__name__)

TIMED_SECONDS = 5.0
"""How long the model is timed, after one batch that is not."""
TIMED_ROWS = 1024
"""Of recomputed targets."""
USUAL_RATIO = {Codec["blosc-lz4-bitshuffle"]: 1.37, Codec["pcodec"]: 1.52}
"""Of activations of a random GPT-2; outlier channels make it 1.15 and 1.45."""


def say(cfg: ExtractConfig, model: LanguageModel, bos_token_id: int | None, path: Path) -> None:
    """Logs tokens, contexts, bytes by codec, free space and time. Text of unknown length (dataset.n_tokens=all) is
    tokenised to its end for that; a count needs no text."""
    sizes = _sizes(cfg, model, bos_token_id)
    options = cfg.cache
    raw = hierarchy(model.n_layers, model.d_model, cfg.dataset.context, sizes, options.shard_mb, options.targets)
    codec, specs = options.codec, with_codec(raw, options.codec)
    n_rows = sum(size.n_rows for size in sizes.values())
    per_token, spilled = token_bytes(specs), " before compression" if codec in COMPRESSED else ""
    free, needed = free_bytes(path), total_bytes(specs)
    rate = _tokens_per_second(model, cfg.dataset.context, cfg.extract.batch_tokens)
    lines = {
        "model": str(model),
        "tokens": ", ".join(f"{size.n_rows:,} {split}" for split, size in sizes.items()),
        "contexts": f"{sum(size.n_contexts for size in sizes.values()):,} of {cfg.dataset.context} tokens",
        "bytes": f"{per_token:,} a token as {codec}{spilled}",
        **{f"as {other}": _size_as(other, raw, options.targets) for other in Codec},
        **({"targets": recomputing(model)} if options.targets is Targets.recompute else {}),
        "free": f"{gb(free)} on {disk_of(path)}" + ("" if free >= needed else ": NOT ENOUGH"),
        "time": f"{clock_time(n_rows / rate)} at {rate:,.0f} tokens/s (timed for {TIMED_SECONDS:.0f} s), "
        f"if the disk takes {gb(int(rate * per_token))} a second",
        "path": str(path),
    }
    width = max(map(len, lines))
    for name, text in lines.items():
        logger.info("%s %s", name.ljust(width), text)
    logger.info("nothing was written; without --dry-run the same command extracts")


def _size_as(codec: Codec, raw: dict[str, Spec], targets: Targets) -> str:
    """Of the whole cache, by the arrays of a raw one."""
    if codec is Codec["int8"] and targets is Targets.recompute:
        return "not with cache.targets=recompute: it would change what targets are computed from"
    if codec not in COMPRESSED:
        return gb(total_bytes(with_codec(raw, codec)))
    rows = sum(raw[name].n_chunks * raw[name].chunk_bytes for name in stored(raw))
    return f"about {gb(int(total_bytes(raw) - rows + rows / USUAL_RATIO[codec]))}"


def recomputing(model: LanguageModel) -> str:
    """What `cache.targets=recompute` costs in training, timed on this device."""
    mlps = model.mlps()
    return (
        f"mlp_out of training rows is not stored; recomputing it takes {mlps.flops / 1e6:,.3g} MFLOP a token "
        f"({mlps.rows_per_second(TIMED_ROWS):,.0f} tokens/s here, alone) and {gb(mlps.n_bytes)} of weights in training"
    )


def _sizes(cfg: ExtractConfig, model: LanguageModel, bos_token_id: int | None) -> dict[Split, Size]:
    counted = tokens.sizes(cfg.dataset, bos_token_id)
    if counted is None:
        packed = tokens.pack(cfg.dataset, model.tokenizer, bos_token_id)
        counted = {split: (len(contexts), n_rows) for split, (contexts, n_rows) in packed.items()}
    return {split: Size(*size) for split, size in counted.items()}


def _tokens_per_second(model: LanguageModel, context: int, batch_tokens: int) -> float:
    """Forward pass and statistics on random tokens: a dense model takes as long for these as for text."""
    n = max(1, batch_tokens // context)
    contexts = np.random.default_rng(0).integers(model.vocab_size, size=(n, context), dtype=np.int32)
    norm = model.mlp_norm().to(str(model.device))
    packed = Packed(contexts, n * (context - 1))

    buffers = Buffers(model, context, batch_tokens, n=1)

    def batch() -> int:
        (rows,) = harvest(model, packed, range(n), buffers)
        sums(rows, norm).cpu()  # waits for the device
        return len(rows.resid_mid)

    batch()
    done, start = 0, time.perf_counter()
    while (seconds := time.perf_counter() - start) < TIMED_SECONDS:
        done += batch()
    return done / seconds
