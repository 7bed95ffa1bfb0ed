"""float32 rounded up or down to bfloat16 at random, with noise that a weight's place decides.

    noise of (table, step, row, column) = 16 bits of a hash of them and of the run's seed
    a number becomes the nearest bfloat16 away from 0 where noise + its lower 16 bits reach 2^16, else the one towards 0

so that it is right on average. The row is the feature's number in the whole transcoder: ranks that hold the same row
round it alike, and a row is rounded as one process rounds it, whoever holds it and from whatever checkpoint it came.
"""

import torch
from torch import Tensor

from pipeline.data.shuffle import derive

GOLDEN = -1640531527
"""2^32 / 1.618..., as an int32: neighbouring columns are far apart."""


def key(seed: int, name: str, step: int) -> Tensor:
    """Of one step of one table. -> int32 []"""
    return torch.tensor((derive(seed, "rounding", name, step) & 0xFFFFFFFF) - (1 << 31), dtype=torch.int32)


def rounded(x: Tensor, rows: Tensor, key: Tensor) -> Tensor:
    """float32 [n, D] -> bfloat16 [n, D]. rows: int32 [n, 1], their numbers in the whole; key: int32 [], as above."""
    columns = torch.arange(x.shape[1], dtype=torch.int32, device=x.device)
    noise = _mixed(_mixed(rows ^ key) + columns * GOLDEN) & 0xFFFF
    bits = (x.view(torch.int32) + noise) & -65536
    return bits.view(torch.float32).bfloat16()


def _mixed(x: Tensor) -> Tensor:
    """MurmurHash3's last step, a bijection of int32 each of whose bits depends on every bit of x. Products wrap; shifts
    of int32 repeat the sign, which the masks take away."""
    x = (x ^ (x >> 16 & 0xFFFF)) * -2048144789
    x = (x ^ (x >> 13 & 0x7FFFF)) * -1028477387
    return x ^ (x >> 16 & 0xFFFF)
