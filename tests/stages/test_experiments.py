"""The experiments of conf/experiment/: each of them trains, and those of other projects say what those do."""

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import compose
from pipeline.config.table import CONF
from pipeline.stages import train
from pipeline.stages.options import TrainConfig

EXPERIMENTS = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))
SMALL = ["arch.d_features=112", "train.n_tokens=null", "train.n_steps=2", "train.batch_tokens=64", "newest_cache=true"]
SMALL += ["train.dead_window=64"]
FOR_THREE_LAYERS = {"readable": ["activation.k_per_layer=[2,4,4]"]}


def test_the_debugging_experiment_runs_as_it_is(cached: Path) -> None:
    directory = train.run(compose("train", ["+experiment=tiny_debug", "name=tiny"]))
    final = json.loads((directory / "final" / "config.json").read_text())
    assert final["metrics"]["step"] == 39
    assert final["arch"]["d_features"] == 64


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_trains(cached: Path, experiment: str) -> None:
    words = [f"+experiment={experiment}", "name=short", *SMALL, *FOR_THREE_LAYERS.get(experiment, [])]
    directory = train.run(compose("train", words))
    assert (directory / "final" / "transcoder.safetensors").exists()


def composed(experiment: str, *words: str) -> TrainConfig:
    config = compose("train", [f"+experiment={experiment}", *words])
    assert isinstance(config, TrainConfig)
    return config


@pytest.mark.parametrize(
    ("experiment", "expected"),
    [
        ("openclt", ("gpt2", "openwebtext", "clt", 100, "jumprelu", 1e-4)),
        ("crosslayer_coding", ("gpt2", "pile", "clt", 12288, "relu", 1e-4)),
        ("qwen_text", ("qwen2.5-3b", "text", "clt", 1024, "jumprelu", 5e-3)),
        ("tinytranscoder_a", ("local", "tinystories", "per_layer", 8192, "topk", 1e-4)),
        ("tinytranscoder_b", ("local", "tinystories", "per_layer", 8192, "topk", 1e-4)),
        ("goreg_default", ("gpt2", "openwebtext", "clt", 6144, "jumprelu", 1e-3)),
        ("goreg_jumprelu", ("gpt2", "openwebtext", "clt", 10_000, "jumprelu", 1e-4)),
        ("goreg_topk", ("gpt2", "openwebtext", "clt", 20_000, "topk", 1e-4)),
        ("goreg_plt", ("gpt2", "openwebtext", "per_layer", 10_000, "jumprelu", 1e-4)),
        ("sparsify_skip", ("pythia-160m", "pile", "skip", 32 * 768, "topk", 1.63e-4)),
        ("crosscode", ("pythia-160m", "pile", "crosscoder", 8192, "topk", 5e-3)),
    ],
)
def test_an_experiment_of_another_project_has_its_model_text_and_sizes(experiment: str, expected: Any) -> None:
    config = composed(experiment)
    about = (config.model.name, config.dataset.name, config.arch.name, config.arch.d_features)
    assert (*about, config.activation.name, config.optim.lr) == expected
    assert not config.newest_cache


def test_the_two_transcoders_of_a_two_layer_model_are_its_two_layers() -> None:
    assert [composed(f"tinytranscoder_{x}").model.layers for x in "ab"] == [[0, 1], [1, 2]]


@pytest.mark.parametrize(
    ("experiment", "sparsity"),
    [("openclt", 0.05 * 768 / 100), ("crosslayer_coding", 30 * 768 / 12288), ("goreg_default", 0.0002 * 12 * 768)],
)
def test_coefficients_are_converted_as_the_document_says(experiment: str, sparsity: float) -> None:
    assert composed(experiment).loss.sparsity == pytest.approx(sparsity)


def test_the_command_line_still_has_the_last_word() -> None:
    config = composed("goreg_topk", "model=world", "dataset=world", "activation.k=3")
    assert (config.model.name, config.dataset.name, config.activation.k) == ("world", "world", 3)
