"""A cache of a tiny random GPT-2, made once, to train on."""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pipeline.data.address import Remote
    from tests.data.s3 import Server


@pytest.fixture(scope="session")
def tiny_cache(tiny_gpt2: Path, english: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with `cache/`: 3 layers of width 20, 3,000 training rows, 20 contexts of 23 rows held out each."""
    from pipeline.config import compose
    from pipeline.stages import extract

    place = tmp_path_factory.mktemp("cached")
    words = ["model=local", f"model.path={tiny_gpt2}", "dataset=text", f"dataset.path={english}"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        extract.run(compose("extract", [*words, "dataset.context=24", "dataset.n_tokens=3k", "dataset.held_out=20"]))
    return place


@pytest.fixture
def cached(tiny_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory but for that cache."""
    (tmp_path / "cache").symlink_to(tiny_cache / "cache")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def trained_runs(tiny_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with finished runs `topk`, `batchtopk`, `batchtopk_across` and `relu` on the tiny cache."""
    from pipeline.config import compose
    from pipeline.stages import train

    place = tmp_path_factory.mktemp("trained")
    (place / "cache").symlink_to(tiny_cache / "cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        for rule in ("topk", "batchtopk", "batchtopk_across", "relu"):
            k = [] if rule == "relu" else ["activation.k=4"]
            train.run(compose("train", [f"+experiment={rule}", f"name={rule}", *k, *SHORT]))
    return place


SHORT = [
    "arch.d_features=33",
    "train.n_steps=20",
    "train.n_tokens=null",
    "train.batch_tokens=128",
    "train.norm=standard",
]


@pytest.fixture
def finished(cached: Path, trained_runs: Path) -> Path:
    """A working directory with the cache and copies of those runs."""
    shutil.copytree(trained_runs / "runs", cached / "runs")
    return cached


@pytest.fixture
def place(s3: "Server", tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> "Remote":
    """A cache directory in the store; files are kept where a user's are kept, in a home of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    from pipeline.data.address import Local, Remote, place_of

    found = place_of(f"s3://bucket/{tmp_path.name}")
    assert isinstance(found, Remote)
    assert found.local == Local(tmp_path / "home/clt", 50 * 10**9)
    return found


@pytest.fixture
def words(tiny_gpt2: Path, english: Path) -> list[str]:
    text = [
        "dataset=text",
        f"dataset.path={english}",
        "dataset.context=24",
        "dataset.n_tokens=1k",
        "dataset.held_out=8",
    ]
    return ["model=local", f"model.path={tiny_gpt2}", "model.device=cpu", *text]
