"""What the user is told when a data set gives less than was asked for."""

from collections import Counter

from pipeline.data.documents import Split
from pipeline.data.options import Content, DatasetKind, DatasetOptions
from pipeline.data.unfinished import Unfinished


def named(options: DatasetOptions) -> str:
    """The data set as the user named it."""
    return f"dataset.path={options.path}" if options.path else f"dataset={options.name}"


def nothing(unfinished: Unfinished) -> str:
    """Why there is no document at all, or ""."""
    counts = _counts(unfinished)
    if counts["packed"]:
        return ""
    empty, filtered = counts["empty"], counts["filtered"]
    if not filtered:
        return f"{empty:,} documents, all empty; give text, or name the column that holds it"
    rest = f"{filtered:,} left out by dataset.filter, {empty:,} empty" if empty else "all left out by dataset.filter"
    return f"{empty + filtered:,} documents, {rest}; loosen dataset.filter"


def too_short(options: DatasetOptions, rows: dict[Split, int], unfinished: Unfinished) -> str:
    """What there is, what was asked for, and what to ask for instead. rows: of each split."""
    if found := nothing(unfinished):
        return f"{named(options)}: {found}"
    held_out = {split: rows[split] // (options.context - 1) for split in (Split.calibration, Split.evaluation)}
    skips = unfinished.streams[Split.train].skip > 0
    found = f"{rows[Split.train]} training rows{' behind what is skipped' * skips}, " + " and ".join(
        f"{n} {split} contexts" for split, n in held_out.items()
    )
    fixes = []
    mixture = options.kind is DatasetKind.mixture
    if rows[Split.train] and options.n_tokens != "all" and unfinished.streams[Split.train].short:
        fixes.append(f"dataset.n_tokens={rows[Split.train] if mixture else 'all'}")
    smallest = min(held_out.values())
    if options.held_out is not None and 0 < smallest < options.held_out:
        fixes.append(f"dataset.held_out={smallest}")
    fix = "use " + " ".join(fixes) if fixes and smallest else "give more text"
    if skips and not rows[Split.train]:
        fix += " or a smaller dataset.skip_tokens"
    if not smallest:
        n = _counts(unfinished)["packed"]
        fix += (
            f", a smaller dataset.context or shorter documents{_split_by(options)}: what is held out are whole "
            f"documents, a twentieth of them each, and there {'is' if n == 1 else 'are'} {n:,}"
        )
    asked = f"dataset.n_tokens={options.n_tokens} dataset.held_out={options.held_out}"
    asked += f" dataset.skip_tokens={options.skip_tokens}" if skips else ""
    end = "the text ends"
    if mixture:
        n = (unfinished.members or {})[unfinished.ended]["n_tokens"]
        end = f"its member {unfinished.ended} ends after {n} training tokens and the mixture"
    return f"{named(options)}: {end} after {found} of {options.context} tokens; asked for {asked}; {fix}"


def _split_by(options: DatasetOptions) -> str:
    if options.kind is DatasetKind.mixture or options.content is not Content.text:
        return ""
    return " (dataset.split_by=line)" if options.split_by is None else " (dataset.split_by=paragraph or line)"


def _counts(unfinished: Unfinished) -> "Counter[str]":
    total: Counter[str] = Counter()
    for state in (unfinished.members or {}).values():
        total.update(state["counts"])
    return total
