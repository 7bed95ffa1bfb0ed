"""The numbers of a run: lengths given in tokens as steps, and what `auto` comes to."""

from pipeline.data.cache import Cache
from pipeline.data.tokens import count
from pipeline.errors import UserError
from pipeline.stages.options import TrainConfig
from pipeline.stages.train_cache import statistics
from pipeline.train.held_out import every as every_steps
from pipeline.train.options import Finish
from pipeline.train.run_plan import Plan


def resolved(cfg: TrainConfig, cache: Cache) -> Plan:
    """Raises UserError for numbers that make no sense, alone or with this cache."""
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
    if cfg.log.held_out_rows < 1:
        raise UserError(f"log.held_out_rows={cfg.log.held_out_rows} must be at least 1")
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
        held_out_steps=every_steps(
            cfg.log.held_out_every, n_steps, options.batch_tokens, cfg.log.held_out_rows, cfg.log.every
        ),
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
