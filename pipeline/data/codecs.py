"""How stored rows become smaller, and what that costs.

    raw                    the bits of bfloat16, memory-mapped
    int8                   q = round((x - offset) / scale), clipped to [-127, 127]; x ~ offset + scale * q.    Lossy.
    blosc-lz4-bitshuffle   the bits of bfloat16, compressed chunk by chunk.                                    Lossless.
    pcodec                 the same, smaller and slower to write.                                              Lossless.

offset and scale are per layer and dimension: one scale for several channels loses the small ones next to a large one,
and one per token does the same. offset is the mean of a sample; scale is the one of CLIPS * max|x - offset| / 127 with
the least squared error on the sample, since the largest value alone can be a bad one. Four bits were tried: on the
built-in world they lost 2 % of resid_mid's variance and 4 % of mlp_out's, ten times what a transcoder loses there, so
they are not offered.

The compressed bytes are what Zarr's own codecs of these names write, through the same library (numcodecs).
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.data.options import Codec

LOSSLESS = (Codec["raw"], Codec["blosc-lz4-bitshuffle"], Codec["pcodec"])
COMPRESSED = (Codec["blosc-lz4-bitshuffle"], Codec["pcodec"])
CLIPS = np.linspace(1.0, 0.05, 39)
"""Tried clipping points, as shares of the largest deviation in the sample. Equal ones: the first, which clips less."""
SAMPLE_NUMBERS = 1 << 26
"""Numbers of the sample at most: 7,281 rows of GPT-2 small."""
PCODEC_LEVEL = 8


class Int8(NamedTuple):
    """Eight bits for each number of one site."""

    scale: Tensor
    """float32 [L, D], positive."""
    offset: Tensor
    """float32 [L, D]"""

    def encode(self, rows: Tensor) -> Tensor:
        """bfloat16 [n, L, D] -> int8 [n, L, D]"""
        return ((rows.float() - self.offset) / self.scale).round_().clamp_(-127, 127).to(torch.int8)

    def decode(self, q: Tensor, out: Tensor) -> Tensor:
        """int8 [n, L, D] -> bfloat16 [n, L, D], in `out`."""
        return out.copy_(q.float().mul_(self.scale).add_(self.offset))

    def clipped(self, rows: Tensor) -> Tensor:
        """How many numbers of each channel lie outside of what can be stored: bfloat16 [n, L, D] -> int64 [L, D]"""
        return ((rows.float() - self.offset).abs() > 127.5 * self.scale).sum(dim=0)


def fit_int8(sample: Tensor) -> Int8:
    """The code with the least squared error on a sample of rows, bfloat16 [n, L, D]."""
    _, n_layers, d_model = sample.shape
    scale, offset = torch.empty(n_layers, d_model), torch.empty(n_layers, d_model)
    for layer in range(n_layers):
        x = sample[:, layer].float()
        offset[layer] = x.mean(dim=0)
        x = x - offset[layer]
        largest = x.abs().amax(dim=0)
        least, best = torch.full((d_model,), torch.inf), torch.ones(d_model)
        for clip in CLIPS:
            tried = largest * clip / 127
            tried = torch.where(tried > 0, tried, 1.0)  # a channel that never varies
            error = (x - (x / tried).round_().clamp_(-127, 127).mul_(tried)).square_().sum(dim=0)
            better = error < least
            least, best = torch.where(better, error, least), torch.where(better, tried, best)
        scale[layer] = best
    return Int8(scale, offset)


def sample_rows(n_layers: int, d_model: int) -> int:
    """Rows of a sample."""
    return max(1, SAMPLE_NUMBERS // (n_layers * d_model))


def compress(codec: Codec, chunk: NDArray[np.uint16]) -> bytes:
    """A whole chunk as the file holds it, without its checksum."""
    encoded: bytes = bytes(_numcodec(codec).encode(np.ascontiguousarray(chunk)))
    return encoded


def decompress(codec: Codec, data: bytes, out: NDArray[np.uint16]) -> None:
    """The inverse, into `out`, which has the shape of a chunk."""
    decoded = np.asarray(_numcodec(codec).decode(data))
    out.reshape(-1)[:] = decoded.reshape(-1).view(np.uint16)


def _numcodec(codec: Codec) -> Any:
    if codec is Codec["pcodec"]:
        from numcodecs.pcodec import PCodec

        return PCodec(level=PCODEC_LEVEL)
    import numcodecs

    return numcodecs.Blosc(cname="lz4", clevel=5, shuffle=numcodecs.Blosc.BITSHUFFLE)
