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


def tails(n: int, seed: int) -> Tensor:
    """[n, L, D]: normal, Student t with 3 and with 2 degrees of freedom, one number of 1000 standard deviations in a
    thousand, and one in ten thousand of 300."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(n, L, D + 3, generator=generator)
    x = normal[..., :D].clone()
    for channel, freedom in ((1, 3), (2, 2)):
        x[..., channel] /= (normal[..., D : D + freedom].square().sum(-1) / freedom).sqrt()
    for channel, size, share in ((3, 1000, 1e-3), (4, 300, 1e-4)):
        x[..., channel] *= torch.where(torch.rand(n, L, generator=generator) < share, size, 1)
    return x.bfloat16()


@pytest.mark.parametrize("seed", range(3))
def test_the_loss_of_a_heavy_tail_is_reported_and_bounded_by_half_a_step_and_what_is_clipped(seed: int) -> None:
    x = tails(20_000, seed)
    code = fit_int8(x[:2000])
    q, lost = codecs.encoded(code, x)
    assert torch.equal(q, code.encode(x))
    std = x.double().std(0, correction=0)
    loss, per_channel = codecs.loss_of(lost.numpy(), std.numpy(), len(x))
    seen = code.decode(q, torch.empty_like(x))
    np.testing.assert_allclose(per_channel, fvu(seen, x).numpy(), rtol=1e-9)
    assert loss.worst_fvu == per_channel.max() == per_channel[loss.worst_channel]
    outside = (x.float() - code.offset).abs() > 127.5 * code.scale
    clipped = ((seen.double() - x.double()).square() * outside).sum(0) / (std**2 * len(x))
    bound = (code.scale.double() / 2 / std) ** 2 + clipped
    assert (torch.from_numpy(per_channel) <= bound).all()
    assert (per_channel[:, 0] < 2e-4).all()
    line = codecs.warning_of("mlp_out", loss)
    layer, dim = loss.worst_channel
    assert line is not None
    assert f"mlp_out, layer {layer}, dimension {dim}," in line
    assert "cache.codec=raw" in line


def test_a_mild_channel_gives_no_warning() -> None:
    x = torch.randn(5000, L, D, generator=torch.Generator().manual_seed(0)).bfloat16()
    _, lost = codecs.encoded(fit_int8(x[:500]), x)
    loss, _ = codecs.loss_of(lost.numpy(), x.double().std(0, correction=0).numpy(), len(x))
    assert codecs.warning_of("mlp_out", loss) is None
    assert loss.worst_fvu < 2e-3  # fitted to 500 numbers, measured on 5,000


def test_of_what_it_was_fitted_to_no_channel_loses_more_than_its_largest_deviation_allows() -> None:
    """(largest deviation / standard deviation / 254)^2: absmax has that, and is among what is tried."""
    x = tails(3000, 5)
    lost = fvu(fit_int8(x).again(x), x)
    deviation = x.double() - x.double().mean(0)
    assert (lost <= (deviation.abs().amax(0) / deviation.square().mean(0).sqrt() / 254) ** 2).all()
