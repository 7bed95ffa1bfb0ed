"""Sizes of tiles, and the type to compute in."""

import torch
import triton
import triton.language as tl
from torch import Tensor

_FLOATS = {torch.float16, torch.bfloat16, torch.float32, torch.float64}

COLUMNS = 256
"""Widest block of columns. A block of this width of a table of 24,576 rows fits a GPU's second-level cache."""


def power_of_two(n: int) -> int:
    """The smallest that is at least n, and at least 1."""
    return 1 << max(0, n - 1).bit_length()


def blocks(n: int, size: int) -> int:
    """How many blocks of `size` cover n."""
    return -(-n // size)


def columns(width: int) -> int:
    return min(COLUMNS, power_of_two(width))


def warps(elements: int) -> int:
    """For a tile of so many elements: 32 for each thread, and 1 to 16 warps."""
    return min(16, max(1, power_of_two(elements) // 1024))


def float_type(*tensors: Tensor) -> tl.dtype:
    """Sums are in float32, in float64 where an operand is."""
    return tl.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else tl.float32


def handles(*tensors: Tensor) -> bool:
    """Whether the kernels are for such tensors: floats on a CUDA device, rows of neighbours."""
    place = "cpu" if triton.knobs.runtime.interpret else "cuda"
    return all(t.device.type == place and t.dtype in _FLOATS and (t.dim() == 0 or t.stride(-1) == 1) for t in tensors)
