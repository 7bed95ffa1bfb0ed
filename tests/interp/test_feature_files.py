"""Feature files: one a feature or packed, found by layer and number."""

import gzip
import json
import struct
import zlib
from pathlib import Path

import pytest

from pipeline.errors import UserError
from pipeline.interp.dashboards import feature_files


def some(layer: int, feature: int) -> dict[str, object]:
    return {"index": feature, "layer": layer, "examples_quantiles": [], "label": f"it {layer} {feature}"}


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    for layer, feature in ((0, 0), (0, 3), (1, 2), (2, 4)):
        (tmp_path / f"{feature_files.cantor(layer, feature)}.json").write_text(json.dumps(some(layer, feature)))
    return tmp_path


def test_a_number_stands_for_one_layer_and_feature() -> None:
    numbers = {feature_files.cantor(layer, feature) for layer in range(7) for feature in range(50)}
    assert len(numbers) == 350
    assert [feature_files.cantor(0, 0), feature_files.cantor(1, 0), feature_files.cantor(0, 1)] == [0, 1, 2]
    assert feature_files.cantor(3, 12) == 15 * 16 // 2 + 12


def test_what_there_is_is_found_and_nothing_else(directory: Path) -> None:
    assert feature_files.read(directory, 1, 2) == some(1, 2)
    assert feature_files.label(directory, 0, 3) == "it 0 3"
    assert feature_files.read(directory, 2, 1) is None
    assert feature_files.label(directory, 2, 1) == ""


def test_packed_files_give_the_same(directory: Path) -> None:
    feature_files.pack(directory, n_features=5, n_layers=3)
    assert sorted(file.name for file in directory.iterdir()) == [
        "index.json.gz", "layer_0.bin", "layer_1.bin", "layer_2.bin"
    ]  # fmt: skip
    for layer in range(4):
        for feature in range(6):
            there = (layer, feature) in {(0, 0), (0, 3), (1, 2), (2, 4)}
            assert feature_files.read(directory, layer, feature) == (some(layer, feature) if there else None)
    feature_files.pack(directory, n_features=5, n_layers=3)  # stopped as it removed the files: nothing is lost
    assert feature_files.read(directory, 2, 4) == some(2, 4)
    index = json.loads(gzip.decompress((directory / "index.json.gz").read_bytes()))
    start, stop = index[1]["offsets"][2:4]
    record = (directory / "layer_1.bin").read_bytes()[start:stop]
    assert struct.unpack("<I", record[:4])[0] == len(record) - 4
    assert json.loads(zlib.decompress(record[4:])) == some(1, 2)


def test_another_file_of_that_name_is_refused(tmp_path: Path) -> None:
    (tmp_path / "0.json").write_text("[1")
    with pytest.raises(UserError, match=r"0.json is no JSON .*; make the features again"):
        feature_files.read(tmp_path, 0, 0)
    (tmp_path / "0.json").write_text("[1]")
    with pytest.raises(UserError, match="is no feature file"):
        feature_files.read(tmp_path, 0, 0)
