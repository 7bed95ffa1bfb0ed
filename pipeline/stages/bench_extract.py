"""`clt bench extract`: tokens a second of the model's body alone, of reading it, and of reading and writing.

    clt bench extract                        a random model of GPT-2 small's shape
    clt bench extract model=world bench.batch_tokens=8192

body      the layers of the base model as transformers runs them, without the head: nothing is faster than this
read      the same with our hooks, which copy resid_mid and mlp_out of every layer as bfloat16
write     reading, the statistics, and rows scattered over the shards of a cache on the disk of cache.dir, each batch's
          while the next one is computed; the cache is removed afterwards

The three take turns on the same tokens, in another order each round, so that whatever else the machine does falls on
all of them. A ratio is the median of the rounds' own ratios, with its quartiles, and beside it the ratio of all rounds
together. The disk is waited for every half minute, as in an extraction: three times as often by what is written here.
"""

import logging
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch

from pipeline.data import models
from pipeline.data.address import folder_of
from pipeline.data.conveyor import Conveyor, n_buffers
from pipeline.data.harvest import Buffers, harvest, sums
from pipeline.data.layout import gb
from pipeline.data.models import LanguageModel
from pipeline.data.options import ModelOptions
from pipeline.data.plan import Block, check_space, make_plan
from pipeline.data.tokens import Packed, Split
from pipeline.data.writer import Writer
from pipeline.errors import UserError
from pipeline.files import existing
from pipeline.progress import Progress
from pipeline.stages.bench_options import BenchExtractConfig
from pipeline.stages.bench_report import hand_over, ratios

logger = logging.getLogger(__name__)

Variants = dict[str, Callable[[int], None]]
"""name -> what to time in the round of that number"""


def run(cfg: BenchExtractConfig) -> Path:
    """Measures, prints a table and writes it as JSON. -> the file"""
    bench = cfg.bench
    if bench.rounds < 3 or bench.batches < 1 or bench.batch_tokens < bench.context:
        raise UserError("bench.rounds >= 3, bench.batches >= 1 and bench.batch_tokens >= bench.context are needed")
    model = models.load(cfg.model) if cfg.model is not None else _random_gpt2(bench.device)
    model.check_context(bench.context)
    with (
        tempfile.TemporaryDirectory(
            prefix=".bench-", dir=existing(folder_of(cfg.cache, "clt bench extract"))
        ) as folder,
        _scratch_cache(cfg, model, Path(folder)) as (writer, blocks),
    ):
        seconds = _time(model, writer, blocks, cfg)
    n_tokens = bench.batches * (bench.batch_tokens // bench.context) * bench.context
    report = _report(cfg, model, seconds, n_tokens)
    for line in _table(report):
        logger.info(line)
    return hand_over(report, cfg.to, "extract", "clt extract with the model and text of your own, --dry-run first")


def _time(
    model: LanguageModel, writer: "_Timed", blocks: list[Block], cfg: BenchExtractConfig
) -> dict[str, list[float]]:
    """Seconds of each variant and of the parts of writing, round by round; the first round is not counted."""
    buffers = Buffers(model, cfg.bench.context, cfg.bench.batch_tokens, n_buffers(model.device))
    packed = writer.plan.packed[Split.train]
    norm = writer.plan.norm.to(str(model.device))
    parts: dict[str, list[float]] = {"statistics": [], "scatter": []}

    def body(n: int) -> None:
        contexts = torch.from_numpy(
            packed.contexts[blocks[n].contexts.start : blocks[n].contexts.stop].astype(np.int64)
        )
        for batch in contexts.split(buffers.n_contexts):
            model.body(batch)

    def read(n: int) -> None:
        for _ in harvest(model, packed, blocks[n].contexts, buffers):
            pass

    with Conveyor(writer, model.layers.start) as conveyor:  # type: ignore[arg-type]

        def write(n: int) -> None:
            spent = 0.0
            if n:  # the disk is waited for beside the next rows, as in an extraction
                conveyor.finish(blocks[n - 1])
            for rows in harvest(model, packed, blocks[n].contexts, buffers):
                start = time.perf_counter()
                total = sums(rows, norm)
                spent += time.perf_counter() - start
                conveyor.put(blocks[n], rows, total)
            conveyor.flush()
            parts["statistics"].append(spent)
            parts["scatter"].append(writer.scattering)
            writer.scattering = 0.0

        variants: Variants = {"body": body, "read": read, "write": write}
        seconds: dict[str, list[float]] = {name: [] for name in variants}
        with Progress(len(blocks), unit="rounds", desc="bench") as progress:
            for n in range(len(blocks)):
                order = list(variants)[n % 3 :] + list(variants)[: n % 3]
                for name in order:
                    seconds[name].append(_seconds(lambda name=name, n=n: variants[name](n), model.device))  # type: ignore[misc]
                progress.update(1)
    return {name: values[1:] for name, values in (seconds | parts | writer.parts).items()}


def _seconds(work: Callable[[], None], device: torch.device) -> float:
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


class _Timed:
    """A writer whose calls are timed: rows, and `finish_block`, which waits for the disk."""

    def __init__(self, writer: Writer) -> None:
        self.plan = writer.plan
        self.parts: dict[str, list[float]] = {"sync": []}
        self._writer = writer
        self.scattering = 0.0

    def write(self, *arguments) -> None:  # type: ignore[no-untyped-def]
        start = time.perf_counter()
        self._writer.write(*arguments)
        self.scattering += time.perf_counter() - start

    def finish_block(self, *arguments) -> None:  # type: ignore[no-untyped-def]
        start = time.perf_counter()
        self._writer.finish_block(*arguments)
        self.parts["sync"].append(time.perf_counter() - start)


@contextmanager
def _scratch_cache(cfg: BenchExtractConfig, model: LanguageModel, folder: Path) -> Iterator[tuple[_Timed, list[Block]]]:
    """A writer of a cache with a block of random tokens for each round, one of them to warm up."""
    bench = cfg.bench
    n_contexts = bench.batches * (bench.batch_tokens // bench.context)
    random = np.random.default_rng(0)

    def packed(n: int) -> Packed:
        contexts = random.integers(model.vocab_size, size=(n, bench.context), dtype=np.int32)
        return Packed(contexts, n * (bench.context - 1))

    splits = {split: packed((bench.rounds + 1) * n_contexts if split is Split.train else 1) for split in Split}
    about = {"request": {}, "seed": 0, "context": bench.context, "block_contexts": n_contexts}
    plan = make_plan(folder / "cache", about, model.mlp_norm(), splits, cfg.cache.shard_mb)
    logger.info("%s for the time of the bench in %s", gb(plan.total_bytes), folder)
    check_space(plan)
    with Writer(plan) as writer:
        yield _Timed(writer), [block for block in plan.blocks if block.split is Split.train]


def _random_gpt2(device: str) -> LanguageModel:
    """GPT-2 small's shape with random weights: speed does not depend on what they are."""
    from transformers import GPT2Config, GPT2LMHeadModel

    from pipeline.data.world import tokenizer

    options = ModelOptions("random-gpt2", "random", device=device)
    place = models.resolve_device(device)
    torch.manual_seed(0)
    config = GPT2Config(architectures=["GPT2LMHeadModel"])
    weights = GPT2LMHeadModel(config).to(place, models.resolve_dtype(options.dtype, place)).eval()
    return LanguageModel(options, Path(), None, weights, tokenizer.build())


def _report(
    cfg: BenchExtractConfig, model: LanguageModel, seconds: dict[str, list[float]], n_tokens: int
) -> dict[str, object]:
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    medians["sync"] = statistics.mean(seconds["sync"])  # the disk is waited for in some rounds only
    parts = {
        "the model's own layers": medians["body"],
        "hooks": max(0.0, medians["read"] - medians["body"]),
        "statistics": medians["statistics"],
        "scattering rows": medians["scatter"],
        "waiting for the disk": medians["sync"],
    }
    return {
        "model": model.name,
        "shape": {"n_layers": model.n_layers, "d_model": model.d_model},
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": _device_name(model.device),
        "threads": torch.get_num_threads(),
        "attention": model.attention,
        "context": cfg.bench.context,
        "batch_tokens": cfg.bench.batch_tokens,
        "rounds": cfg.bench.rounds,
        "tokens_per_s": {name: n_tokens / medians[name] for name in ("body", "read", "write")},
        "time_over_body": {name: _quartiles(seconds[name], seconds["body"]) for name in ("read", "write")},
        "seconds_a_round": parts,
        "bottleneck": max(parts, key=lambda name: parts[name]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _quartiles(seconds: list[float], base: list[float]) -> dict[str, float]:
    return {**ratios(seconds, base), "all_rounds": sum(seconds) / sum(base)}


def _table(report: dict) -> list[str]:  # type: ignore[type-arg]
    shape = report["shape"]
    lines = [
        f"{report['model']}: {shape['n_layers']} x {shape['d_model']}, {report['dtype']} on {report['device']}, "
        f"{report['threads']} threads, {report['attention']} attention, {report['batch_tokens']} tokens a batch "
        f"in contexts of {report['context']}, {report['rounds']} rounds",
        f"{'':8}{'tokens/s':>12}{'time over body':>18}{'quartiles':>16}{'all rounds':>14}",
    ]
    for name, rate in report["tokens_per_s"].items():
        ratio = report["time_over_body"].get(name)
        spread = ""
        if ratio:
            spread = f"{ratio['median']:18.3f}{ratio['q1']:10.3f} {ratio['q3']:.3f}{ratio['all_rounds']:14.3f}"
        lines.append(f"{name:8}{rate:12,.0f}{spread}")
    parts = ", ".join(f"{name} {1000 * s:,.0f} ms" for name, s in report["seconds_a_round"].items())
    return [*lines, f"bottleneck: {report['bottleneck']} ({parts} a round; the last two beside the next batch)"]


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
