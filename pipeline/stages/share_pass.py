"""`clt train -m train.share_pass=true`: the jobs of a sweep that read the same batches are trained together.

Which batches a run reads is a function of its cache, `train.batch_tokens` and `train.seed` (`data/loader.py`). Lengths
may differ, and so may all that is done with a batch. Jobs of one group also read in the same way (`cache.read`,
`cache.shards_ahead`) and compute with the same kernels on the same device, of which a process has one at a time.
"""

import logging
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import NamedTuple

from pipeline.core import products
from pipeline.core.options import Kernels
from pipeline.data.cache import Cache
from pipeline.data.mlps import Mlps
from pipeline.data.models import resolve_device
from pipeline.data.options import Read, Targets
from pipeline.data.recompute import mlps_of
from pipeline.stages import train
from pipeline.stages.options import TrainConfig
from pipeline.stages.train import Checked
from pipeline.stages.train_cache import find_cache
from pipeline.stages.train_estimate import Memory, say_together
from pipeline.stages.train_resume import check_resume
from pipeline.train import run as runs
from pipeline.train import shared
from pipeline.train.shared import Attempt, Generators, Member

logger = logging.getLogger(__name__)

Found = Mapping[int, tuple[TrainConfig, Cache]]
"""Jobs by number, with their caches."""


class Key(NamedTuple):
    """What the jobs of a group have in common."""

    cache: str
    batch_tokens: int
    seed: int
    read: Read
    shards_ahead: int
    device: str
    kernels: Kernels


def run(jobs: Mapping[int, TrainConfig], attempt: Attempt) -> None:
    """Train the jobs, by number, in as few passes as can be. What fails, fails as `attempt` says; KeyboardInterrupt
    when it was asked to stop, with a checkpoint of each run that was at work."""
    found: dict[int, tuple[TrainConfig, Cache]] = {}
    for job, cfg in jobs.items():
        cfg.train.share_pass = False  # how a run was trained with others is no setting of the run
        attempt([job], partial(_find, job, cfg, found))
    groups: dict[Key, list[int]] = {}
    for job, (cfg, cache) in found.items():
        groups.setdefault(_key(cfg, cache), []).append(job)
    for key, members in groups.items():
        if len(members) == 1:
            logger.info("job %d is trained alone: no other of the sweep has its %s", members[0], _named(key))
        else:
            logger.info("jobs %s share a pass over %s", ", ".join(map(str, members)), key.cache)
        _group({job: found[job] for job in members}, attempt)


def _find(job: int, cfg: TrainConfig, found: dict[int, tuple[TrainConfig, Cache]]) -> None:
    check_resume(cfg)
    found[job] = cfg, find_cache(cfg)


def _key(cfg: TrainConfig, cache: Cache) -> Key:
    device, options = str(resolve_device(cfg.train.device)), cfg.train
    read, ahead = cfg.cache.read, cfg.cache.shards_ahead
    return Key(str(cache.path), options.batch_tokens, options.seed, read, ahead, device, options.kernels)


def _named(key: Key) -> str:
    """A key as its settings."""
    places = {"cache": "cache", "read": "cache.read", "shards_ahead": "cache.shards_ahead"}
    return ", ".join(f"{places.get(name, f'train.{name}')}={value}" for name, value in key._asdict().items())


def _group(jobs: Found, attempt: Attempt) -> None:
    """One pass over a cache."""
    checked: dict[int, Checked] = {}
    for job, (cfg, cache) in jobs.items():
        attempt([job], partial(_check, job, cfg, cache, checked))
    prices: list[Memory] = []
    for job, one in checked.items():
        if one.cfg.dry_run:
            attempt([job], partial(_estimate, one, prices))
    if prices:
        say_together(prices)
    checked = {job: one for job, one in checked.items() if not one.cfg.dry_run}
    if checked:
        with ExitStack() as kernels:
            if attempt(list(checked), partial(_use_kernels, kernels, checked)):
                _train(checked, attempt)


def _check(job: int, cfg: TrainConfig, cache: Cache, checked: dict[int, Checked]) -> None:
    checked[job] = train.check(cfg, cache)


def _estimate(checked: Checked, prices: list[Memory]) -> None:
    prices.append(train.estimate(checked))


def _use_kernels(stack: ExitStack, checked: Mapping[int, Checked]) -> None:
    first = next(iter(checked.values()))
    stack.enter_context(products.using(first.cfg.train.kernels, first.device))


def _train(checked: Mapping[int, Checked], attempt: Attempt) -> None:
    """Begin each run, take all through the batches, conclude each."""
    first = next(iter(checked.values()))
    mlps: list[Mlps] = []
    unfinished = [one for one in checked.values() if not runs.finished(runs.RUNS / str(one.cfg.name))]
    recomputes = first.cache.targets is Targets.recompute and unfinished
    # Once for all: a base model's MLPs may be larger than the transcoders.
    if recomputes and not attempt(list(checked), partial(_load_mlps, first, mlps)):
        return
    targets = shared.Targets(mlps[0]) if mlps else None
    members: list[Member] = []
    with ExitStack() as held:
        for job, one in checked.items():
            if targets is not None:
                targets.forget()  # of the sample that the run before began from
            attempt([job], partial(_begin, job, one, mlps[0] if mlps else None, targets, members, held))
        while members:
            with train.loader(first.cfg, first.cache, shared.first_step(members)) as batches:
                shared.train(members, iter(batches), attempt, targets)


def _load_mlps(checked: Checked, mlps: list[Mlps]) -> None:
    mlps.append(mlps_of(checked.cache, checked.device))


def _begin(
    job: int,
    checked: Checked,
    mlps: Mlps | None,
    targets: shared.Targets | None,
    members: list[Member],
    held: ExitStack,
) -> None:
    """Add the run to the members, unless it is finished."""
    own, generators = ExitStack(), Generators(checked.device)
    with generators.own():
        ready = own.enter_context(train.begun(checked, mlps, targets))
    if ready is None:
        own.close()
        return
    held.callback(own.close)  # should the process be stopped before its end
    conclude: Callable[[dict[str, object]], None] = partial(train.conclude, ready)
    members.append(Member(job, ready.trainer, generators, conclude, own.close))
