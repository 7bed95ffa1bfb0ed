"""What the codecs lose, by their formulas; and lossless ones lose nothing."""

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.data import codecs
from pipeline.data.codecs import COMPRESSED, compress, decompress, fit_int8
from pipeline.data.options import Codec

L, D = 3, 5


def heavy(n: int, seed: int = 0) -> Tensor:
    """[n, L, D] with channels of very different size and mean, one with rare outliers, one that never varies."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, L, D, generator=generator) * torch.tensor([1.0, 100.0, 0.01, 1.0, 0.0])
    x[..., 1] += 300
    x[..., 4] = -7.5
    outliers = torch.rand(n, L, generator=generator) < 5e-4
    x[..., 3] = torch.where(outliers, 200 * x[..., 3], x[..., 3])
    return x.bfloat16()


def fvu(seen: Tensor, x: Tensor) -> Tensor:
    """[L, D]"""
    spread = (x.double() - x.double().mean(0)).square().sum(0)
    return (seen.double() - x.double()).square().sum(0) / spread


def test_each_channel_has_a_scale_of_its_own_and_a_small_one_survives_next_to_a_large_one() -> None:
    code = fit_int8(heavy(4000))
    x = heavy(3000, seed=1)
    seen = code.decode(code.encode(x), torch.empty_like(x))
    lost = fvu(seen, x)[:, :3]
    assert lost.max() < 5e-4
    assert torch.equal(seen[..., 4], x[..., 4])  # a constant is its own offset
    one_scale = x.abs().amax() / 127
    coarse = ((x / one_scale).round() * one_scale).bfloat16()
    assert fvu(coarse, x)[:, 2].min() > 0.5


def test_the_scale_is_the_best_of_those_that_are_tried() -> None:
    x = heavy(40_000)
    code = fit_int8(x)
    deviation = x.double() - x.double().mean(0)
    largest = deviation.abs().amax(0)

    def error(scale: Tensor) -> Tensor:
        return ((deviation / scale).round().clamp(-127, 127) * scale - deviation).square().sum(0)

    chosen = error(code.scale.double())
    tried = torch.stack([error((largest * clip / 127).clamp(min=1e-30)) for clip in codecs.CLIPS])
    varies = largest > 0
    torch.testing.assert_close(chosen[varies], tried.amin(0)[varies], rtol=1e-3, atol=0)
    assert (code.scale[:, 0] < 0.99 * largest[:, 0] / 127).any()  # many normal numbers: a few are better clipped


def test_what_cannot_be_stored_is_clipped_and_counted() -> None:
    code = codecs.Int8(scale=torch.full((1, 2), 0.5), offset=torch.tensor([[0.0, 10.0]]))
    x = torch.tensor([[[63.5, 10.0]], [[64.0, 80.0]], [[-1000.0, 9.75]]]).bfloat16()
    q = code.encode(x)
    assert q.dtype == torch.int8
    assert q.flatten().tolist() == [127, 0, 127, 127, -127, 0]  # 9.75 is half a step: to even
    assert code.clipped(x).tolist() == [[2, 1]]
    seen = code.decode(q, torch.empty_like(x))
    assert seen.flatten().tolist() == [63.5, 10.0, 63.5, 73.5, -63.5, 10.0]


@pytest.mark.parametrize("codec", COMPRESSED)
def test_a_compressed_chunk_comes_back_bit_by_bit(codec: Codec) -> None:
    chunk = torch.randn(2000, L, D, generator=torch.Generator().manual_seed(0)).bfloat16().view(torch.uint16).numpy()
    data = compress(codec, chunk)
    assert len(data) < chunk.nbytes
    out = np.empty_like(chunk)
    decompress(codec, data, out)
    assert (out == chunk).all()


def test_a_sample_is_bounded_by_its_numbers() -> None:
    assert codecs.sample_rows(12, 768) == 7281
    assert codecs.sample_rows(1, 1 << 40) == 1
