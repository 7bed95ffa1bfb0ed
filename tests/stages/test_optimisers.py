"""`clt train` with each optimiser: stopped and continued, and what the finished run holds."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import pipeline
from pipeline.config import compose
from pipeline.errors import UserError
from pipeline.stages import train
from pipeline.train.loop import Trainer

WORDS = ["+experiment=topk", "activation.k=4", "arch.d_features=256", "train.n_steps=6", "train.n_tokens=null"]
WORDS += ["train.batch_tokens=64", "train.checkpoint_every=192", "log.every=2"]
BFLOAT16 = ["optim=adam8bit", "train.weights=bfloat16"]


@pytest.fixture(scope="module", autouse=True)
def libraries() -> None:
    """Imported before the first test, which would seem slow."""
    import torchao.optim  # noqa: F401


def run(*words: str) -> Path:
    return train.run(compose("train", [*WORDS, *words]))


@pytest.mark.parametrize("words", [["optim=signsgd", "optim.lr=0.02"], ["optim=muon"], BFLOAT16], ids=" ".join)
def test_a_run_that_was_stopped_ends_with_the_same_bytes(
    words: list[str], cached: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight = run(*words, "name=straight")
    step = Trainer.step

    def stops(self: Trainer, *args: Any) -> Any:
        if self.state.step == 4:
            raise KeyboardInterrupt
        return step(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", stops)
        with pytest.raises(KeyboardInterrupt):
            run(*words, "name=stopped")
    assert (cached / "runs/stopped/checkpoints/step_3").is_dir()
    stopped = run(*words, "name=stopped")
    for file in ("final/transcoder.safetensors", "metrics.jsonl"):
        assert (straight / file).read_bytes() == (stopped / file).read_bytes(), file


def test_a_schedule_free_run_ends_with_the_averaged_weights(cached: Path) -> None:
    place = run("optim=signsgd", "optim.lr=0.02", "name=averaged")
    last = place / "checkpoints/step_6"
    finished = pipeline.load(place).W_enc
    for key, near in (("model", True), ("optimizer", False)):
        file = load_file(last / f"{key}.safetensors")
        weight = file["encoders.1" if key == "model" else "y/encoders.1"]
        cosine = torch.nn.functional.cosine_similarity(weight, finished[1], dim=1)  # folding scales rows
        assert bool((cosine > 1 - 1e-6).all()) == near, key


def test_weights_of_sixteen_bits_are_kept_so_and_finished_in_float32(cached: Path) -> None:
    place = run(*BFLOAT16, "name=half")
    stored = load_file(place / "checkpoints/step_6/model.safetensors")
    assert {stored[name].dtype for name in ("encoders.0", "decoders.0.1")} == {torch.bfloat16}
    assert {stored[name].dtype for name in ("b_enc", "b_dec")} == {torch.float32}
    finished = pipeline.load(place)
    assert finished.W_enc.dtype == torch.float32
    near = torch.nn.functional.cosine_similarity(stored["encoders.1"].float(), finished.W_enc[1], dim=1)
    assert (near > 1 - 1e-6).all()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train.weights=bfloat16"], "rounds at random, which optim=adam does not; use optim=adam8bit"),
        ([*BFLOAT16, "arch.d_features=33"], "tables that divide into blocks of 256 numbers"),
        (["optim=signsgd", "optim.decay=0.3"], "no meaning for optim=signsgd"),
        (["optim=adam", "optim.momentum=0.5"], "no meaning for optim=adam"),
    ],
)
def test_what_makes_no_sense_is_refused_before_anything_is_written(
    words: list[str], message: str, cached: Path
) -> None:
    with pytest.raises(UserError, match=message):
        run(*words, "name=refused")
    with pytest.raises(UserError, match=message):
        train.run(compose("train", [*WORDS, *words, "name=refused", "dry_run=true"]))
    assert not Path("runs").exists()
