"""The names a user may choose are the names the code knows: a YAML file for each table entry, and no more."""

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from pipeline.arch.table import ARCHS
from pipeline.core.activations import ACTIVATIONS
from pipeline.train.optim import OPTIMISERS

CONF = Path(__file__).resolve().parent.parent / "conf"

TABLES = {"activation": set(ACTIVATIONS), "arch": set(ARCHS), "optim": set(OPTIMISERS)}


@pytest.mark.parametrize("group", sorted(TABLES))
def test_every_table_entry_has_a_yaml_file_and_the_other_way_round(group: str) -> None:
    assert {path.stem for path in (CONF / group).glob("*.yaml")} == TABLES[group]


@pytest.mark.parametrize("group", [*sorted(TABLES), "loss", "model", "dataset", "lm"])
def test_a_yaml_file_carries_its_own_name(group: str) -> None:
    files = sorted((CONF / group).glob("*.yaml"))
    assert files
    for path in files:
        assert OmegaConf.load(path).name == path.stem, path


def test_every_model_names_a_dataset_that_exists() -> None:
    for path in (CONF / "model").glob("*.yaml"):
        dataset = OmegaConf.load(path).get("default_dataset", "world")
        assert (CONF / "dataset" / f"{dataset}.yaml").is_file(), path
