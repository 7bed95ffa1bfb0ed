"""What `clt train --dry-run` says: parameters, arithmetic, bytes, batches. Nothing is allocated and nothing written."""

import logging
from collections.abc import Sequence
from typing import NamedTuple

from pipeline.arch import init
from pipeline.arch.base import Dims, Transcoder
from pipeline.arch.cost import flops
from pipeline.core import products
from pipeline.core.activations import BatchTopKAcross, JumpReLU
from pipeline.data.cache import Cache
from pipeline.data.layout import gb, prefix
from pipeline.data.plan import disk_of, free_bytes
from pipeline.data.tokens import Split
from pipeline.dist import plan_gradients
from pipeline.stages import train_ranks
from pipeline.stages.options import TrainConfig
from pipeline.train import checkpoint_writer, optim, precision
from pipeline.train import run as runs
from pipeline.train.calibrate import FEATURES_AT_ONCE
from pipeline.train.options import Precision, SparseStep
from pipeline.train.run_plan import Plan

logger = logging.getLogger(__name__)

FLOAT = 4
"""Bytes of a float32, which weights, gradients and moments are."""

# The numbers below were measured on a dozen runs: resident memory, the cache's mapped files apart (docs/runs.md).

LIBRARIES = 490 * 10**6
"""Bytes of a process that has loaded all that training uses and read nothing."""

DENSE, SPARSE = 13, 6
"""Tensors of the size of all pre-activations that live at once: in a dense step, and the first ones of jumprelu, whose
layers begin in dense form; in a step of relu, or of any with a loss that reads all pre-activations."""

MEASURED = 3.7
"""The same while held-out text is measured, in batches of the training's size."""

FIRST_COPIES, HELD_OUT_COPIES = 12, 12
"""Rows as float32, so many times, of the sample that weights start from, and of held-out text."""

RANKED = 28
"""Bytes that calibration takes for each pre-activation it sorts: four floats and an index."""


class Memory(NamedTuple):
    """Bytes of one run."""

    kept: int
    """Weights, gradients and the optimiser's state, from the first step to the last."""
    passing: int
    """What comes and goes beside them, at the most."""


def memory(cfg: TrainConfig, cache: Cache, plan: Plan, model: Transcoder, needs_pre_acts: bool) -> Memory:
    """Of a run, the libraries apart."""
    in_use, state = kept_bytes(cfg, model)
    kept = in_use + gradient_bytes(cfg, model) + state + (copied_bytes(cfg, model) if _on_cpu(cfg) else 0)
    return Memory(kept, peak_bytes(cfg, model, plan, needs_pre_acts, held_out_rows(cache)) - LIBRARIES - kept)


def say_together(runs_at_once: Sequence[Memory]) -> None:
    """Of runs that take turns in one process: all that they keep, and what comes and goes of one at a time."""
    kept, passing = sum(one.kept for one in runs_at_once), max(0, *(one.passing for one in runs_at_once))
    logger.info(
        "%d runs at once: weights, gradients and optimisers %s; about %s at the peak",
        len(runs_at_once), gb(kept), gb(LIBRARIES + kept + passing),
    )  # fmt: skip


def say(cfg: TrainConfig, cache: Cache, plan: Plan, model: Transcoder, needs_pre_acts: bool) -> None:
    """`model` may lie on the meta device: only its shapes are read."""
    learned = model.n_parameters
    cost = flops(model, needs_pre_acts)
    (weights, state), peak = kept_bytes(cfg, model), peak_bytes(cfg, model, plan, needs_pre_acts, held_out_rows(cache))
    tokens = plan.n_steps * plan.batch_tokens
    sparse = "" if cost.decode_sparse is None else f", sparse {_count(cost.decode_sparse)}"
    needed, free = disk_bytes(cfg, model, plan), free_bytes(runs.RUNS)
    copied = copied_bytes(cfg, model)
    pinned = "" if not copied or _on_cpu(cfg) else f"; for checkpoints {gb(copied)} of the CPU's"
    lines = {
        "cache": f"{cache.path}: {cache.n_rows:,} rows, {model.dims.n_layers} layers of {model.dims.d_model}",
        "transcoder": f"{cfg.arch.name}, {cfg.activation.name}, {model.n_sources} x {model.d_features:,} features, "
        f"{cfg.arch.site} to {cfg.arch.writes}",
        "parameters": f"{learned:,}",
        "FLOPs a token": f"encode {_count(cost.encode)}, decode dense {_count(cost.decode_dense)}{sparse}",
        "FLOPs a step": f"{_count(cost.step * plan.batch_tokens)} forward and backward "
        f"({_count(cost.step)} a token), {_count(cost.step * tokens)} in all; a multiply-add is 2",
        "memory": f"weights {gb(weights)}, gradients {gb(gradient_bytes(cfg, model))}, optimiser {gb(state)}; "
        f"about {gb(peak)} at the peak, on {cfg.train.device}{pinned}",
        "disk": f"{gb(needed)}, {gb(free)} free on {disk_of(runs.RUNS)}" + ("" if free >= needed else ": NOT ENOUGH"),
        "run": f"runs/{cfg.name}: {plan.n_steps:,} steps of {plan.batch_tokens:,} tokens, "
        f"{tokens / cache.n_rows:.2f} passes over the cache",
    }
    width = max(map(len, lines))
    for name, text in lines.items():
        logger.info("%s %s", name.ljust(width), text)
    logger.info("nothing was written; without --dry-run the same command trains")


def disk_bytes(cfg: TrainConfig, model: Transcoder, plan: Plan) -> int:
    """What a run writes: weights and the optimiser's state in each checkpoint, one more of them while it is being
    written, and the result."""
    weights, state = kept_bytes(cfg, model)
    both = weights + state + (weights if cfg.optim.name == "signsgd" else 0)  # those at work and the averaged
    return both * (plan.keep_checkpoints + plan.keep_best + 1) + FLOAT * model.n_parameters


def peak_bytes(cfg: TrainConfig, model: Transcoder, plan: Plan, needs_pre_acts: bool, held_out: int) -> int:
    """Memory at the worst of four moments: the start from data, a step, a checkpoint, the calibration at the end. An
    estimate; pages of the cache's files, which the system takes back when it needs them, are not in it."""
    weights = FLOAT * model.n_parameters
    row = FLOAT * model.dims.n_layers * model.dims.d_model
    start = weights + first_bytes(cfg, model.dims, model.d_features)
    in_use, state = kept_bytes(cfg, model)
    # From the first step on. What the allocator got for the rows of dead features it does not give back.
    kept = in_use + gradient_bytes(cfg, model) + state + (weights if cfg.loss.aux_k > 0 else 0)
    kept += copied_bytes(cfg, model) if _on_cpu(cfg) else 0
    step = kept + step_bytes(cfg, model, plan, needs_pre_acts)
    # With signsgd the weights at work lie beside the averaged.
    checkpoint = kept + (weights if cfg.optim.name == "signsgd" else 0)
    ranked = RANKED * held_out * min(FEATURES_AT_ONCE, model.d_features) if model.activation.chooses else 0
    pre_acts = _pre_acts_bytes(model, min(plan.part_tokens, held_out))
    measured = HELD_OUT_COPIES * held_out * row + int(MEASURED * pre_acts)
    end = kept + max(weights, measured, 5 * held_out * row + ranked)  # weights: folded and written
    return LIBRARIES + max(start, step, checkpoint, end)


def step_bytes(cfg: TrainConfig, model: Transcoder, plan: Plan, needs_pre_acts: bool) -> int:
    """Of the tokens of a step and what becomes of them."""
    # As they are stored, as floats, through the norm, scaled, and the reconstruction with its gradient.
    batch = 8 * plan.batch_tokens * FLOAT * model.dims.n_layers * model.dims.d_model
    return batch + _features_bytes(cfg, model, plan, needs_pre_acts)


def first_bytes(cfg: TrainConfig, dims: Dims, d_features: int) -> int:
    """Of the sample of rows that weights start from, for so many features of the whole transcoder."""
    sampled = cfg.train.init_from is None and init.needs_sample(cfg.arch)
    n_first = max(8192, 4 * d_features) if sampled else 0
    return FIRST_COPIES * n_first * FLOAT * dims.n_layers * dims.d_model


def gradient_bytes(cfg: TrainConfig, model: Transcoder) -> int:
    """Of those that are written. A sparse step of Adam in float32 keeps terms in their place (`core/deferred.py`), and
    torch's kernels make that of one table at a time; a dense layer, and AuxK, write those of all weights."""
    weights = kept_bytes(cfg, model)[0]
    adam = cfg.optim.name in ("adam", "adamw") and cfg.optim.clip is None and cfg.train.weights is Precision.float32
    terms = adam and (products.module() is not None or train_ranks.device(cfg).type == "cpu")
    sparse = model.activation.chooses and cfg.train.sparse is not SparseStep.never and cfg.loss.aux_k == 0
    if not (terms and sparse and cfg.arch.name in plan_gradients.LEAVES):
        return weights
    return 0 if products.module() is not None else FLOAT * model.d_features * model.dims.d_model


def copied_bytes(cfg: TrainConfig, model: Transcoder) -> int:
    """What a checkpoint that is written beside the training is written from: a copy of weights and optimiser state in
    the CPU's memory."""
    device = train_ranks.device(cfg)
    return sum(kept_bytes(cfg, model)) if checkpoint_writer.beside(cfg.train.async_checkpoints, device) else 0


def _on_cpu(cfg: TrainConfig) -> bool:
    return train_ranks.device(cfg).type == "cpu"


def held_out_rows(cache: Cache) -> int:
    """Rows of the larger of the two held-out splits."""
    return max(cache.specs[f"{prefix(split)}resid_mid"].shape[0] for split in (Split.calibration, Split.evaluation))


def table_bytes(cfg: TrainConfig) -> int:
    """Of one weight of a table in training."""
    return FLOAT // 2 if cfg.train.weights is Precision.bfloat16 else FLOAT


def kept_bytes(cfg: TrainConfig, model: Transcoder) -> tuple[int, int]:
    """Bytes of the weights in training, and of the optimiser's state."""
    return precision.weight_bytes(model, cfg.train.weights), optim.state_bytes(cfg.optim.name, model)


def _pre_acts_bytes(model: Transcoder, n_tokens: int) -> int:
    return FLOAT * n_tokens * model.d_features * model.n_sources


def _features_bytes(cfg: TrainConfig, model: Transcoder, plan: Plan, needs_pre_acts: bool) -> int:
    """Pre-activations, features and what autograd keeps of them."""
    pre_acts = _pre_acts_bytes(model, plan.part_tokens)
    dense = not model.activation.chooses and cfg.train.sparse is SparseStep.never
    if dense or isinstance(model.activation, JumpReLU):
        return DENSE * pre_acts
    if needs_pre_acts or not model.activation.chooses:
        return SPARSE * pre_acts
    # Pre-activations are dropped layer by layer, unless layers compete.
    return 2 * pre_acts // (1 if isinstance(model.activation, BatchTopKAcross) else model.n_sources)


def _count(number: float) -> str:
    """1,234,567 as 1.23M."""
    for unit, size in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.0f}"
