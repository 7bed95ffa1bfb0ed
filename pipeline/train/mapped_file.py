"""One safetensors file, mapped into memory: its tensors are views of the map, of which what is touched is read.

The library's own map counts as memory that the process may yet write to, so that Linux refuses it for a file that is
larger than memory. This one asks for none (MAP_NORESERVE); whoever does write to a tensor writes to memory of their
own, and never to the file.
"""

import json
import mmap
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.errors import UserError

NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000 if hasattr(mmap, "MAP_POPULATE") else 0)
"""Linux has it by this number, Python by its name from 3.13 on; macOS does without."""

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class MappedFile:
    """It stays mapped for as long as this or any of its tensors is there."""

    def __init__(self, file: Path) -> None:
        """UserError for what is no safetensors file, or not all of one; FileNotFoundError where there is none."""
        with file.open("rb") as opened:
            size = file.stat().st_size
            n_header = int.from_bytes(opened.read(8), "little")
            if not 0 < n_header <= size - 8:
                raise _broken(file)
            try:
                self._entries: dict[str, dict[str, Any]] = dict(json.loads(opened.read(n_header)))
                self._entries.pop("__metadata__", None)
                ends = [entry["data_offsets"][1] for entry in self._entries.values()]
            except (ValueError, KeyError, TypeError) as error:
                raise _broken(file) from error
            self._begin = 8 + n_header
            if size != self._begin + max(ends, default=0):
                raise _broken(file)
            flags = mmap.MAP_PRIVATE | NO_RESERVE
            self._map = mmap.mmap(opened.fileno(), 0, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE)

    def shapes(self) -> dict[str, list[int]]:
        return {name: entry["shape"] for name, entry in self._entries.items()}

    def tensor(self, name: str) -> Tensor:
        """KeyError where there is none of that name."""
        entry = self._entries[name]
        dtype, shape = DTYPES[entry["dtype"]], entry["shape"]
        if not prod(shape):
            return torch.empty(shape, dtype=dtype)
        at = self._begin + entry["data_offsets"][0]
        return torch.frombuffer(self._map, dtype=dtype, count=prod(shape), offset=at).view(shape)


def _broken(file: Path) -> UserError:
    return UserError(f"{file} is no safetensors file, or not all of it is there; copy or make it again")
