"""Data sets of the hub: commits, columns, and what the hub does not give."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.data import hub, tokens
from tests.data.corpus import (
    FakeHub,
    options,
    packed,
    records,
    refused,
    to_jsonl,
    to_parquet,
    words,
)


@pytest.fixture(autouse=True)
def _no_commits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "_commits", {})


def test_a_revision_is_resolved_once_and_its_commit_is_read_and_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeHub(to_parquet(tmp_path / "a.parquet", records(words(600))), monkeypatch)
    asked = options("some/name", "hub", revision="v2")
    assert tokens.resolved(asked) == {}
    assert tokens.source_identity(asked) == {}
    assert fake.asked == []
    packed(asked)
    packed(asked)
    assert tokens.resolved(asked) == {"revision": "commit of v2"}
    assert fake.asked == [("some/name", "v2")]
    assert fake.loaded == [("some/name", None, "train", "commit of v2")] * 2
    refused(
        replace(asked, column="txt"), r"some/name: no column 'txt', only text, n, lang; name one by dataset\.column="
    )


def hub_errors() -> list[tuple[Callable[[], Exception], str]]:
    import httpx
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

    response = httpx.Response(404, request=httpx.Request("GET", "https://hub.invalid"))
    return [
        (
            lambda: ConnectionError("no route\nto host"),
            r"\(no route to host\); check the name and the connection, or use a",
        ),
        (
            lambda: GatedRepoError("gated", response=response),
            r"\(it is gated\); accept its terms on its page there, then hf auth login",
        ),
        (lambda: RepositoryNotFoundError("404", response=response), r"\(404\); check the name"),
        (lambda: HFValidationError("bad name"), r"\(bad name\); check its path"),
    ]


@pytest.mark.parametrize("place", range(4))
def test_what_the_hub_does_not_give_is_one_line(place: int, monkeypatch: pytest.MonkeyPatch) -> None:
    error, match = hub_errors()[place]

    class Api:
        def dataset_info(self, path: str, revision: str | None) -> Any:
            raise error()

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    refused(options("some/name", "hub"), r"^dataset\.path=some/name: the hub did not give it " + match)


def test_a_wrong_subset_names_the_choices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    FakeHub(tmp_path, monkeypatch)

    def load(*args: Any, **settings: Any) -> Any:
        raise ValueError("BuilderConfig 'x' not found.\nAvailable: ['en', 'fr']")

    monkeypatch.setattr("datasets.load_dataset", load)
    refused(options("some/name", "hub"), r"not found\. Available: \['en', 'fr'\]\); check its path, subset, split")


def test_offline_a_hub_name_says_how_to_use_a_local_copy() -> None:
    """The real library, under HF_HUB_OFFLINE=1."""
    fix = r"hf download --repo-type dataset some/name --local-dir name, then dataset=parquet dataset\.path=name \(or "
    refused(options("some/name", "hub"), rf"the hub did not give it \(HF_HUB_OFFLINE is set\); unset it, or .*{fix}")


def test_a_connection_that_breaks_says_that_the_command_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeHub(to_parquet(tmp_path / "a.parquet", records(words(600))), monkeypatch)

    def load(*args: Any, **settings: Any) -> Any:
        dataset = FakeHub.load(fake, *args, **settings)
        dataset.iter = lambda batch_size: (_ for _ in ()).throw(ConnectionError("gone"))
        dataset.with_format = dataset.select_columns = lambda _: dataset
        return dataset

    monkeypatch.setattr("datasets.load_dataset", load)
    refused(
        options("some/name", "hub"), r"did not give it \(gone\); run the same command again to go on, or use a local"
    )


def test_without_a_network_a_hub_name_says_how_to_use_a_local_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """The real library, at a port where nobody listens."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    refused(
        options("some/name", "hub"), r"did not give it \(.*refused\); check the name and the connection, or use a local"
    )


def test_a_hub_name_that_is_a_local_folder_too_is_refused(tmp_path: Path) -> None:
    refused(options(tmp_path, "hub"), "is a hub name and a local file or folder as well; use dataset=parquet")


def test_a_column_that_only_the_files_know_is_read_or_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Data sets of JSON do not say which columns they have before they are read."""
    rows = records(words(600))
    path = to_jsonl(tmp_path / "a.jsonl", rows)
    FakeHub(path, monkeypatch, "json")
    assert packed(options("some/name", "hub")) == packed(options(path))
    refused(options("some/name", "hub", column="txt"), r"some/name: no column 'txt', only text, n, lang; name one by")
