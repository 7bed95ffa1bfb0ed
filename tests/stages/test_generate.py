"""`clt generate` and `pipeline.replace` on small runs: what they show, where a context begins, what they refuse."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import pipeline
from pipeline.config import Request, compose, launch
from pipeline.errors import UserError
from pipeline.interp.replacement import ReplacementModel
from pipeline.stages import generate, train
from tests.stages.conftest import SHORT

PROMPT = "The, 'old' river ~f=${a} the"
REFUSED = {
    "crosscoder": (["arch=crosscoder"], r"runs/crosscoder: arch=crosscoder reads all layers at once.*; use a run of"),
    "sae": (["arch=sae"], r"runs/sae: arch=sae reconstructs mlp_in, not the MLPs' outputs.*; use a run with"),
}


@pytest.fixture(scope="module")
def others(tiny_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs that do not replace MLPs by features of the live stream alone."""
    place = tmp_path_factory.mktemp("others")
    (place / "cache").symlink_to(tiny_cache / "cache")
    more = {**{name: words for name, (words, _) in REFUSED.items()}, "of_mlp_out": ["arch=sae", "arch.site=mlp_out"]}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        for name, words in more.items():
            steps = [*SHORT, "train.n_steps=2"]
            train.run(compose("train", ["+experiment=batchtopk", "activation.k=4", *words, f"name={name}", *steps]))
    return place


def generated(*words: str) -> Any:
    """What is in the file of a command that succeeds."""
    assert launch("generate", Request(overrides=(*words, "to=out/it.json"))) == 0
    return json.loads(Path("out/it.json").read_text())


def test_both_continuations_are_shown_and_written(finished: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "pipeline"):
        found = generated("run=batchtopk", "prompt=The old", "generate.n_tokens=5")
    model = pipeline.replace("runs/batchtopk", device="cpu")
    tokens = model.tokens("The old")[0].tolist()
    assert found["prompt"] == {
        "text": "The old", "tokens": tokens, "token_texts": ["<bos>", "T", "h", "e", " ", "o", "l", "d"]
    }  # fmt: skip
    assert (found["run"], found["basis"], found["generate"]["n_tokens"]) == ("runs/batchtopk", "live", 5)
    lines = [record.getMessage() for record in caplog.records]
    rows = [line for line in lines if line.startswith(tuple(f"{i:4}" for i in range(1, 6)))]
    for name, logits in (("original", model.lm.logits), ("replacement", model.logits)):
        side, whole = found[name], list(tokens)
        for token in side["tokens"]:
            assert token == int(logits(torch.tensor([whole]))[0, -1].argmax())
            whole.append(token)
        assert len(side["tokens"]) == len(side["kl"]) == 5 or side["ended"] == "end of text"
        assert side["text"] == model.lm.tokenizer.decode(side["tokens"])
        assert f"{name:12} {side['text']}" in lines
        for row, text, kl in zip(rows, side["token_texts"], side["kl"], strict=False):
            assert repr(text)[1:-1] in row
            assert f"{kl:.4f}" in row


def test_a_prompt_reaches_the_models_as_it_was_typed(finished: Path) -> None:
    found = generated("run=relu", f"prompt={PROMPT}", "generate.n_tokens=1")
    assert found["prompt"]["text"] == PROMPT
    assert "".join(found["prompt"]["token_texts"][1:4]) == "The"


def test_without_a_name_the_newest_run_is_taken(finished: Path) -> None:
    assert generated("prompt=a", "generate.n_tokens=1")["run"] == "runs/relu"


def test_no_file_is_written_unless_asked_for(finished: Path) -> None:
    before = sorted(Path().rglob("*"))
    assert generate.run(compose("generate", ["run=relu", "prompt=a", "generate.n_tokens=2"])) is None
    assert sorted(Path().rglob("*")) == before


def test_an_sae_runs_the_mlp_and_says_so(
    others: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(others)
    generate.run(compose("generate", ["run=of_mlp_out", "prompt=a", "generate.n_tokens=2"]))
    [remark] = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert remark.startswith("replacement is runs the MLP: ")
    assert "not comparable" in remark


def test_what_a_reader_has_to_know_is_said(finished: Path, caplog: pytest.LogCaptureFixture) -> None:
    generate.run(compose("generate", ["run=relu", "prompt=" + "ab5" * 9, "generate.n_tokens=2"]))
    remarks = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert remarks == [
        "9 of the prompt's 28 tokens are unknown words to the model's tokenizer",
        "the transcoder was trained on contexts of 24 tokens, the prompt has 28",
    ]


@pytest.mark.parametrize("name", REFUSED)
def test_a_run_that_cannot_stand_in_for_mlps_is_refused_before_the_model_is_loaded(
    others: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(others)
    monkeypatch.setattr("pipeline.data.models.load", lambda options: pytest.fail("the model was loaded"))
    with pytest.raises(UserError, match=REFUSED[name][1]):
        generate.run(compose("generate", [f"run={name}", "prompt=a"]))
    with pytest.raises(UserError, match=REFUSED[name][1]):
        pipeline.replace(f"runs/{name}")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["run=relu"], r"there is no prompt; add prompt="),
        (["run=nothing", "prompt=a"], r"nothing holds no finished transcoder .*; finish it"),
        (["run=relu", "prompt=a", "generate.n_tokens=0"], r"generate.n_tokens=0: .*; give 1 or more"),
        (["run=relu", "prompt=" + "a" * 40], r"has 41 tokens, model=local 40 positions; shorten it"),
    ],
    ids=["no prompt", "no run", "no tokens", "too long"],
)
def test_what_means_nothing_is_refused(finished: Path, words: list[str], says: str) -> None:
    before = sorted(Path().rglob("*"))
    with pytest.raises(UserError, match=says):
        generate.run(compose("generate", [*words, "to=out.json"]))
    assert sorted(Path().rglob("*")) == before


@pytest.mark.parametrize(("bos", "first"), [("auto", [1]), ("eos", [2]), ("none", [])])
def test_a_text_begins_as_the_runs_contexts_did(finished: Path, bos: str, first: list[int]) -> None:
    file = Path("runs/relu/final/config.json")
    config = json.loads(file.read_text())
    config["dataset"]["bos"] = bos
    file.write_text(json.dumps(config))
    model = pipeline.replace("relu")
    assert isinstance(model, ReplacementModel)
    assert model.tokens("abc").tolist() == [[*first, 3, 4, 5]]
    if not first:
        with pytest.raises(UserError, match="the prompt has no token, and no token begins a context of this run; give"):
            model.run("")


def test_a_run_from_before_there_was_a_choice_begins_with_the_tokenizers_own_token(finished: Path) -> None:
    file = Path("runs/relu/final/config.json")
    config = json.loads(file.read_text())
    del config["dataset"]["bos"]
    file.write_text(json.dumps(config))
    assert pipeline.replace("relu").tokens("a").tolist() == [[1, 3]]


def test_other_weights_than_the_runs_are_refused(
    finished: Path, tiny_gpt2: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = Path("runs/relu/final/config.json")
    config = json.loads(file.read_text())
    copy = Path(shutil.copytree(tiny_gpt2, "model"))
    config["cache"]["request"]["model"]["path"] = str(copy)
    file.write_text(json.dumps(config))
    assert pipeline.replace("relu").lm.path == "model"
    from safetensors.torch import load_file, save_file

    weights = load_file(copy / "model.safetensors")
    weights["transformer.wte.weight"][0, 0] += 1
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"runs/relu was trained on other weights of local .*; restore those weights"):
        pipeline.replace("relu")
