"""The command line: quick to answer, with examples that work."""

import errno
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from pipeline import config
from pipeline.cli.main import app
from pipeline.config.table import STAGES
from pipeline.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = [stage.replace("_", " ") for stage in STAGES]


def clt(*words: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    """`python -m pipeline` in a process of its own, from a checkout that need not be installed."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(
        [sys.executable, "-m", "pipeline", *words], cwd=cwd, capture_output=True, text=True, env=env, check=False
    )


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, config.Request]]:
    """The requests that reach `config.launch`, which does nothing and reports exit code 7."""
    requests: list[tuple[str, config.Request]] = []

    def launch(stage: str, request: config.Request) -> int:
        requests.append((stage, request))
        return 7

    monkeypatch.setattr(config, "launch", launch)
    return requests


def help_of(*words: str) -> str:
    result = CliRunner().invoke(app, [*words, "--help"])
    assert result.exit_code == 0
    return result.output


def test_help_imports_nothing_heavy() -> None:
    heavy = {"torch", "hydra", "omegaconf", "zarr", "transformers", "transformer_lens", "datasets", "numpy", "tqdm"}
    code = f"""
import sys
import pipeline.cli.main
sys.argv = ["clt", "--help"]
try:
    pipeline.cli.main.main()
finally:
    assert not {heavy} & set(sys.modules), {heavy} & set(sys.modules)
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "extract" in result.stdout


def test_help_lists_the_commands_that_exist() -> None:
    listed = re.findall(r"^  ([a-z]+)  +\S", help_of().split("Commands:")[1], re.MULTILINE)
    assert set(listed) == {command.split()[0] for command in COMMANDS} | {"cache"}
    benches = re.findall(r"^  ([a-z]+)  +\S", help_of("bench").split("Commands:")[1], re.MULTILINE)
    assert benches == ["extract", "cache", "codec", "share", "train", "dist"]


@pytest.mark.parametrize("command", COMMANDS)
def test_the_examples_of_a_command_compose(command: str) -> None:
    examples = re.findall(rf"^  clt {command}(?: (.*?))?(?:  .*)?$", help_of(*command.split()), re.MULTILINE)
    assert len(examples) >= 2
    for example in examples:
        flags = {"-m", "--cfg", "job", "--dry-run", "--png", "--validate"}
        words = [word for word in shlex.split(example) if word not in flags]
        sweep = "-m" in shlex.split(example)
        config.compose(command.replace(" ", "_"), [word.split(",")[0] for word in words] if sweep else words)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_hands_over_its_words_and_leaves_with_the_exit_code(command: str, asked: list[Any]) -> None:
    result = CliRunner().invoke(app, [*command.split(), "a=1,2", "+b=x", "~c", "d.e=-1"])
    assert result.exit_code == 7
    assert asked == [(command.replace(" ", "_"), config.Request(overrides=("a=1,2", "+b=x", "~c", "d.e=-1")))]


@pytest.mark.parametrize(
    "words",
    [
        ["-m", "-cd", "mine", "-cn", "root", "a=1", "b=2"],
        ["a=1", "--multirun", "b=2", "--config-dir", "mine", "--config-name", "root"],
    ],
)
def test_options_and_overrides_mix_in_any_order(words: list[str], asked: list[Any]) -> None:
    CliRunner().invoke(app, ["train", *words])
    [(_, request)] = asked
    assert request == config.Request(("a=1", "b=2"), multirun=True, config_dir=Path("mine"), config_name="root")


def test_the_printing_options_are_handed_over(asked: list[Any]) -> None:
    CliRunner().invoke(app, ["train", "--cfg", "job", "--resolve"])
    CliRunner().invoke(app, ["train", "--info", "defaults-tree"])
    assert [request for _, request in asked] == [
        config.Request(cfg="job", resolve=True),
        config.Request(info="defaults-tree"),
    ]


@pytest.mark.parametrize("words", [["train", "--bogus"], ["train", "--cfg", "jobb"], ["tarin"]])
def test_a_wrong_word_is_exit_code_2(words: list[str]) -> None:
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 2
    assert "Error" in result.output


def test_a_dry_run_is_a_setting(asked: list[Any]) -> None:
    CliRunner().invoke(app, ["extract", "model=gpt2", "--dry-run"])
    assert asked == [("extract", config.Request(overrides=("model=gpt2", "dry_run=true")))]


def test_the_file_of_a_bench_is_a_setting(asked: list[Any]) -> None:
    CliRunner().invoke(app, ["bench", "train", "bench.shapes=[A]", "--json", "out/a,b.json"])
    assert asked == [("bench_train", config.Request(overrides=("bench.shapes=[A]", "to=out/a,b.json")))]


def test_the_file_of_a_continuation_is_a_setting(asked: list[Any]) -> None:
    CliRunner().invoke(app, ["generate", "prompt=a, b", "--json", "out/a,b.json"])
    assert asked == [("generate", config.Request(overrides=("prompt=a, b", "to=out/a,b.json")))]


def test_the_commands_on_caches_are_listed_each_with_examples_that_parse(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    listed = re.findall(r"^  ([a-z]+)  +\S", help_of("cache").split("Commands:")[1], re.MULTILINE)
    assert {"ls", "info", "verify", "copy", "merge", "rm", "prune"} <= set(listed)
    reached: list[Any] = []
    monkeypatch.setattr(config, "attempt", lambda work: reached.append(work) or 5)
    for command in ("ls", "info", "verify", "copy", "merge", "rm", "prune"):
        examples = re.findall(rf"^  clt (cache {command}.*)$", help_of("cache", command), re.MULTILINE)
        assert len(examples) == 2
        for example in examples:
            assert CliRunner().invoke(app, shlex.split(example)).exit_code == 5
    assert len(reached) == 14


def test_a_cache_command_prints_its_answer_and_says_what_is_wrong_in_one_line(tmp_path: Path) -> None:
    listed = clt("cache", "ls", "--json", cwd=tmp_path)
    assert (listed.returncode, listed.stderr) == (0, "")
    assert json.loads(listed.stdout) == {"cache_dir": "cache", "caches": [], "leftovers": []}
    refused = clt("cache", "rm", "nothing", cwd=tmp_path)
    assert (refused.returncode, refused.stdout, refused.stderr.count("\n")) == (2, "", 1)
    assert refused.stderr.startswith("error: no cache nothing under cache/")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("error", "code"),
    [(UserError("x; y"), 2), (PermissionError(errno.EACCES, "no", "cache"), 2), (KeyboardInterrupt(), 130)],
)
def test_work_without_a_configuration_has_the_same_exit_codes(
    error: BaseException, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    def work() -> None:
        raise error

    assert config.attempt(work) == code
    assert capsys.readouterr().err.count("\n") == 1


def test_a_bug_without_a_configuration_is_raised() -> None:
    def work() -> None:
        raise FileNotFoundError(errno.ENOENT, "ours")

    with pytest.raises(FileNotFoundError):
        config.attempt(work)


def test_a_wrong_key_from_the_shell_is_one_line(tmp_path: Path) -> None:
    result = clt("train", "optim.lrr=1", cwd=tmp_path)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("error: optim.lrr: no such key in optim; did you mean lr?")
    assert result.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_the_configuration_is_printed_from_the_shell(tmp_path: Path) -> None:
    result = clt("extract", "model=world", "dataset.n_tokens=1M", "--cfg", "job", cwd=tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    assert "n_tokens: 1M" in result.stdout
    assert list(tmp_path.iterdir()) == []


def bash(line: str) -> set[str]:
    """What bash would offer after `line`; it cuts words at `=` and hands over the pieces."""
    pieces = [piece for piece in re.split(r"(=)|\s+", line) if piece] + ([""] if line.endswith((" ", "=")) else [])
    if line.endswith("="):
        pieces.pop()  # bash sees the lone `=` as the word in progress
    words = {"COMP_WORDS": "\n".join(pieces), "COMP_CWORD": str(len(pieces) - 1), "_CLT_COMPLETE": "complete_bash"}
    return set(clt(**words).stdout.split())


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("clt tr", {"train"}),
        ("clt train model=w", {"world"}),
        ("clt train model=gpt2 optim.l", {"optim.lr="}),
        ("clt train +experiment=b", {"batchtopk", "batchtopk_across"}),
        ("clt bench extract bench.r", {"bench.rounds="}),
        ("clt cache ver", {"verify"}),
    ],
)
def test_bash_completes_commands_and_overrides(line: str, expected: set[str]) -> None:
    assert bash(line) == expected


def test_zsh_gets_whole_words() -> None:
    environment = {"_TYPER_COMPLETE_ARGS": "clt train model=w", "_CLT_COMPLETE": "complete_zsh"}
    assert "model=world" in clt(**environment).stdout


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's")
def test_freed_tensors_are_used_again_unless_the_user_says_how_memory_is_had() -> None:
    """Page faults of 30 tensors of 8 MB, one after the other."""
    code = (
        "import resource; from pipeline.cli.common import _set_environment; _set_environment(); import torch\n"
        "before = [torch.ones(2 << 20) * 2 + 1 for _ in range(3)]; del before\n"
        "start = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "for _ in range(10): x = (torch.ones(2 << 20) * 2 + 1).sum()\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - start)"
    )
    faults = []
    for own in ({}, {"MALLOC_TRIM_THRESHOLD_": "131072", "MALLOC_MMAP_THRESHOLD_": "131072"}):
        result = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**os.environ, **own}
        )
        faults.append(int(result.stdout))
    assert faults[0] < 10_000 < 20_000 < faults[1], "8 MB are 2,000 pages"
