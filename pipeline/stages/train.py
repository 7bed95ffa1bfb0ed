"""`clt train`: cache -> run directory.

clt train +experiment=batchtopk_across name=demo
clt train arch=tied --dry-run
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.arch import init, table
from pipeline.arch.base import Dims, Transcoder
from pipeline.arch.init_rows import FIRING
from pipeline.core import activations, products
from pipeline.core.normalize import Scaling
from pipeline.data.cache import Cache
from pipeline.data.layout import gb
from pipeline.data.loader import Loader
from pipeline.data.mlps import Mlps
from pipeline.data.models import resolve_device
from pipeline.data.options import Targets
from pipeline.data.plan import disk_of, free_bytes
from pipeline.data.recompute import mlps_of
from pipeline.data.tokens import count
from pipeline.errors import UserError
from pipeline.stages import train_estimate, train_say
from pipeline.stages.options import TrainConfig
from pipeline.stages.train_cache import find_cache, statistics
from pipeline.stages.train_finish import finish, held_out_fvu, use_best
from pipeline.stages.train_resume import alone, check_resume
from pipeline.train import artifact, checkpoint, inputs, optim, precision, warm
from pipeline.train import run as runs
from pipeline.train.artifact import Trained
from pipeline.train.inputs import Inputs, Recompute
from pipeline.train.loop import Plan, Trainer
from pipeline.train.objective import Objective
from pipeline.train.options import Finish
from pipeline.train.run_log import METRICS, last_line

logger = logging.getLogger(__name__)


class Checked(NamedTuple):
    """Settings of which everything has been checked that can be before weights are made."""

    cfg: TrainConfig
    cache: Cache
    plan: Plan
    dims: Dims
    device: torch.device
    earlier: Trained | None
    maps: Scaling
    variances: tuple[float, Tensor]


class Ready(NamedTuple):
    """A run that waits for the batch after its state."""

    cfg: TrainConfig
    cache: Cache
    trainer: Trainer


def run(cfg: TrainConfig) -> Path:
    """Train, calibrate, fold and save; or continue, or say that the run is finished. -> runs/NAME, which a dry run does
    not make."""
    if cfg.train.share_pass:
        raise UserError(
            "train.share_pass=true lets the jobs of a sweep read each batch once; add -m and values to sweep over, or "
            "leave it out"
        )
    with products.using(cfg.train.kernels, resolve_device(cfg.train.device)):
        check_resume(cfg)
        checked = check(cfg, find_cache(cfg))
        if cfg.dry_run:
            estimate(checked)
            return runs.RUNS / str(cfg.name)
        with begun(checked) as ready:
            if ready is not None:
                with loader(cfg, checked.cache, ready.trainer.state.step) as batches:
                    metrics = ready.trainer.fit(iter(batches))
                conclude(ready, metrics)
        return runs.RUNS / str(cfg.name)


def check(cfg: TrainConfig, cache: Cache) -> Checked:
    """Raises UserError for settings that make no sense, alone or with this cache; writes nothing."""
    plan = _plan(cfg, cache)
    device = resolve_device(cfg.train.device)
    dims = Dims(cache.n_layers, cache.d_model)
    earlier = _earlier(cfg, dims)
    if cfg.train.init_from is None:
        init.check(cfg.arch, cfg.activation.name, cache.n_rows)
    y_statistics = statistics(cache, cfg.arch.writes)
    maps = inputs.scaling(cfg.train.norm, statistics(cache, cfg.arch.site), y_statistics)
    variances = inputs.variance(y_statistics, maps), inputs.layer_variance(y_statistics, maps)
    optim.check(cfg.optim)
    return Checked(cfg, cache, plan, dims, device, earlier, maps, variances)


def estimate(checked: Checked) -> train_estimate.Memory:
    """Say what a run would cost. -> its memory"""
    cfg, plan = checked.cfg, checked.plan
    with torch.device("meta"):  # shapes alone
        model = build(cfg, checked.dims)
    precision.check(cfg.train.weights, cfg.optim.name, model)
    activations.check_batch(model.activation, plan.part_tokens)
    objective = _objective(checked, model)
    train_estimate.say(cfg, checked.cache, plan, model, objective.needs_pre_acts)
    return train_estimate.memory(cfg, checked.cache, plan, model, objective.needs_pre_acts)


@contextmanager
def begun(
    checked: Checked, mlps: Mlps | None = None, targets: Callable[[Tensor], Tensor] | None = None
) -> Iterator[Ready | None]:
    """The run of these settings, its directory held, with its first weights or those of its last checkpoint; None, with
    a word, where it is finished. mlps: of a cache that recomputes its targets, where they are loaded already; targets:
    what computes with them."""
    cfg, cache, plan, _, device, earlier, maps, _ = checked
    assert cfg.name is not None
    model = build(cfg, checked.dims).to(device)
    precision.check(cfg.train.weights, cfg.optim.name, model)
    activations.check_batch(model.activation, plan.part_tokens)
    if mlps is None and cache.targets is Targets.recompute and not runs.finished(runs.RUNS / cfg.name):
        mlps = mlps_of(cache, device)
    recompute = None if mlps is None else Recompute(targets or mlps, device)
    prepare = inputs.build(cache.norm, cfg.arch.site, maps, device, cfg.arch.target, recompute)
    objective = _objective(checked, model)
    optimizer = optim.build(model.named_parameters(), cfg.optim)
    _check_space(model, plan)

    directory = runs.start(cfg.name, cfg)
    if runs.finished(directory):
        (directory / "lock").unlink(missing_ok=True)  # of a process that was killed at its very end
        logger.info("%s is finished already\nnext: clt eval run=%s", directory, directory)
        yield None
        return
    with alone(directory):
        trainer = Trainer(directory, model, optimizer, objective, prepare, plan, cfg.optim)
        trainer.about = {"cache": cache.key, "kernels": str(products.active())}
        trainer.held_out_fvu = lambda: held_out_fvu(cfg, cache, trainer)
        checkpoint.tidy(directory)
        last = checkpoint.newest(directory)
        train_say.beginning(cfg, cache, plan, model, device, last)
        if last is not None:
            train_say.kernels(last)
        if mlps is not None:
            train_say.targets(mlps, plan.part_tokens)
        if last is None and earlier is not None:
            logger.info("weights    from %s", earlier.path)
            warm.start_from(model, earlier, prepare.scaling)
        elif last is None:
            _initialise(cfg, model, cache, prepare)
        precision.store(model, cfg.train.weights)
        torch.manual_seed(cfg.train.seed)  # only now: loading MLPs draws numbers
        trainer.begin(last)
        yield Ready(cfg, cache, trainer)


def loader(cfg: TrainConfig, cache: Cache, start: int) -> Loader:
    """The batches of a run, from number `start` on."""
    options, ahead = cfg.train, cfg.cache.shards_ahead
    return Loader(cache, options.batch_tokens, options.seed, cfg.cache.read, start, shards_ahead=ahead)


def conclude(ready: Ready, metrics: dict[str, object]) -> None:
    """After the last step: thresholds, folding, runs/NAME/final. metrics: the last line of the log; {} where no step
    was left to take."""
    cfg, cache, trainer = ready
    if trainer.inputs.recompute is not None:
        train_say.share_of_targets(trainer.directory)
    if cfg.train.finish is Finish.best:
        metrics = use_best(trainer)
    finish(cfg, cache, trainer, metrics or last_line(trainer.directory / METRICS))
    logger.info("%s\nnext: clt eval run=%s", trainer.directory, trainer.directory)


def build(cfg: TrainConfig, dims: Dims) -> Transcoder:
    """The transcoder, its weights zero."""
    rule = activations.build(cfg.activation, table.n_sources(cfg.arch, dims), cfg.arch.d_features)
    return table.build(cfg.arch, dims, rule)


def _objective(checked: Checked, model: Transcoder) -> Objective:
    cfg, (total, by_layer) = checked.cfg, checked.variances
    return Objective(cfg.loss, model, total, checked.plan.n_steps, by_layer, cfg.train.seed, cfg.train.sparse)


def _plan(cfg: TrainConfig, cache: Cache) -> Plan:
    """Resolve lengths given in tokens, and `auto`."""
    options = cfg.train
    if options.batch_tokens < 1 or options.batch_tokens > cache.n_rows:
        raise UserError(
            f"train.batch_tokens={options.batch_tokens} must lie between 1 and the cache's {cache.n_rows} rows"
        )
    if options.accumulate < 1 or options.batch_tokens % options.accumulate:
        raise UserError(
            f"train.accumulate={options.accumulate} must be 1 or more and divide "
            f"train.batch_tokens={options.batch_tokens}, into equal parts"
        )
    if options.seed < 0:
        raise UserError(f"train.seed={options.seed} must not be negative")
    if (options.n_tokens is None) == (options.n_steps is None):
        raise UserError("give the length of the run once: train.n_tokens or train.n_steps, the other null")
    tokens = count(options.n_tokens) if options.n_tokens else 0
    n_steps = options.n_steps if options.n_steps is not None else max(1, tokens // options.batch_tokens)
    if n_steps < 1:
        raise UserError(f"train.n_steps={n_steps} must be at least 1")
    tokens = n_steps * options.batch_tokens
    window = min(tokens // 10, 10_000_000) if options.dead_window == "auto" else count(options.dead_window)
    every = tokens // 5 if options.checkpoint_every == "auto" else count(options.checkpoint_every)
    if options.keep_checkpoints < 1:
        raise UserError(f"train.keep_checkpoints={options.keep_checkpoints} must be at least 1")
    if options.keep_best < 0:
        raise UserError(f"train.keep_best={options.keep_best} must not be negative")
    if options.finish is Finish.best and not options.keep_best:
        raise UserError("train.finish=best needs a best checkpoint to finish with; add train.keep_best=1")
    if options.diverged is not None and options.diverged <= 1:
        raise UserError(f"train.diverged={options.diverged} must be above 1; null for no such limit")
    if cfg.log.every < 1:
        raise UserError(f"log.every={cfg.log.every} must be at least 1")
    resample_steps = _resampling(cfg, n_steps, window)
    return Plan(
        n_steps=n_steps,
        batch_tokens=options.batch_tokens,
        dead_window=max(window, 1),
        checkpoint_steps=max(1, every // options.batch_tokens),
        keep_checkpoints=options.keep_checkpoints,
        log_steps=cfg.log.every,
        resample_steps=resample_steps,
        last_resample=int(cfg.loss.resample_until * n_steps),
        seed=options.seed,
        y_variance=statistics(cache, cfg.arch.writes).std.square(),
        accumulate=options.accumulate,
        keep_best=options.keep_best,
        diverged=options.diverged,
    )


def _resampling(cfg: TrainConfig, n_steps: int, window: int) -> int:
    """Steps between resamplings, 0 for none. UserError when none would ever come or find a dead feature."""
    every, batch = cfg.loss.resample_every, cfg.train.batch_tokens
    if every is None:
        return 0
    steps, last = max(1, count(every) // batch), int(cfg.loss.resample_until * n_steps)
    if steps > last:
        raise UserError(
            f"loss.resample_every={every} never comes in the {last * batch:,} tokens up to loss.resample_until="
            f"{cfg.loss.resample_until} of the run; use a smaller one or a longer run"
        )
    if window > last * batch:
        raise UserError(
            f"loss.resample_every={every}: no feature counts as dead before train.dead_window={window:,} tokens, and "
            f"resampling ends at {last * batch:,}; use a smaller train.dead_window"
        )
    return steps


def _check_space(model: Transcoder, plan: Plan) -> None:
    """UserError when the run's checkpoints and its result would not fit on the disk."""
    needed = train_estimate.disk_bytes(model, plan)
    free = free_bytes(runs.RUNS)
    if needed > free:
        sizes = f"{gb(needed)} to write, {gb(free)} free on {disk_of(runs.RUNS)}"
        raise UserError(f"the run does not fit: {sizes}; free some space or use a smaller arch.d_features")


def _earlier(cfg: TrainConfig, dims: Dims) -> Trained | None:
    """The finished run that `train.init_from` names, if any; not where this run has begun."""
    if cfg.train.init_from is None or checkpoint.newest(runs.RUNS / str(cfg.name)) is not None:
        return None
    earlier = artifact.read(runs.named(cfg.train.init_from))
    warm.check(earlier, cfg.arch, dims)
    return earlier


def _initialise(cfg: TrainConfig, model: Transcoder, cache: Cache, prepare: Inputs) -> None:
    generator = torch.Generator().manual_seed(cfg.train.seed)
    if not init.needs_sample(cfg.arch):
        nothing = torch.empty(0, *model.dims)
        init.initialise(model, nothing, nothing, generator)
        return
    n = min(cache.n_rows, max(8192, 4 * model.d_features))
    with Loader(cache, n, cfg.train.seed, cfg.cache.read, shards_ahead=cfg.cache.shards_ahead) as batches:
        batch = next(iter(batches))
        x, y = prepare(batch.resid_mid, batch.mlp_out)
    # L0 falls while features form, penalty or not, so that a run which aims high begins higher still.
    target = cfg.loss.target_l0 or 0.0
    init.initialise(model, x, y, generator, max(FIRING, 2 * target / model.n_sources))
