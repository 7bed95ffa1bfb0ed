"""`clt extract` in several processes, on a random GPT-2 and a page of English."""

import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import compose
from pipeline.data.cache import Cache
from pipeline.data.layout import request_of
from pipeline.data.options import Write
from pipeline.errors import UserError
from pipeline.stages import extract
from pipeline.stages.options import ExtractConfig
from tests.data.fake import stored_files

ROOT = Path(__file__).parents[2]


def words(model: Path, text: Path, folder: Path) -> list[str]:
    return [
        "model=local", f"model.path={model}", "model.device=cpu", "dataset=text", f"dataset.path={text}",
        "dataset.n_tokens=2000", "dataset.context=17", "dataset.held_out=5", "cache.shard_mb=0.05",
        "extract.batch_tokens=340", f"cache.dir={folder}",
    ]  # fmt: skip


def asked(*arguments: Any) -> ExtractConfig:
    cfg = compose("extract", [str(word) for word in arguments])
    assert isinstance(cfg, ExtractConfig)
    return cfg


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.data.plan.BLOCK_TOKENS", (340, 340))


@pytest.mark.parametrize("write", [Write.scatter, Write.spill])
def test_the_part_that_ends_last_finishes_the_cache(
    tiny_gpt2: Path,
    english: Path,
    tmp_path: Path,
    small_blocks: None,
    caplog: pytest.LogCaptureFixture,
    write: Write,
) -> None:
    caplog.set_level(logging.INFO)
    whole = stored_files(extract.run(asked(*words(tiny_gpt2, english, tmp_path / "whole"))))
    base = [*words(tiny_gpt2, english, tmp_path / "parts"), f"cache.write={write}"]
    caplog.clear()
    path = extract.run(asked(*base, "extract.part=1/2"))
    assert "part 1/2 is done; 4 of 9 blocks of the cache are; the last part to end finishes it" in caplog.text
    with pytest.raises(UserError, match="not finished"):
        Cache.open(path)
    assert (path.parent / ".packing" / path.name / "tokens/state.json").exists()
    caplog.clear()
    assert extract.run(asked(*base, "extract.part=0/2")) == path
    assert "packing: already there" in caplog.text
    assert "spot check" in caplog.text
    assert "2,000 rows" in caplog.text
    assert stored_files(path) == whole
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    caplog.clear()
    extract.run(asked(*base, "extract.part=0/2"))
    assert "already there, nothing to do" in caplog.text


def test_how_it_is_made_is_no_part_of_what_is_asked_for(tiny_gpt2: Path, english: Path, tmp_path: Path) -> None:
    base = words(tiny_gpt2, english, tmp_path)
    one, other = asked(*base), asked(*base, "extract.part=3/16", "cache.write=spill")
    assert other.extract.part == "3/16"
    assert request_of(one.model, one.dataset, one.cache.codec) == request_of(
        other.model, other.dataset, other.cache.codec
    )


def test_a_wrong_part_is_one_line_and_leaves_nothing(
    tiny_gpt2: Path, english: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = words(tiny_gpt2, english, tmp_path / "cache")
    with pytest.raises(UserError, match=r"extract\.part=2/2 is no part; write I/N"):
        extract.run(asked(*base, "extract.part=2/2"))
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="torchrun made this process 0/2; leave"):
        extract.run(asked(*base, "extract.part=1/2"))
    assert not (tmp_path / "cache").exists()


def test_under_torchrun_the_first_process_speaks_and_the_one_that_finishes(
    tiny_gpt2: Path,
    english: Path,
    tmp_path: Path,
    small_blocks: None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    base = words(tiny_gpt2, english, tmp_path / "cache")
    monkeypatch.setenv("WORLD_SIZE", "3")
    said = []
    monkeypatch.setattr(logging.getLogger("pipeline"), "level", logging.INFO)
    for rank in ("1", "0", "2"):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("LOCAL_RANK", rank)
        caplog.clear()
        extract.run(asked(*base))
        said.append(caplog.text)
    assert said[0] == ""
    assert "part 0/3 is done; 6 of 9 blocks" in said[1]
    assert "path" not in said[2]
    assert "next: clt train" in said[2]
    assert logging.getLogger("pipeline").level == logging.INFO


@pytest.mark.slow
def test_torchrun_gives_the_bytes_of_one_process(tiny_gpt2: Path, english: Path, tmp_path: Path) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    more = ["dataset.n_tokens=70000", "extract.batch_tokens=4000"]  # two blocks of training tokens

    def run(prefix: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
        command = [*prefix, "-m", "pipeline", "extract", *words(tiny_gpt2, english, folder), *more]
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)

    assert run([sys.executable], tmp_path / "one").returncode == 0
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    ended = run(torchrun, tmp_path / "two")
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr.count("next: clt train") == 1
    (one,), (two,) = (list((tmp_path / name).iterdir()) for name in ("one", "two"))
    assert stored_files(one) == stored_files(two)
    failed = run(torchrun, Path("/proc/none"))
    assert failed.returncode
    assert "/proc/none" in failed.stderr
