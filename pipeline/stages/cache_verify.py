"""`clt cache verify`: reads every byte of a cache, and computes some of it again.

Nothing is mended: every damaged chunk is named, with the command that makes it again.
"""

import logging
import time

from pipeline.data import inventory, merged, models, verify
from pipeline.data.address import Place, Remote, resolved
from pipeline.data.cache import Cache
from pipeline.data.inventory import Found, State
from pipeline.data.layout import gb, stored_bytes
from pipeline.data.options import ModelOptions
from pipeline.data.spot_check import check_again
from pipeline.errors import UserError
from pipeline.plain import from_plain
from pipeline.progress import Progress

logger = logging.getLogger(__name__)

N_CONTEXTS = 8
"""Training contexts that --against-model computes again."""


def run(names: list[str], cache_dir: Place, against_model: bool = False, device: str = "auto") -> str:
    """Verifies the caches that are named, or all finished ones. -> a line for each. Raises UserError when anything is
    wrong with one of them, after all have been read and everything wrong has been said."""
    chosen = _with_parts([inventory.find(cache_dir, name) for name in names] or _finished(cache_dir))
    lines, wrong = [], []
    for found in chosen:
        try:
            lines.append(_verify(found, against_model, device))
        except UserError as error:
            logger.error(error)
            wrong.append(str(found.path))
    if wrong:
        some = f"{len(wrong)} of {len(chosen)} caches" if len(chosen) > 1 else wrong[0]
        raise UserError(f"{some} did not pass; what is wrong and what to run is said above")
    return "\n".join(lines)


def _with_parts(chosen: list[Found]) -> list[Found]:
    """And the parts of merged ones, each cache once. A part that is missing is said by the merged cache."""
    places = {resolved(found.path) for found in chosen}
    for found in list(chosen):
        if isinstance(found.path, Remote):  # nothing merged is read there
            continue
        for place in merged.places_of(found.path, found.about):
            part = inventory.look(place)
            if part is not None and resolved(place) not in places:
                places.add(resolved(place))
                chosen.append(part)
    return chosen


def _finished(cache_dir: Place) -> list[Found]:
    """Whole or damaged. What is being made is passed over with a word."""
    there = inventory.caches(cache_dir)
    for found in there:
        if found.state in (State.unfinished, State.at_work):
            logger.info("passed over, since it is not finished: %s (%s)", found.path, found.detail)
    chosen = [found for found in there if found.state not in (State.unfinished, State.at_work)]
    if not chosen:
        raise UserError(f"no finished cache under {cache_dir}/; make one with clt extract model=world")
    return chosen


def _verify(found: Found, against_model: bool, device: str) -> str:
    if found.state in (State.unfinished, State.at_work):
        raise UserError(f"{found.path} is not finished ({found.detail}); clt extract goes on with it, verify it then")
    if found.request is None:
        raise UserError(found.detail if found.state is State.damaged else f"{found.path} {found.detail}; extract anew")
    start = time.monotonic()
    n_bytes = stored_bytes(found.about["manifest"]["arrays"])
    with Progress(n_bytes, unit="B", desc=f"verify {found.path.name}") as progress:
        problems = list(verify.problems(found.path, found.about, progress.update))
    n_files = verify.n_files(found.path, found.about)
    if problems:
        raise UserError(_say(found, problems, n_files))
    if places := merged.places_of(found.path, found.about):
        merged.open_parts(found.path, found.about)
        again = f"; its rows are those of {', '.join(map(str, places))}"
    else:
        again = f"; {_against_model(found, device)}" if against_model else ""
    seconds = time.monotonic() - start
    return f"{found.path}: all {n_files:,} checksums are right, {gb(n_bytes)} in {seconds:.1f} s{again}"


def _say(found: Found, problems: list[verify.Problem], n_files: int) -> str:
    """Every problem as a line of its own. -> the last line"""
    assert found.request is not None
    for problem in problems:
        fix = verify.mend([problem], found.request, found.path)
        where = problem.where if problem.array == "" else f"{found.path}: {problem.where}"
        logger.error("%s %s; make it again: %s", where, problem.what, fix)
    fix = verify.mend(problems, found.request, found.path)
    all_at_once = f"; make all of it again: {fix}" if len(problems) > 1 else ""
    return f"{found.path}: {len(problems):,} of {n_files:,} files are not what was written{all_at_once}"


def _against_model(found: Found, device: str) -> str:
    """Loads the model of the commit and the arithmetic that made the cache, and computes a sample again."""
    assert found.request is not None
    made = found.about["model"]
    asked = {**found.request["model"], "device": device, "dtype": made["dtype"]}
    asked["revision"] = made["revision"] or asked["revision"]  # the commit, where a branch was asked for
    lm = models.load(from_plain(ModelOptions, asked))
    if (now := lm.weights_hash()) != made["weights_sha256"]:
        change = f"{made['weights_sha256'][:12]}, now {now[:12]}"
        raise UserError(f"{found.path} was made with other weights of {lm.name} ({change}); restore those weights")
    return str(check_again(lm, Cache.open(found.path), N_CONTEXTS))
