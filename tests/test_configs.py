"""Every YAML file composes into the dataclass of its command."""

from pathlib import Path

import pytest

from pipeline.config import compose
from pipeline.config.table import STAGES

CONF = Path(__file__).resolve().parent.parent / "conf"

NEEDS = {
    "model=local": ["model.path=models/mine"],
    "model=hub": ["model.path=a/b"],
    "dataset=text": ["dataset.path=a.txt"],
}
"""What a choice leaves for the user to say."""


def group_choices(stage: str) -> list[str]:
    """Every `group=choice` that the command understands, and `+experiment=X` for training."""
    groups = {field for field in STAGES[stage].schema.__dataclass_fields__ if (CONF / field).is_dir()}
    words = [f"{group}={path.stem}" for group in sorted(groups) for path in sorted((CONF / group).glob("*.yaml"))]
    experiments = sorted((CONF / "experiment").glob("*.yaml")) if stage == "train" else []
    return words + [f"+experiment={path.stem}" for path in experiments]


CHOICES = [(stage, word) for stage in STAGES for word in group_choices(stage)]


@pytest.mark.parametrize(("stage", "word"), CHOICES, ids=[" ".join(pair) for pair in CHOICES])
def test_every_choice_composes(stage: str, word: str) -> None:
    config = compose(stage, [word, *NEEDS.get(word, [])])
    assert type(config) is STAGES[stage].schema
    group, _, choice = word.lstrip("+").partition("=")
    if group not in {"experiment", "log"}:
        assert getattr(config, group).name == choice


@pytest.mark.parametrize("stage", STAGES)
def test_every_command_composes_without_a_word(stage: str) -> None:
    assert type(compose(stage)) is STAGES[stage].schema


def test_every_yaml_file_was_composed() -> None:
    roots = {f"{stage}.yaml" for stage in STAGES}
    chosen = {word.lstrip("+").replace("=", "/") + ".yaml" for _, word in CHOICES}
    assert {str(path.relative_to(CONF)) for path in CONF.rglob("*.yaml")} == roots | chosen


def test_an_experiment_says_only_what_differs() -> None:
    for path in (CONF / "experiment").glob("*.yaml"):
        lines = path.read_text().splitlines()
        assert lines[0] == "# @package _global_", path
        assert len(lines) <= 25, path
