"""From words to a typed configuration: what reaches the stage, what is refused and how, what is left on disk."""

import logging
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import config
from pipeline.config import Request, compose, launch, prepare
from pipeline.errors import UserError
from pipeline.stages.options import EvalConfig, TrainConfig


class Stub:
    """Stands in for a stage: keeps the configurations that reach it, and does what it is told with them."""

    def __init__(self) -> None:
        self.seen: list[Any] = []
        self.then: Callable[[Any], None] = lambda cfg: None

    def run(self, cfg: Any) -> Path:
        self.seen.append(cfg)
        self.then(cfg)
        return Path("runs/x")


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Stub:
    stub = Stub()
    for stage in config.STAGES.values():
        monkeypatch.setitem(sys.modules, stage.module, SimpleNamespace(run=stub.run))
    monkeypatch.chdir(tmp_path)
    return stub


@pytest.fixture(autouse=True)
def _logging_as_it_was() -> Iterator[None]:
    yield
    root = logging.getLogger()
    root.handlers = [handler for handler in root.handlers if handler.name != "clt"]


def start(*words: str, stage: str = "train", **flags: Any) -> int:
    return launch(stage, Request(overrides=words, **flags))


def refusal(words: list[str], capsys: pytest.CaptureFixture, stage: str = "train", **flags: Any) -> str:
    """The one line on stderr; checks the exit code, and that there is nothing else."""
    assert start(*words, stage=stage, **flags) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    return err


# What reaches the stage

VERBATIM = [
    "a,b", "it's", 'say "hi"', "a=b", "~/models/x", "two words", "déjà vu", "1e3", "007", "null", "true", "[a]",
    "{a: b}", "C:\\dir\\", "${oc.env:HOME}", "\\${x}", "a'b\"c", " padded ", "#1", "(x", "", "a\\'", "50%", "*.txt",
]  # fmt: skip


def test_text_reaches_the_stage_as_it_was_typed(stub: Stub) -> None:
    keys = ["name", "model.path", "model.revision", "dataset.path", "cache.dir"]
    for i in range(0, len(VERBATIM), 5):
        texts = [VERBATIM[(i + place) % len(VERBATIM)] for place in range(5)]
        assert start(*[f"{key}={text}" for key, text in zip(keys, texts, strict=True)]) == 0
        cfg = stub.seen[-1]
        assert [cfg.name, cfg.model.path, cfg.model.revision, cfg.dataset.path, cfg.cache.dir] == texts


def test_text_survives_a_sweep_over_something_else(stub: Stub) -> None:
    keys = ["model.path", "model.revision", "dataset.path", "cache.dir"]
    for i in range(0, len(VERBATIM), 4):
        texts = [VERBATIM[(i + place) % len(VERBATIM)] for place in range(4)]
        words = [f"{key}={text}" for key, text in zip(keys, texts, strict=True)]
        assert start(*words, "optim.lr=1,2", multirun=True) == 0
        for cfg, lr in zip(stub.seen[-2:], [1.0, 2.0], strict=True):
            assert [cfg.model.path, cfg.model.revision, cfg.dataset.path, cfg.cache.dir] == texts
            assert cfg.optim.lr == lr


@settings(max_examples=20, deadline=None)
@given(*[st.text(st.one_of(st.sampled_from("\\'\"${}=,~:()[] \t\n#?1e"), st.characters(codec="utf-8")))] * 2)
def test_any_text_survives(run: str, folder: str) -> None:
    if "???" not in (run, folder):  # OmegaConf's own sign for a missing value
        cfg = compose("eval", [f"run={run}", f"cache.dir={folder}"])
        assert isinstance(cfg, EvalConfig)
        assert (cfg.run, cfg.cache.dir) == (run, folder)


def test_the_stage_gets_its_dataclass_with_typed_values(stub: Stub) -> None:
    assert start("optim.lr=1e-2", "arch.site=resid_mid", "activation.k=3", "+experiment=batchtopk") == 0
    [cfg] = stub.seen
    assert isinstance(cfg, TrainConfig)
    assert cfg.optim.lr == 0.01
    assert cfg.arch.site is cfg.arch.site.resid_mid
    assert (cfg.activation.name, cfg.activation.k) == ("batchtopk", 3)


def test_compose_and_launch_agree(stub: Stub) -> None:
    words = ["+experiment=jumprelu", "name=x", "dataset=text", "dataset.path=a.txt"]
    assert start(*words) == 0
    assert stub.seen == [compose("train", words)]


# Names


def test_a_run_is_named_after_its_experiment_and_takes_the_first_free_number(stub: Stub) -> None:
    Path("runs/topk-0").mkdir(parents=True)
    Path("runs/topk-2").mkdir()
    start("+experiment=topk")
    start("experiment=topk")  # without the plus, the same
    start()
    assert [(cfg.name, cfg.experiment) for cfg in stub.seen] == [
        ("topk-1", "topk"), ("topk-1", "topk"), ("clt-0", None),
    ]  # fmt: skip


def test_a_given_name_is_kept(stub: Stub) -> None:
    start("name=mine", "+experiment=topk")
    assert stub.seen[0].name == "mine"


def test_jobs_of_a_sweep_are_numbered_below_its_name(stub: Stub) -> None:
    start("name=mine", "activation.k=1,2", "optim.lr=3,4", multirun=True)
    assert [(cfg.name, cfg.activation.k, cfg.optim.lr) for cfg in stub.seen] == [
        ("mine/0", 1, 3.0), ("mine/1", 1, 4.0), ("mine/2", 2, 3.0), ("mine/3", 2, 4.0),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("stage", "words", "to", "numbered"),
    [
        ("generate", ["prompt=Once", "generate.seed=1,2"], "out/a.b.json", ["out/a.b-0.json", "out/a.b-1.json"]),
        ("report", ["report.resamples=0,9"], "page.html", ["page-0.html", "page-1.html"]),
        ("convert", ["run=runs/x", "device=cpu,auto"], "new.1", ["new.1-0", "new.1-1"]),
    ],
)
def test_what_jobs_of_a_sweep_write_is_numbered(
    stub: Stub, stage: str, words: list[str], to: str, numbered: list[str]
) -> None:
    assert start(*words, f"to={to}", stage=stage, multirun=True) == 0
    assert start(words[0].partition(",")[0], f"to={to}", stage=stage) == 0
    assert start(*words, stage=stage, multirun=True) == 0
    assert [cfg.to for cfg in stub.seen] == [*numbered, to, None, None]


def test_a_sweep_without_a_name_stays_together_though_its_folder_appears_meanwhile(stub: Stub) -> None:
    stub.then = lambda cfg: Path("runs", cfg.name).mkdir(parents=True)
    start("+experiment=topk", "optim.lr=1,2", multirun=True)
    start("+experiment=topk,batchtopk", "optim.lr=1,2", multirun=True)
    assert [cfg.name for cfg in stub.seen] == [
        "topk-0/0", "topk-0/1", "sweep-0/0", "sweep-0/1", "sweep-0/2", "sweep-0/3",
    ]  # fmt: skip


# Datasets and caches


@pytest.mark.parametrize(
    ("words", "dataset"),
    [
        (["model=gpt2"], "openwebtext"),
        (["model=gpt2", "dataset.n_tokens=10k"], "openwebtext"),
        (["model=gpt2", "dataset=world"], "world"),
        (["model=world"], "world"),
        ([], "world"),
    ],
)
@pytest.mark.parametrize("stage", ["extract", "train"])
def test_a_model_brings_its_default_dataset(words: list[str], dataset: str, stage: str) -> None:
    assert compose(stage, words).dataset.name == dataset  # type: ignore[union-attr]


def test_a_sweep_over_models_asks_for_a_dataset_when_theirs_differ(stub: Stub, capsys: pytest.CaptureFixture) -> None:
    assert "gpt2: openwebtext, world: world" in refusal(["model=gpt2,world"], capsys, multirun=True)
    assert start("model=gpt2,world", "dataset=text", multirun=True) == 0
    assert [cfg.model.name for cfg in stub.seen] == ["gpt2", "world"]


@pytest.mark.parametrize(
    ("words", "newest"),
    [
        ([], True),
        (["+experiment=topk", "optim.lr=1"], True),
        (["model=world"], False),
        (["dataset.n_tokens=1M"], False),
        (["model.dtype=bfloat16"], False),
        (["newest_cache=false"], False),
    ],
)
def test_training_takes_the_newest_cache_only_when_nothing_names_one(words: list[str], newest: bool) -> None:
    cfg = compose("train", words)
    assert isinstance(cfg, TrainConfig)
    assert cfg.newest_cache is newest


def write(folder: Path, **files: str) -> Path:
    """YAML files: experiment__mine="..." is experiment/mine.yaml."""
    for name, content in files.items():
        path = folder / f"{name.replace('__', '/')}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return folder


def test_an_experiment_of_ones_own_may_name_the_model_or_the_dataset(tmp_path: Path) -> None:
    mine = write(
        tmp_path,
        experiment__a="# @package _global_\ndefaults:\n  - override /model: tiny\n",
        experiment__b="# @package _global_\ndataset:\n  n_tokens: 1M\n",
        experiment__c="# @package _global_\noptim:\n  lr: 0.5\n",
        model__tiny="name: tiny\npath: models/tiny\ndefault_dataset: text\n",
    )
    a, b, c = [compose("train", [f"+experiment={name}"], mine) for name in "abc"]
    assert isinstance(a, TrainConfig)
    assert isinstance(b, TrainConfig)
    assert isinstance(c, TrainConfig)
    assert (a.model.path, a.dataset.name, a.newest_cache) == ("models/tiny", "text", False)
    assert (b.dataset.n_tokens, b.newest_cache) == ("1M", False)
    assert (c.optim.lr, c.newest_cache) == (0.5, True)
    extract = compose("extract", ["model=tiny"], mine)
    assert extract.dataset.name == "text"  # type: ignore[union-attr]


def test_evaluation_takes_another_text_or_none() -> None:
    none, text = compose("eval"), compose("eval", ["dataset=text", "dataset.path=a.txt"])
    assert isinstance(none, EvalConfig)
    assert isinstance(text, EvalConfig)
    assert none.dataset is None
    assert text.dataset is not None
    assert text.dataset.path == "a.txt"


# Refusals: one line that names the cause, the choices and the fix


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["optim.lrr=1"], ["optim.lrr: no such key", "did you mean lr?", "beta1"]),
        (["+optim.lrr=1"], ["optim.lrr: no such key", "did you mean lr?"]),
        (["nmae=x"], ["nmae: no such key", "did you mean name?", "activation"]),
        (["modle=world"], ["did you mean model?"]),
        (["optim.lr=abc"], ["optim.lr: 'abc' is not a number"]),
        (["activation.k=2.5"], ["activation.k: '2.5' is not a whole number"]),
        (["newest_cache=maybe"], ["'maybe' is neither true nor false"]),
        (["optim.lr=null"], ["optim.lr: null"]),
        (["train=3"], ["train: '3' given for a whole section"]),
        (["arch.site=mlp_im"], ["arch.site: 'mlp_im'", "did you mean mlp_in? choices: mlp_in, mlp_out, resid_mid"]),
        (["model=wordl"], ["model=wordl: no such model", "did you mean world?", "gpt2"]),
        (["arch=null"], ["arch=null: no such arch", "clt"]),
        (["+experiment=topkk"], ["experiment=topkk: no such experiment", "did you mean topk?", "jumprelu"]),
        (["optim.lr=1,2"], ["optim.lr=1,2: several values; add -m"]),
        (["optim.lr"], ["optim.lr: not of the form key=value"]),
        (["optim.lr=[1"], ["optim.lr=[1: not of the form"]),
        (["=3"], ["=3: not of the form"]),
        (["model=local"], ["model.path has no value; add model.path=..."]),
        (["optim.lr=${no.such}"], ["optim.lr: ", "no.such"]),
        (["~nothing"], ["nothing"]),
    ],
    ids=" ".join,
)  # fmt: skip
def test_a_mistake_is_one_line(words: list[str], parts: list[str], stub: Stub, capsys: pytest.CaptureFixture) -> None:
    line = refusal(words, capsys)
    assert all(part in line for part in parts), line
    assert stub.seen == []
    assert list(Path().iterdir()) == []


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        ({"config_dir": Path("nowhere")}, "--config-dir nowhere: no such directory"),
        ({"config_name": "trian"}, "--config-name trian: no such file"),
        ({"resolve": True}, "--resolve goes with --cfg"),
        ({"multirun": True, "cfg": "job"}, "only one of"),
    ],
    ids=lambda value: "" if isinstance(value, str) else " ".join(value),
)
def test_a_wrong_flag_is_one_line(flags: dict[str, Any], part: str, stub: Stub, capsys: pytest.CaptureFixture) -> None:
    assert part in refusal([], capsys, **flags)


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ("# @package _global_\noptim:\n  lrr: 1\n", "In 'experiment/mine': optim.lrr: no such key in optim; did you"),
        ("# @package _global_\noptim:\n  lr: abc\n", "In 'experiment/mine': optim.lr: 'abc' is not a number"),
        ("# @package _global_\ndefaults:\n  - override /optim: adamm\n", "optim=adamm: no such optim; did you mean"),
        ("a: b: c", "mine.yaml"),
    ],
)  # fmt: skip
def test_a_mistake_in_ones_own_yaml_names_the_file(
    content: str, part: str, stub: Stub, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    mine = write(tmp_path / "mine", experiment__mine=content)
    assert part in refusal(["+experiment=mine"], capsys, config_dir=mine)


def test_a_file_that_hydra_would_pass_over_is_refused(
    stub: Stub, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    mine = write(tmp_path / "mine", experiment__topk="# @package _global_\n")
    assert "has a file of this name; rename yours" in refusal(["+experiment=topk"], capsys, config_dir=mine)


def test_a_root_of_ones_own_is_checked_with_and_without_the_schema(
    stub: Stub, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    mine = write(
        tmp_path / "mine",
        good="defaults: [eval_schema, _self_]\ncache: {}\neval: {}\nrun: runs/x\n",
        bare="cache: {}\neval: {}\nrun: runs/x\n",
        wrong="cache: {}\neval: {}\nrum: runs/x\n",
    )
    assert start(stage="eval", config_dir=mine, config_name="good") == 0
    assert start(stage="eval", config_dir=mine, config_name="bare") == 0
    assert [cfg.run for cfg in stub.seen] == ["runs/x", "runs/x"]
    line = refusal([], capsys, stage="eval", config_dir=mine, config_name="wrong")
    assert "rum: no such key; did you mean run?" in line


# What becomes of a stage's own errors


def fail_when(condition: Callable[[Any], bool], error: BaseException) -> Callable[[Any], None]:
    def then(cfg: Any) -> None:
        if condition(cfg):
            raise error

    return then


def test_what_the_user_can_mend_is_one_line_and_exit_code_2(stub: Stub, capsys: pytest.CaptureFixture) -> None:
    stub.then = fail_when(lambda cfg: True, UserError("no cache;\nrun clt extract"))
    assert refusal([], capsys) == "error: no cache; run clt extract\n"


def test_in_a_sweep_it_fails_its_own_job_only(stub: Stub, capsys: pytest.CaptureFixture) -> None:
    stub.then = fail_when(lambda cfg: cfg.activation.k == 2, UserError("k is odd"))
    assert start("activation.k=1,2,3", multirun=True) == 2
    assert [cfg.activation.k for cfg in stub.seen] == [1, 2, 3]
    lines = capsys.readouterr().err.splitlines()
    assert "error: job 1: k is odd" in lines
    assert lines[-1] == (
        "error: 1 of 3 jobs failed; the others are done. job 1 (activation.k=2): k is odd. That mended, go on with "
        "clt train -m activation.k=1,2,3 name=clt-0"
    )


def test_our_bug_is_raised(stub: Stub) -> None:
    stub.then = fail_when(lambda cfg: True, ZeroDivisionError("ours"))
    with pytest.raises(ZeroDivisionError, match="ours"):
        start()


def test_our_bug_in_a_sweep_shows_its_trace_and_the_other_jobs_run(stub: Stub, capsys: pytest.CaptureFixture) -> None:
    stub.then = fail_when(lambda cfg: cfg.activation.k == 1, ZeroDivisionError("ours"))
    assert start("activation.k=1,2", multirun=True) == 1
    assert len(stub.seen) == 2
    err = capsys.readouterr().err
    assert "ZeroDivisionError: ours" in err
    assert "Traceback" in err


def test_ctrl_c_is_exit_code_130_and_ends_a_sweep(stub: Stub, capsys: pytest.CaptureFixture) -> None:
    stub.then = fail_when(lambda cfg: True, KeyboardInterrupt())
    assert start() == 130
    assert start("activation.k=1,2", multirun=True) == 130
    assert len(stub.seen) == 2
    assert "Traceback" not in capsys.readouterr().err


# What is left behind


def test_hydra_creates_no_file_and_no_directory(stub: Stub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    monkeypatch.chdir(scratch)
    start()
    start("optim.lr=1,2", multirun=True)
    start("+experiment=nope")
    assert list(scratch.iterdir()) == []
    assert [cfg.optim.lr for cfg in stub.seen][1:] == [1.0, 2.0]


def test_argv_and_environment_are_put_back(stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    argv = list(sys.argv)
    start()
    assert "HYDRA_FULL_ERROR" not in os.environ
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    start("optim.lrr=1")
    assert os.environ["HYDRA_FULL_ERROR"] == "0"
    assert sys.argv == argv


def test_our_messages_are_plain_and_other_packages_are_quiet(stub: Stub, capsys: pytest.CaptureFixture) -> None:
    def speak(cfg: Any) -> None:
        logging.getLogger("pipeline.stages.train").info("done: runs/x")
        logging.getLogger("elsewhere").info("chatter")
        logging.getLogger("elsewhere").warning("trouble")

    stub.then = speak
    start()
    assert capsys.readouterr().err == "done: runs/x\nwarning: trouble\n"


def test_the_configuration_can_be_printed_without_running(stub: Stub, capsys: pytest.CaptureFixture) -> None:
    assert start("+experiment=topk", "optim.lr=0.25", cfg="job") == 0
    out = capsys.readouterr().out
    assert "lr: 0.25" in out
    assert "hydra" not in out
    assert stub.seen == []


# Completion


@pytest.mark.parametrize(
    ("words", "incomplete", "expected"),
    [
        ([], "model=w", {"model=world"}),
        ([], "+exp", {"+experiment="}),
        ([], "+experiment=b", {"+experiment=batchtopk"}),
        ([], "optim.l", {"optim.lr="}),
        (["model=gpt2"], "dataset=", {"dataset=text", "dataset=world"}),
        (["no such"], "model=w", set()),
    ],
)
def test_overrides_are_completed(words: list[str], incomplete: str, expected: set) -> None:
    found = set(config.complete("train", words, incomplete))
    assert expected <= found
    assert expected or not found


def test_prepare_leaves_ordinary_words_alone() -> None:
    words = ["optim.lr=1e-3", "activation.k=1,2", "~log", "+experiment=topk", "model=world", "dataset=world"]
    assert prepare("train", words) == words
