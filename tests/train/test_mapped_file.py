"""A safetensors file as a map: its tensors, without room in memory for them."""

import json
import os
from pathlib import Path

import pytest
import torch

from pipeline.errors import UserError
from pipeline.files import save_tensors
from pipeline.train.mapped_file import DTYPES, MappedFile

FILE = "a.safetensors"


def test_tensors_of_every_type_come_back(tmp_path: Path) -> None:
    whole = {str(dtype): (10 * torch.randn(3, 5)).to(dtype) for dtype in DTYPES.values()}
    whole |= {"scalar": torch.tensor(2.5), "empty": torch.zeros(0, 4), "odd": torch.arange(7, dtype=torch.uint8)}
    save_tensors(whole, tmp_path / FILE)
    mapped = MappedFile(tmp_path / FILE)
    assert mapped.shapes() == {name: list(tensor.shape) for name, tensor in whole.items()}
    for name, tensor in whole.items():
        assert mapped.tensor(name).dtype == tensor.dtype
        assert torch.equal(mapped.tensor(name), tensor)
    with pytest.raises(KeyError):
        mapped.tensor("other")


def test_writing_to_a_tensor_leaves_the_file_as_it_is(tmp_path: Path) -> None:
    save_tensors({"a": torch.arange(4)}, tmp_path / FILE)
    (tmp_path / FILE).chmod(0o400)
    before = (tmp_path / FILE).read_bytes()
    MappedFile(tmp_path / FILE).tensor("a").zero_()
    assert (tmp_path / FILE).read_bytes() == before


def test_a_file_larger_than_memory_can_be_opened(tmp_path: Path) -> None:
    """A sparse one, of four times the machine's memory: it takes no room on the disk."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    n_bytes = 4 * memory // 4096 * 4096
    header = json.dumps(
        {"a": {"dtype": "F32", "shape": [n_bytes // 4096, 1024], "data_offsets": [0, n_bytes]}}
    ).encode()
    header += b" " * (-len(header) % 8)
    with (tmp_path / FILE).open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + n_bytes)
    rows = MappedFile(tmp_path / FILE).tensor("a")
    assert rows.shape == (n_bytes // 4096, 1024)
    assert not rows[torch.tensor([len(rows) - 1, 7])].any()


def with_header(header: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header


def test_a_file_that_is_cut_short_or_of_another_kind_is_refused_in_a_line(tmp_path: Path) -> None:
    save_tensors({"a": torch.arange(40)}, tmp_path / FILE)
    data = (tmp_path / FILE).read_bytes()
    for broken in (data[:-1], data[:20], data[:4], b"", b"{}" * 40, *map(with_header, (b"x", b"7", b'{"a": 1}'))):
        (tmp_path / FILE).write_bytes(broken)
        with pytest.raises(UserError, match=r"a.safetensors is no safetensors file, or not all of it is there; copy"):
            MappedFile(tmp_path / FILE)
    with pytest.raises(FileNotFoundError):
        MappedFile(tmp_path / "none")
