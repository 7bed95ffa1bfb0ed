"""Tensors in several files by rows: read whole or in part they are the tensors, and no other rows are touched."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from pipeline.dist.mesh import Mesh
from pipeline.dist.wire import Group, Wire
from pipeline.errors import UserError
from pipeline.train import row_files
from pipeline.train.row_files import WORLD, Held, Stored

ROWS = [(range(3), range(8, 10)), (range(3, 8), range(10, 11))]
"""What of 11 rows each of two ranks has."""

WHOLE = {
    "first": torch.arange(22.0).view(11, 2),
    "second": torch.arange(66, dtype=torch.int64).view(2, 11, 3),
    "plain": torch.tensor([1.5, 2.5]).double(),
}
AXES = {"first": 0, "second": 1, "plain": None}


def rows(tensor: Tensor, axis: int, ranges: tuple[range, ...]) -> Tensor:
    return torch.cat([tensor.narrow(axis, one.start, len(one)) for one in ranges], axis)


def held(rank: int) -> dict[str, Held]:
    found = {
        name: Held(rows(WHOLE[name], axis, ROWS[rank]), axis, ROWS[rank], 11)
        for name, axis in AXES.items()
        if axis is not None
    }
    found["own"] = Held(torch.tensor([rank]), each=WORLD, number=rank)
    return found | ({"plain": Held(WHOLE["plain"])} if rank == 0 else {})


def write(folder: Path, ranks: tuple[int, ...] = (0, 1)) -> None:
    parts = [{"t": row_files.write(folder, "t", held(rank), rank, 2)} for rank in ranks]
    (folder / "index.json").write_text(json.dumps(row_files.merged(parts, 2, 1)))


@pytest.fixture(params=["several", "one"])
def stored(request: pytest.FixtureRequest, tmp_path: Path) -> Stored:
    if request.param == "several":
        write(tmp_path)
    else:
        save_file(WHOLE, tmp_path / "t.safetensors")
    return Stored(tmp_path, "t")


def test_whole_tensors_come_back(stored: Stored) -> None:
    for name, tensor in WHOLE.items():
        assert name in stored
        assert stored.shape(name) == tensor.shape
        found = stored.read(name)
        assert torch.equal(found, tensor), name
        assert found.dtype == tensor.dtype
    assert "third" not in stored
    with pytest.raises(KeyError):
        stored.read("third")


@pytest.mark.parametrize(
    "wanted", [(range(11),), (range(2, 9),), (range(1), range(4, 5), range(7, 11)), (range(9, 11), range(2))]
)
def test_rows_come_in_the_order_in_which_they_are_asked_for(stored: Stored, wanted: tuple[range, ...]) -> None:
    for name, axis in AXES.items():
        if axis is not None:
            assert torch.equal(stored.read(name, axis, wanted), rows(WHOLE[name], axis, wanted)), name
    for layer in range(2):
        assert torch.equal(stored.read("second", layer=layer), WHOLE["second"][layer])
        assert torch.equal(stored.read("second", 1, wanted, layer), rows(WHOLE["second"][layer], 0, wanted))


PICKED = [
    torch.tensor([9, 0, 4, 4, 10, 8]),
    torch.tensor([3]),
    torch.tensor([], dtype=torch.int64),
    range(11),
    range(2, 9),
]


@pytest.mark.parametrize("wanted", PICKED, ids=str)
def test_single_rows_come_in_the_order_in_which_they_are_asked_for(stored: Stored, wanted: Tensor | range) -> None:
    ids = torch.as_tensor(wanted)
    assert torch.equal(stored.pick("first", 0, wanted), WHOLE["first"][ids])
    assert torch.equal(stored.pick("second", 1, wanted), WHOLE["second"][:, ids])
    assert sum(elements for _, _, elements in stored.slices) == len(wanted) * (2 + 2 * 3)
    stored.slices.clear()
    for at in range(2):
        assert torch.equal(stored.pick("second", 1, wanted, at), WHOLE["second"][at, ids])
        assert torch.equal(stored.pick("first", 0, wanted, at), WHOLE["first"][ids, at])
    assert sum(elements for _, _, elements in stored.slices) == 2 * len(wanted) * (1 + 3)


def test_what_was_read_outlives_the_files(tmp_path: Path) -> None:
    write(tmp_path)
    with Stored(tmp_path, "t") as stored:
        found = {name: stored.read(name) for name in WHOLE}
    for file in tmp_path.iterdir():
        file.unlink()
    assert all(torch.equal(found[name], WHOLE[name]) for name in WHOLE)


def test_no_row_is_read_that_was_not_asked_for(stored: Stored) -> None:
    stored.read("first", 0, [range(2, 4), range(9, 10)])
    assert sum(elements for _, _, elements in stored.slices) == 3 * 2
    stored.slices.clear()
    stored.read("second", 1, [range(5, 7)], layer=1)
    assert sum(elements for _, _, elements in stored.slices) == 2 * 3


def test_no_file_is_opened_that_has_none_of_the_rows(tmp_path: Path) -> None:
    write(tmp_path)
    stored = Stored(tmp_path, "t")
    stored.read("first", 0, [range(4, 8)])
    stored.read("second", 1, [range(10, 11)])
    (tmp_path / "t-00001-of-00002.safetensors").unlink()  # nobody has asked for it
    stored.read("second", 1, [range(3, 5)])
    assert {file for file, _, _ in stored.slices} == {"t-00002-of-00002.safetensors"}


def test_what_each_rank_has_of_its_own_is_asked_for_by_rank(tmp_path: Path) -> None:
    write(tmp_path)
    stored = Stored(tmp_path, "t")
    assert stored.each("own") == WORLD
    assert stored.each("first") is None
    assert [int(stored.own("own", rank)) for rank in (0, 1)] == [0, 1]  # type: ignore[arg-type]
    assert stored.own("own", 2) is None
    with pytest.raises(AssertionError, match="of each rank alone"):
        stored.read("own")


def test_a_rank_that_is_missing_or_there_twice_is_noticed(tmp_path: Path) -> None:
    parts = [{"t": row_files.write(tmp_path, "t", held(rank), rank, 2)} for rank in (0, 1)]
    with pytest.raises(AssertionError, match="first is not whole"):
        row_files.merged(parts[:1], 2, 1)
    with pytest.raises(AssertionError, match="first has rows twice"):
        row_files.merged([parts[1], *parts], 2, 1)
    plain = {"t": {"plain": parts[0]["t"]["plain"]}}
    with pytest.raises(AssertionError, match="plain was written by 2 ranks"):
        row_files.merged([plain, plain], 2, 1)


def test_ranks_that_differ_are_noticed(tmp_path: Path) -> None:
    parts = [{"t": row_files.write(tmp_path, "t", held(rank), rank, 2)} for rank in (0, 1)]
    parts[1]["t"]["first"]["dtype"] = "bfloat16"
    with pytest.raises(AssertionError, match="first differs by rank"):
        row_files.merged(parts, 2, 1)


def test_a_tensor_of_other_rows_than_it_says_is_noticed(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="rows of another number"):
        row_files.write(tmp_path, "t", {"a": Held(torch.zeros(4, 2), 0, (range(3),), 11)}, 0, 2)


def test_an_index_of_another_version_is_refused_in_a_line(tmp_path: Path) -> None:
    (tmp_path / "index.json").write_text(json.dumps({"schema": 2}))
    with pytest.raises(UserError, match=r"index.json has schema 2, this version reads 1"):
        Stored(tmp_path, "t")


def grid(features: int, data: int) -> list[Mesh]:
    def group(size: int, rank: int) -> Group:
        return Group(size, rank, Wire(), process_group=object())  # type: ignore[arg-type]

    ranks = [(d, f) for d in range(data) for f in range(features)]
    return [Mesh(group(features, f), group(data, d), group(features * data, d * features + f)) for d, f in ranks]


def test_data_ranks_share_the_bytes_and_each_tensor_is_written_once() -> None:
    sizes = {"a": 40, "b": 30, "c": 20, "d": 10, "e": 5}
    tensors = {name: Held(torch.zeros(n), 0, (range(n),), 2 * n) for name, n in sizes.items()}
    tensors |= {
        "all": Held(torch.zeros(7)),
        "own": Held(torch.zeros(1), each=WORLD),
    }
    written = [row_files.shared_out(tensors, mesh) for mesh in grid(2, 2)]
    for feature_rank in (0, 1):
        pair = [set(written[data * 2 + feature_rank]) - {"own"} for data in (0, 1)]
        assert not pair[0] & pair[1]
        assert pair[0] | pair[1] == set(sizes) | ({"all"} if feature_rank == 0 else set())
        loads = [sum(tensors[name].n_bytes for name in names) for names in pair]
        assert abs(loads[0] - loads[1]) <= 4 * 10
    assert all("own" in names for names in written)
