"""Which rank speaks, where the others write, and how a failure of one is said."""

import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline import progress, ranks
from pipeline.config import Request, launch
from pipeline.errors import LostPeers

WORDS = ("+experiment=topk", "dist=ddp", "train.n_steps=4", "train.n_tokens=null")


@pytest.fixture(autouse=True)
def as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    root = logging.getLogger()
    handlers = list(root.handlers)
    root.handlers = [handler for handler in handlers if handler.name != "clt"]  # of a command in an earlier test
    monkeypatch.setattr(progress, "bars", True)
    monkeypatch.setattr(ranks, "PATIENCE_S", 0.0)
    monkeypatch.setattr(ranks, "IN_STEP_S", 0.0)
    yield
    root.handlers = handlers


def become(patch: pytest.MonkeyPatch, rank: int, world: int = 3) -> None:
    for name, value in {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": rank}.items():
        patch.setenv(name, str(value))


def test_what_a_rank_says_before_there_is_a_directory_lies_in_its_file_later(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    log = ranks.RankLog(2)
    logging.getLogger().addHandler(log)
    ours = logging.getLogger("pipeline.test")
    ours.setLevel(logging.INFO)
    ours.info("early")
    ranks.log_into(tmp_path)
    ours.info("later")
    ours.error("torn\napart")
    lines = (tmp_path / "ranks/rank_2.log").read_text().splitlines()
    assert [line.split(" ", 2)[2] for line in lines[:3]] == ["INFO early", "INFO later", "ERROR torn"]
    assert capsys.readouterr().err == "rank 2: error: torn\nrank 2: apart\n"


def test_one_process_and_rank_0_write_no_file_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert (ranks.world(), ranks.number()) == (1, 0)
    ranks.log_into(tmp_path)
    become(monkeypatch, 0)
    assert launch("train", Request(overrides=WORDS)) == 2
    ranks.log_into(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("rank", "label"), [(0, ""), (2, "rank 2: ")])
def test_a_refusal_names_the_rank_unless_it_is_the_first_and_torchrun_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, rank: int, label: str
) -> None:
    monkeypatch.chdir(tmp_path)
    become(monkeypatch, rank)
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    assert launch("train", Request(overrides=WORDS)) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"{label}error: a run of several ranks needs a name")
    told = json.loads((tmp_path / "error.json").read_text())["message"]
    assert "add name=" in told["message"]
    assert told["extraInfo"]["py_callstack"] == told["message"]
    assert progress.bars == (rank == 0)


def test_the_first_rank_fails_at_once_and_the_others_give_it_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    waited: list[float] = []
    monkeypatch.setattr(ranks.time, "sleep", waited.append)
    monkeypatch.setattr(ranks, "PATIENCE_S", 7.0)
    become(monkeypatch, 0)
    launch("train", Request(overrides=WORDS))
    assert waited == []
    become(monkeypatch, 1)
    launch("train", Request(overrides=WORDS))
    assert waited == [7.0]


def test_a_sweep_under_torchrun_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    become(monkeypatch, 0)
    assert launch("train", Request(overrides=("name=a", "optim.lr=1,2"), multirun=True)) == 2
    assert "leave -m out, or torchrun" in capsys.readouterr().err


@pytest.mark.parametrize("rank", [0, 1])
def test_ranks_that_lost_another_say_so_once_and_tell_torchrun_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, rank: int
) -> None:
    def lose(config: object) -> None:
        raise LostPeers("scalars: Connection reset by peer")

    become(monkeypatch, rank)
    monkeypatch.setattr("pipeline.stages.train.run", lose)
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    monkeypatch.chdir(tmp_path)
    assert launch("train", Request(overrides=(*WORDS, "name=a"))) == 1
    said = "error: rank 0 lost the others: scalars: Connection reset by peer; the one that failed, or the"
    err = capsys.readouterr().err
    assert err.startswith(said) if rank == 0 else err == ""
    assert not (tmp_path / "error.json").exists()
