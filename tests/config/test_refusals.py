"""Refusals: one line that names the cause, the choices and the fix."""

from pathlib import Path
from typing import Any

import pytest

from tests.config.starting import Stub, refusal, write


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
