"""From prepared words to the typed configuration of a command."""

from pathlib import Path

import pytest

from pipeline.config import compose
from pipeline.stages.options import EvalConfig, TrainConfig
from tests.config.starting import Stub, refusal, start, write


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


def test_evaluation_takes_another_text_or_none() -> None:
    none, text = compose("eval"), compose("eval", ["dataset=text", "dataset.path=a.txt"])
    assert isinstance(none, EvalConfig)
    assert isinstance(text, EvalConfig)
    assert none.dataset is None
    assert text.dataset is not None
    assert text.dataset.path == "a.txt"


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
