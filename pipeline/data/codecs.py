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
WORST_FVU = 1e-2
"""Of a channel: above it there is a warning."""
SAMPLE_NUMBERS = 1 << 26
"""Numbers of the sample at most: 7,281 rows of GPT-2 small."""
PCODEC_LEVEL = 8
PIECE = 1 << 20
"""Numbers encoded at a time."""


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

    def again(self, rows: Tensor) -> Tensor:
        """What is read where these rows were stored: bfloat16 [n, L, D]"""
        return self.decode(self.encode(rows), torch.empty_like(rows, dtype=torch.bfloat16))

    def to(self, device: torch.device) -> "Int8":
        return Int8(self.scale.to(device), self.offset.to(device))

    def clipped(self, rows: Tensor) -> Tensor:
        """How many numbers of each channel lie outside of what can be stored: bfloat16 [n, L, D] -> int64 [L, D]"""
        return ((rows.float() - self.offset).abs() > 127.5 * self.scale).sum(dim=0)


class Loss(NamedTuple):
    """What a codec loses of one site, over all training rows and against the bits of bfloat16."""

    fvu: float
    """sum of squared errors / sum of squared deviations from the mean, over layers and dimensions together."""
    worst_fvu: float
    """The same of the worst channel among those that vary."""
    worst_channel: tuple[int, int]
    """(layer, dimension)"""
    clipped: float
    """Share of the numbers that lie outside of what can be stored."""


def loss_of(lost: NDArray[np.float64], std: NDArray[np.float64], n_rows: int) -> tuple[Loss, NDArray[np.float64]]:
    """-> the loss, and the FVU of every channel, [L, D]. lost: sums of squared errors and of clipped numbers,
    [2, L, D]; std [L, D]"""
    error, clipped = lost
    spread = std**2 * n_rows
    per_channel = np.divide(error, spread, out=np.zeros_like(error), where=spread > 0)
    layer, dim = np.unravel_index(int(per_channel.argmax()), per_channel.shape)
    loss = Loss(
        fvu=float(error.sum() / spread.sum()),
        worst_fvu=float(per_channel.max()),
        worst_channel=(int(layer), int(dim)),
        clipped=float(clipped.sum() / (n_rows * error.size)),
    )
    return loss, per_channel


def told(lost: NDArray[np.float64], std: NDArray[np.float64], n_rows: int) -> dict[str, Any]:
    """`loss_of` in plain values, as a cache's attribute `codec` has it for each stored array."""
    loss, per_channel = loss_of(lost, std, n_rows)
    return loss._asdict() | {"worst_channel": list(loss.worst_channel), "fvu_by_channel": per_channel.tolist()}


def warning_of(name: str, loss: Loss) -> str | None:
    """A line when a channel loses more than WORST_FVU."""
    if loss.worst_fvu <= WORST_FVU:
        return None
    layer, dim = loss.worst_channel
    channel = f"{name}, layer {layer}, dimension {dim}"
    why = f"int8 loses {100 * loss.worst_fvu:.2g} % of the variance of {channel}, which has a heavy tail"
    return f"{why}; cache.codec=raw or a lossless one keeps all of it"


def encoded(code: Int8, rows: Tensor) -> tuple[Tensor, Tensor]:
    """bfloat16 [n, L, D] -> int8 [n, L, D], and what that loses: float64 [2, L, D], sums of squared errors and of
    clipped numbers (on the CPU for mps, which has no float64)."""
    _, *shape = rows.shape
    q = torch.empty(rows.shape, dtype=torch.int8, device=rows.device)
    lost = torch.zeros(2, *shape, dtype=torch.float64, device=rows.device if rows.is_cuda else "cpu")
    step = max(1, PIECE // (shape[0] * shape[1]))
    for start in range(0, len(rows), step):
        x = rows[start : start + step]
        q[start : start + step] = code.encode(x)
        seen = code.decode(q[start : start + step], torch.empty_like(x))
        lost[0] += (seen.to(lost.device).double() - x.to(lost.device).double()).square().sum(dim=0)
        lost[1] += code.clipped(x).to(lost.device)
    return q, lost


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
