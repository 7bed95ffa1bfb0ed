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
from torch.nn import Parameter

from pipeline.arch import init
from pipeline.arch.base import Dims, Transcoder
from pipeline.arch.init_rows import FIRING
from pipeline.core import activations, products
from pipeline.core.normalize import Scaling
from pipeline.data.cache import Cache
from pipeline.data.layout import gb
from pipeline.data.loader import EVERYTHING, Loader
from pipeline.data.mlps import Mlps
from pipeline.data.options import Targets
from pipeline.data.plan import disk_of, free_bytes
from pipeline.data.recompute import mlps_of
from pipeline.dist import mesh as meshes
from pipeline.dist import sharded
from pipeline.dist.mesh import Mesh
from pipeline.dist.sharded import Ranks
from pipeline.dist.share import Share
from pipeline.errors import UserError
from pipeline.ranks import log_into
from pipeline.stages import plan_say, train_estimate, train_numbers, train_plan, train_ranks, train_say
from pipeline.stages.options import TrainConfig
from pipeline.stages.plan_options import PlanOptions
from pipeline.stages.train_cache import find_cache, statistics
from pipeline.stages.train_finish import finish, held_out, use_best
from pipeline.stages.train_ranks import first
from pipeline.stages.train_resume import alone, check_resume
from pipeline.stages.train_watch import watchers
from pipeline.train import artifact, checkpoint, checkpoint_writer, inputs, loggers, optim, precision, warm
from pipeline.train import run as runs
from pipeline.train.checkpoint_writer import Writer
from pipeline.train.inputs import Inputs, Recompute
from pipeline.train.loop import Trainer
from pipeline.train.objective import Objective
from pipeline.train.optim import Place
from pipeline.train.options import Finish
from pipeline.train.run_log import METRICS, last_line
from pipeline.train.run_plan import Plan

logger = logging.getLogger(__name__)


class Checked(NamedTuple):
    """Settings of which everything has been checked that can be before weights are made."""

    cfg: TrainConfig
    cache: Cache
    plan: Plan
    dims: Dims
    device: torch.device
    earlier: Path | None
    """The run whose weights this one begins with."""
    maps: Scaling
    variances: tuple[float, Tensor]
    mesh: Mesh


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
    cfg = train_plan.with_grid(cfg)
    train_ranks.check(cfg)
    device = meshes.local_device(train_ranks.device(cfg))
    with products.using(cfg.train.kernels, device), train_plan.mesh_of(cfg, device) as mesh:
        first(mesh, lambda: check_resume(cfg))
        checked = check(cfg, find_cache(cfg), mesh)
        if cfg.dry_run:
            estimate(checked)
            return runs.RUNS / str(cfg.name)
        with begun(checked) as ready:
            if ready is not None:
                with loader(cfg, checked.cache, ready.trainer.state.step, ready.trainer.share) as batches:
                    metrics = ready.trainer.fit(iter(batches))
                conclude(ready, metrics)
        return runs.RUNS / str(cfg.name)


def check(cfg: TrainConfig, cache: Cache, mesh: Mesh | None = None) -> Checked:
    """Raises UserError for settings that make no sense, alone or with this cache; writes nothing. mesh: of the ranks
    that train together."""
    mesh = mesh or meshes.alone()
    train_plan.check(cfg)
    loggers.check(cfg.log)
    plan = train_numbers.resolved(cfg, cache)
    Share(mesh.data.rank, mesh.data.size, plan.accumulate).check(plan.batch_tokens)
    device = meshes.local_device(train_ranks.device(cfg))
    dims = Dims(cache.n_layers, cache.d_model)
    earlier = _earlier(cfg, dims, mesh)
    if cfg.train.init_from is None:
        init.check(cfg.arch, cfg.activation.name, cache.n_rows)
    y_statistics = statistics(cache, cfg.arch.writes)
    maps = inputs.scaling(cfg.train.norm, statistics(cache, cfg.arch.site), y_statistics)
    variances = inputs.variance(y_statistics, maps), inputs.layer_variance(y_statistics, maps)
    optim.check(cfg.optim, mesh.features.size)
    return Checked(cfg, cache, plan, dims, device, earlier, maps, variances, mesh)


def estimate(checked: Checked) -> train_estimate.Memory:
    """Say what a run would cost. -> its memory"""
    cfg, plan = checked.cfg, checked.plan
    with torch.device("meta"):  # shapes alone
        model, ranks = build(cfg, checked.dims, checked.mesh)
    train_ranks.check_moments(cfg, ranks.whole, checked.mesh.features.size)
    activations.check_batch(model.activation, plan.part_tokens)
    objective = _objective(checked, model, ranks)
    train_estimate.say(cfg, checked.cache, plan, model, objective.needs_pre_acts)
    if cfg.dist.world is not None:
        plan_say.say(train_plan.planned(cfg, checked.dims, plan.n_steps, PlanOptions()), cfg)
    return train_estimate.memory(cfg, checked.cache, plan, model, objective.needs_pre_acts)


@contextmanager
def begun(
    checked: Checked, mlps: Mlps | None = None, targets: Callable[[Tensor], Tensor] | None = None
) -> Iterator[Ready | None]:
    """The run of these settings, its directory held, with its first weights or those of its last checkpoint; None, with
    a word, where it is finished. mlps: of a cache that recomputes its targets, where they are loaded already; targets:
    what computes with them."""
    cfg, cache, plan, _, device, earlier, maps, _, mesh = checked
    assert cfg.name is not None
    model, ranks = build(cfg, checked.dims, mesh)
    model = model.to(device)
    train_ranks.check_moments(cfg, ranks.whole, mesh.features.size)
    activations.check_batch(model.activation, plan.part_tokens)
    if mlps is None and cache.targets is Targets.recompute and not runs.finished(runs.RUNS / cfg.name):
        mlps = mlps_of(cache, device)
    recompute = None if mlps is None else Recompute(targets or mlps, device)
    prepare = inputs.build(cache.norm, cfg.arch.site, maps, device, cfg.arch.target, recompute)
    objective = _objective(checked, model, ranks)
    optimizer = optim.build(trained(model), cfg.optim, Place(mesh.features, cfg.train.seed, ranks.shard.ids()))
    first(mesh, lambda: _check_space(cfg, ranks.whole, plan))

    mesh.world.barrier()  # nobody looks for what was there before any more
    directory = Path(first(mesh, lambda: str(runs.start(str(cfg.name), cfg))))
    if first(mesh, lambda: runs.finished(directory)):
        if mesh.speaks:
            (directory / "lock").unlink(missing_ok=True)  # of a process that was killed at its very end
            logger.info("%s is finished already\nnext: clt eval run=%s", directory, directory)
        yield None
        return
    log_into(directory)
    asynchronous = checkpoint_writer.beside(cfg.train.async_checkpoints, device)
    with (
        alone(directory, mesh),
        watchers(cfg, directory, mesh.speaks) as watching,
        Writer(directory, mesh, ranks.shard, beside=asynchronous) as writer,
    ):
        trainer = Trainer(directory, model, optimizer, objective, prepare, plan, cfg.optim)
        trainer.writer = writer
        trainer.about = {"cache": cache.key, "kernels": str(products.active())}
        trainer.held_out, trainer.log.watchers = held_out(cfg, cache, plan, prepare, ranks), watching
        last = _last(directory, mesh)
        if mesh.speaks:
            train_say.beginning(cfg, cache, plan, ranks.whole, device, last)
        if last is not None:
            train_say.kernels(last)
        if mlps is not None:
            train_say.targets(mlps, plan.part_tokens)
        if last is None and earlier is not None:
            logger.info("weights    from %s", earlier)
            warm.start_from(model, artifact.read(earlier, ranks.shard), prepare.scaling)
        elif last is None:
            _initialise(cfg, model, cache, prepare, ranks)
        ranks.bare(model)
        precision.store(model, cfg.train.weights)
        torch.manual_seed(cfg.train.seed)  # only now: loading MLPs draws numbers
        trainer.begin(last)
        yield Ready(cfg, cache, trainer)


def loader(cfg: TrainConfig, cache: Cache, start: int, share: Share = EVERYTHING) -> Loader:
    """The batches of a run, from number `start` on; of each the share of a rank."""
    options, ahead = cfg.train, cfg.cache.shards_ahead
    return Loader(cache, options.batch_tokens, options.seed, cfg.cache.read, start, shards_ahead=ahead, share=share)


def conclude(ready: Ready, metrics: dict[str, object]) -> None:
    """After the last step: thresholds, folding, runs/NAME/final. metrics: the last line of the log; {} where no step
    was left to take."""
    cfg, cache, trainer = ready
    if trainer.inputs.recompute is not None:
        train_say.share_of_targets(trainer.directory)
    if cfg.train.finish is Finish.best:
        metrics = use_best(trainer)
    finish(cfg, cache, trainer, metrics or last_line(trainer.directory / METRICS))
    if trainer.ranks.mesh.speaks:
        logger.info("%s\nnext: clt eval run=%s", trainer.directory, trainer.directory)


def build(cfg: TrainConfig, dims: Dims, mesh: Mesh | None = None) -> tuple[Transcoder, Ranks]:
    """The transcoder, its weights zero; of several ranks the features of this one."""
    return sharded.build(cfg.arch, cfg.activation, dims, mesh or meshes.alone())


def trained(model: Transcoder) -> list[tuple[str, Parameter]]:
    """The parameters that this rank trains."""
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


def _last(directory: Path, mesh: Mesh) -> Path | None:
    """The checkpoint to go on from, once what others left half done is removed."""

    def newest() -> str | None:
        checkpoint.tidy(directory)
        found = checkpoint.newest(directory)
        return None if found is None else str(found)

    found = first(mesh, newest)
    return None if found is None else Path(found)


def _objective(checked: Checked, model: Transcoder, ranks: Ranks) -> Objective:
    cfg, (total, by_layer) = checked.cfg, checked.variances
    return Objective(cfg.loss, model, total, checked.plan.n_steps, by_layer, cfg.train.seed, cfg.train.sparse, ranks)


def _check_space(cfg: TrainConfig, model: Transcoder, plan: Plan) -> None:
    """UserError when the run's checkpoints and its result would not fit on the disk."""
    needed = train_estimate.disk_bytes(cfg, model, plan)
    free = free_bytes(runs.RUNS)
    if needed > free:
        sizes = f"{gb(needed)} to write, {gb(free)} free on {disk_of(runs.RUNS)}"
        raise UserError(f"the run does not fit: {sizes}; free some space or use a smaller arch.d_features")


def _earlier(cfg: TrainConfig, dims: Dims, mesh: Mesh) -> Path | None:
    """The finished run that `train.init_from` names, if any; not where this run has begun."""
    asked = cfg.train.init_from
    begun_before = first(mesh, lambda: checkpoint.newest(runs.RUNS / str(cfg.name)) is not None)
    if asked is None or begun_before:
        return None
    path = runs.named(asked)
    warm.check(path, artifact.config_of(artifact.folder(path)), cfg.arch, dims)
    return path


def _initialise(cfg: TrainConfig, model: Transcoder, cache: Cache, prepare: Inputs, ranks: Ranks) -> None:
    generator = torch.Generator().manual_seed(cfg.train.seed)
    if not init.needs_sample(cfg.arch):
        nothing = torch.empty(0, *model.dims)
        init.initialise(model, nothing, nothing, generator, held=ranks.held)
        return
    n = min(cache.n_rows, max(8192, 4 * ranks.whole.d_features))
    with Loader(cache, n, cfg.train.seed, cfg.cache.read, shards_ahead=cfg.cache.shards_ahead) as batches:
        batch = next(iter(batches))
        x, y = prepare(batch.resid_mid, batch.mlp_out)
    # L0 falls while features form, penalty or not, so that a run which aims high begins higher still.
    target = cfg.loss.target_l0 or 0.0
    init.initialise(model, x, y, generator, max(FIRING, 2 * target / model.n_sources), ranks.held)
