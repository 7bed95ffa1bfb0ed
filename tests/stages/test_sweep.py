"""`clt train -m`: jobs that fail alone, what is noted of them, and the launchers that spread them."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.config import Request, launch
from pipeline.stages import sweep
from pipeline.train import run as runs
from tests.stages.test_resume import PowerCut, before_step, run_files

SHORT = ["+experiment=topk", "arch.d_features=33", "train.n_steps=4", "train.n_tokens=null", "train.batch_tokens=128"]
SHORT += ["log.every=2", "train.checkpoint_every=256"]
ROOT = Path(__file__).resolve().parents[2]


def start(*words: str) -> int:
    return launch("train", Request(overrides=(*SHORT, *words), multirun=True))


def noted(name: str) -> dict[int, tuple[list[str], str | None]]:
    return {number: (job.overrides, job.failed) for number, job in sweep.read(Path("runs", name)).items()}


TOO_LARGE = "activation.k=500 must lie between 1 and arch.d_features=33"


def test_a_sweep_notes_what_its_jobs_are_and_names_those_that_failed(
    cached: Path, capsys: pytest.CaptureFixture
) -> None:
    assert start("name=mine", "activation.k=4,500", "optim.lr=1e-3,2e-3") == 2
    assert noted("mine") == {
        0: (["activation.k=4", "optim.lr=0.001"], None),
        1: (["activation.k=4", "optim.lr=0.002"], None),
        2: (["activation.k=500", "optim.lr=0.001"], TOO_LARGE),
        3: (["activation.k=500", "optim.lr=0.002"], TOO_LARGE),
    }
    assert all(runs.finished(Path("runs/mine", number)) for number in "01")
    assert sorted(path.name for path in Path("runs/mine").iterdir()) == ["0", "1", "sweep.yaml"]
    again = shlex.join(["clt", "train", "-m", *SHORT, "name=mine", "activation.k=4,500", "optim.lr=1e-3,2e-3"])
    assert capsys.readouterr().err.splitlines()[-1] == (
        "error: 2 of 4 jobs failed; the others are done. job 2 (activation.k=500 optim.lr=0.001), job 3 "
        f"(activation.k=500 optim.lr=0.002): {TOO_LARGE}. That mended, go on with {again}"
    )


@pytest.mark.slow
def test_the_same_command_goes_on_with_what_is_not_finished(
    cached: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    words = ["name=mine", "activation.k=3,4,5"]
    with monkeypatch.context() as patch:
        before_step(patch, lambda trainer: cut(trainer.directory.name, trainer.state.step))
        assert start(*words) == 1
    assert [failed for _, failed in noted("mine").values()] == [None, "PowerCut: the plug was pulled", None]
    whole = run_files("mine/0")
    capsys.readouterr()
    assert start(*words) == 0
    err = capsys.readouterr().err
    assert "runs/mine/0 is finished already" in err
    assert "continuing from runs/mine/1/checkpoints/step_2" in err
    assert run_files("mine/0") == whole
    assert [failed for _, failed in noted("mine").values()] == [None] * 3
    assert start("name=straight", "activation.k=4") == 0
    assert run_files("mine/1") == run_files("straight/0")


def cut(name: str, step: int) -> None:
    if (name, step) == ("1", 3):
        raise PowerCut("the plug\nwas pulled")


@pytest.mark.slow
def test_another_sweep_of_the_same_name_is_refused_and_what_was_noted_stays(cached: Path) -> None:
    assert start("name=mine", "activation.k=3,4") == 0
    before = noted("mine")
    assert start("name=mine", "optim.lr=1,2,3") == 2
    after = noted("mine")
    assert {number: after[number] for number in before} == before
    assert after[2] == (["optim.lr=3"], None)


@pytest.mark.slow
def test_a_sweep_of_which_every_job_is_refused_leaves_nothing(cached: Path) -> None:
    assert start("name=mine", "activation.k=400,500") == 2
    assert not Path("runs").exists()
    assert start("name=../mine", "activation.k=3,4") == 2
    assert not Path("runs").exists()
    assert not (cached.parent / "mine").exists()


@pytest.mark.slow
def test_a_dry_run_of_a_sweep_writes_nothing(cached: Path) -> None:
    assert start("name=mine", "activation.k=3,4", "dry_run=true") == 0
    assert start("name=mine", "activation.k=3,400", "dry_run=true") == 2
    assert not Path("runs").exists()


def test_a_range_is_swept_and_what_all_jobs_have_is_no_override(cached: Path) -> None:
    assert start("name=mine", "activation.k=range(3,5)", "optim.lr=1e-3", "optim.clip=null") == 0
    assert noted("mine") == {0: (["activation.k=3"], None), 1: (["activation.k=4"], None)}


@pytest.mark.slow
def test_the_command_that_continues_a_sweep_names_it_and_quotes_what_the_shell_would_take(
    cached: Path, capsys: pytest.CaptureFixture
) -> None:
    mine = cached / "my files"
    (mine / "experiment").mkdir(parents=True)
    (mine / "experiment/own.yaml").write_text("# @package _global_\nactivation: {k: 500}\n")
    request = Request(overrides=("experiment=own", "arch.d_features=8,9"), multirun=True, config_dir=mine)
    assert launch("train", request) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    command = f"clt train -m --config-dir '{mine}' experiment=own arch.d_features=8,9 name=own-0"
    assert last.endswith(f"go on with {command}")


def test_an_unknown_launcher_is_one_line_with_what_to_install(cached: Path, capsys: pytest.CaptureFixture) -> None:
    assert start("hydra/launcher=slurm", "activation.k=3,4") == 2
    err = capsys.readouterr().err
    assert "hydra/launcher=slurm: no such launcher here" in err
    assert "pip install 'clt-pipeline[sweep]'" in err


@pytest.mark.slow
def test_a_shared_pass_is_not_for_launchers(cached: Path, capsys: pytest.CaptureFixture) -> None:
    pytest.importorskip("joblib")
    words = [
        "train.share_pass=true",
        "hydra/launcher=joblib",
        "hydra.launcher.prefer=threads",
        "hydra.launcher.n_jobs=1",
    ]
    assert start("name=mine", "activation.k=3,4", *words) == 2
    assert "leave hydra/launcher out" in capsys.readouterr().err
    assert not Path("runs").exists()


def command(place: Path, *words: str, threads: str | None = None) -> "subprocess.CompletedProcess[str]":
    """A command line as a user starts it, in a process of its own."""
    environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    environment |= {"PYTHONPATH": str(ROOT)} | ({"OMP_NUM_THREADS": threads} if threads else {})
    line = [sys.executable, "-m", "pipeline", "train", "-m", *SHORT, *words]
    return subprocess.run(line, cwd=place, env=environment, capture_output=True, text=True, check=False)


LAUNCHERS = {
    "joblib": ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"],
    "submitit": ["hydra/launcher=submitit_local", "hydra.launcher.timeout_min=5"],
}


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_jobs_in_processes_of_their_own_end_as_in_one(cached: Path, launcher: str) -> None:
    pytest.importorskip(launcher)
    words = ["activation.k=3,500,5", "name=away", *LAUNCHERS[launcher]]
    done = command(cached, *words)
    assert done.returncode == 2, done.stderr
    assert noted("away") == {
        0: (["activation.k=3"], None), 1: (["activation.k=500"], TOO_LARGE), 2: (["activation.k=5"], None),
    }  # fmt: skip
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"error: 1 of 3 jobs failed; the others are done. job 1 (activation.k=500): {TOO_LARGE}.")
    assert start("name=here", "activation.k=3,500,5") == 2
    for number in (0, 2):
        assert run_files(f"away/{number}") == run_files(f"here/{number}")
    again = command(cached, *words)
    assert "1 of 3 jobs failed" in again.stderr
    if launcher == "joblib":
        assert "[0] runs/away/0 is finished already" in again.stderr


@pytest.mark.slow
def test_a_sweep_without_a_name_stays_together_in_many_processes(cached: Path) -> None:
    pytest.importorskip("joblib")
    done = command(cached, "activation.k=3,4", *LAUNCHERS["joblib"])
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in Path("runs").iterdir()) == ["topk-0"]
    assert sorted(path.name for path in Path("runs/topk-0").iterdir()) == ["0", "1", "sweep.yaml"]


@pytest.mark.slow
def test_jobs_side_by_side_divide_the_cores(cached: Path) -> None:
    pytest.importorskip("joblib")
    two = command(cached, "name=a", "activation.k=3,4", *LAUNCHERS["joblib"])
    share = max(1, len(os.sched_getaffinity(0)) // 2)
    assert f"[1] job 1: activation.k=4, CPU threads: {share}" in two.stderr
    given = command(cached, "name=b", "activation.k=3,4", *LAUNCHERS["joblib"], threads="3")
    assert "[1] job 1: activation.k=4, CPU threads: 3" in given.stderr


@pytest.mark.slow
def test_a_worker_that_is_killed_is_said_in_a_line_and_the_command_goes_on(cached: Path) -> None:
    pytest.importorskip("joblib")
    (cached / "sitecustomize.py").write_text(
        "import sys\n"
        "if any('loky' in word for word in sys.orig_argv):\n"
        "    import os, threading, time, pathlib\n"
        "    def watch():\n"
        "        while not pathlib.Path('runs/mine/1/checkpoints/step_2').exists(): time.sleep(0.01)\n"
        "        os.kill(os.getpid(), 9)\n"
        "    threading.Thread(target=watch, daemon=True).start()\n"
    )
    words = ["name=mine", "activation.k=3,4", "train.n_steps=2000", *LAUNCHERS["joblib"]]
    line = [sys.executable, "-m", "pipeline", "train", "-m", *SHORT, *words]
    environment = os.environ | {"PYTHONPATH": f"{cached}:{ROOT}"}
    done = subprocess.run(line, cwd=cached, env=environment, capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr
    assert done.returncode == 2, done.stderr
    assert "a job's process is gone" in done.stderr
    assert "go on with clt train -m" in done.stderr
