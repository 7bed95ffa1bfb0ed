"""`clt extract` on several ranks: the bytes of one process, whoever is killed and however many go on.

Ranks of an extraction share nothing but the directory and its locks: they need no process group.
"""

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pipeline.config import compose
from pipeline.data.cache import Cache
from pipeline.data.journal import Journal
from pipeline.data.options import Codec
from pipeline.errors import UserError
from pipeline.stages import extract
from pipeline.stages.options import ExtractConfig
from tests.data.fake import stored_files
from tests.dist import processes


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nine of training tokens and held-out ones."""
    monkeypatch.setattr("pipeline.data.plan.BLOCK_TOKENS", (340, 340))


@pytest.fixture
def words(tiny_gpt2: Path, english: Path) -> list[str]:
    return [
        "model=local", f"model.path={tiny_gpt2}", "model.device=cpu", "dataset=text", f"dataset.path={english}",
        "dataset.n_tokens=2000", "dataset.context=17", "dataset.held_out=5", "cache.shard_mb=0.05",
        "extract.batch_tokens=340",
    ]  # fmt: skip


def made(words: list[str], folder: Path) -> Path:
    cfg = compose("extract", [*words, f"cache.dir={folder}"])
    assert isinstance(cfg, ExtractConfig)
    return extract.run(cfg)  # type: ignore[return-value]


def ranks(n: int, words: list[str], folder: Path, arm: Callable[[], None] = lambda: None) -> list[str]:
    def work() -> str:
        arm()
        return str(made(words, folder))

    return processes.run(n, work)


@pytest.mark.parametrize("codec", [Codec.raw, pytest.param(Codec.int8, marks=pytest.mark.slow)])
@pytest.mark.parametrize("write", ["scatter", pytest.param("spill", marks=pytest.mark.slow)])
def test_ranks_fill_the_cache_of_one_process(words: list[str], tmp_path: Path, codec: Codec, write: str) -> None:
    words = [*words, f"cache.codec={codec}"]
    alone = stored_files(made(words, tmp_path / "one"))
    found = ranks(4, [*words, f"cache.write={write}"], tmp_path / "four")
    assert len(set(found)) == 1
    assert stored_files(Path(found[0])) == alone
    assert [file.name for file in (tmp_path / "four").iterdir()] == [Path(found[0]).name]


def kill_rank(number: int, after: int) -> Callable[[], None]:
    """Arms a rank to kill itself when it has noted done blocks so many times."""
    append, left = Journal.append, [after]

    def noted(journal: Journal, *args: object) -> None:
        append(journal, *args)  # type: ignore[arg-type]
        left[0] -= 1
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)

    def arm() -> None:
        if os.environ["RANK"] == str(number):
            Journal.append = noted  # type: ignore[method-assign]

    return arm


@pytest.mark.parametrize("n", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_after_a_kill_another_number_of_ranks_goes_on(words: list[str], tmp_path: Path, n: int) -> None:
    alone = stored_files(made(words, tmp_path / "one"))
    with pytest.raises(AssertionError, match="rank 1 ended without a word"):
        ranks(3, words, tmp_path / "again", kill_rank(1, after=1))
    (path,) = (path for path in (tmp_path / "again").iterdir() if not path.name.startswith("."))
    with pytest.raises(UserError, match="is not finished"):
        Cache.open(path)
    assert {Path(name) for name in ranks(n, words, tmp_path / "again")} == {path}
    assert stored_files(path) == alone


def test_every_rank_of_a_machine_has_a_device_of_its_own(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name, value in {"RANK": "7", "WORLD_SIZE": "8", "LOCAL_RANK": "3"}.items():
        monkeypatch.setenv(name, value)

    def device(*more: str) -> str:
        cfg = compose("extract", [*words[:2], *more])
        assert isinstance(cfg, ExtractConfig)
        return extract._device(cfg)

    assert device() == "cuda:1"
    assert device("model.device=cuda:0") == "cuda:0"
    assert device("model.device=cpu") == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device() == "auto"
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert device() == "auto"
