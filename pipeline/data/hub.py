"""Data sets of the Hugging Face hub, streamed: nothing is kept on disk but the tokens.

A revision is resolved to a commit first, and that commit is what is read: a data set that changes meanwhile gives the
same documents.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.data.documents import Source
from pipeline.errors import UserError

if TYPE_CHECKING:
    from datasets import IterableDataset

_commits: dict[tuple[str, str | None], str] = {}
"""What this process has resolved: (name, revision) -> commit."""


def commit_of(source: Source, label: str) -> str:
    """The commit that a source's revision stands for: asked of the hub once, then remembered. Raises UserError when
    the hub does not say."""
    from huggingface_hub import HfApi

    assert source.path is not None  # by check
    key = (source.path, source.revision)
    if key not in _commits:
        if Path(source.path).exists():
            fix = "use dataset=parquet, jsonl or text for it, or start elsewhere"
            raise UserError(f"{label}.path={source.path} is a hub name and a local file or folder as well; {fix}")
        try:
            found = HfApi().dataset_info(source.path, revision=source.revision).sha
        except errors() as error:
            raise UserError(refusal(source, label, error)) from error
        assert found is not None, f"the hub named no commit of {source.path}"
        remember(source, found)
    return _commits[key]


def remember(source: Source, commit: str) -> None:
    """What an interrupted run resolved a revision to."""
    assert source.path is not None  # by check
    _commits[source.path, source.revision] = commit


def resolved(source: Source) -> dict[str, str]:
    """{"revision": commit}, or {} when it was not asked for in this process."""
    commit = _commits.get((source.path or "", source.revision))
    return {"revision": commit} if commit else {}


def load(source: Source, label: str, columns: list[str]) -> "IterableDataset":
    """The records of a hub data set, `columns` of them only. Raises UserError when the hub does not give it or a column
    is missing."""
    from datasets import load_dataset

    commit = commit_of(source, label)
    try:
        dataset = load_dataset(source.path, source.subset, split=source.split, revision=commit, streaming=True)
        names = dataset.column_names  # None where files have to be read to know
        if names is None:
            names = next((table.column_names for table in dataset.with_format("arrow").iter(batch_size=1)), columns)
    except errors() as error:
        raise UserError(refusal(source, label, error)) from error
    return dataset.select_columns(columns) if set(columns) <= set(names) else dataset


def errors() -> tuple[type[Exception], ...]:
    """What the hub's library raises for a name, an option or a network that is wrong."""
    from huggingface_hub import errors as of_hub

    # HTTPError is that of the HTTP library beneath, another one in each of its versions.
    return (OSError, ValueError, RuntimeError, vars(of_hub)["HTTPError"])


def refusal(source: Source, label: str, error: Exception, is_reading: bool = False) -> str:
    """One line for an error of the hub, with its fix. is_reading: it had begun to give the records."""
    from huggingface_hub.errors import GatedRepoError, OfflineModeIsEnabled

    name = source.path
    what = f"{label}.path={name}: the hub did not give it"
    folder = str(name).rpartition("/")[2]
    copy = (
        f"use a local copy: hf download --repo-type dataset {name} --local-dir {folder}, then "
        f"{label}.kind=parquet {label}.path={folder} (or a glob for one split of it)"
    )
    if label == "dataset":
        copy = copy.replace("dataset.kind=parquet", "dataset=parquet")
    if isinstance(error, GatedRepoError):
        return f"{what} (it is gated); accept its terms on its page there, then hf auth login"
    if isinstance(error, OfflineModeIsEnabled):
        return f"{what} (HF_HUB_OFFLINE is set); unset it, or {copy}"
    reason = " ".join(str(error).split())[:300]
    if isinstance(error, ValueError | RuntimeError) and not isinstance(error, OSError):
        return f"{what} ({reason}); check its path, subset, split and revision"
    fix = "run the same command again to go on" if is_reading else "check the name and the connection"
    return f"{what} ({reason}); {fix}, or {copy}"
