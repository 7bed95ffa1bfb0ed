"""Rounding at random: right on average, noise of a weight's place alone, and never to other neighbours."""

import torch

from pipeline.train import rounding
from tests import oracle

N, D = 600, 96


def rows(*parts: range) -> torch.Tensor:
    return torch.tensor([i for part in parts for i in part], dtype=torch.int32)[:, None]


def noise(key: torch.Tensor) -> torch.Tensor:
    """16 bits for each place, found by which numbers between 1 and its neighbour are rounded up. int32 [N, D]"""
    found = torch.zeros(N, D, dtype=torch.int32)
    for bit in range(15, -1, -1):
        least = found + (1 << bit)
        x = (0x3F800000 + (1 << 16) - least).view(torch.float32)
        found = torch.where(rounding.rounded(x, rows(range(N)), key) > 1, least, found)
    return found


def test_a_number_goes_to_either_neighbour_by_its_distance_from_it() -> None:
    step = 2.0**-7  # of bfloat16 between 1 and 2
    for share in (0.0, 0.1, 0.5, 0.9):
        for sign in (1.0, -1.0):
            x = torch.full((N, D), sign * (1.25 + share * step))
            got = sign * rounding.rounded(x, rows(range(N)), rounding.key(3, "encoders.0", 7)).float()
            assert set(got.unique().tolist()) <= {1.25, 1.25 + step}
            up = (got > 1.25).float().mean()
            assert abs(float(up) - share) < 4 * (share * (1 - share) / (N * D)) ** 0.5 + 1e-3


def test_what_bfloat16_has_stays() -> None:
    x = torch.cat([oracle.normal(N - 1, D, dtype=torch.float32).bfloat16().float(), torch.zeros(1, D)])
    assert torch.equal(rounding.rounded(x, rows(range(N)), rounding.key(0, "a", 1)).float(), x)


def test_a_row_is_rounded_alike_whoever_holds_it() -> None:
    x, key = oracle.normal(N, D, dtype=torch.float32), rounding.key(1, "decoders.1.0", 2)
    whole = rounding.rounded(x, rows(range(N)), key)
    held = [range(5, 90), range(400, 600)]
    part = torch.cat([x[one.start : one.stop] for one in held])
    assert torch.equal(
        rounding.rounded(part, rows(*held), key), torch.cat([whole[one.start : one.stop] for one in held])
    )


def test_noise_is_uniform_and_other_for_each_row_column_step_table_and_run() -> None:
    first = noise(rounding.key(0, "encoders.0", 1))
    counts = torch.bincount(first.flatten() >> 11, minlength=32).float()
    chi2 = float(((counts - counts.mean()).square() / counts.mean()).sum())
    assert chi2 < 70  # 31 in the mean, standard deviation 8
    others = [("encoders.0", 2, 0), ("encoders.1", 1, 0), ("encoders.0", 1, 1)]
    near = [first.roll(1, dims=0), first.roll(1, dims=1), first.roll(7, dims=1)]
    for other in [*near, *(noise(rounding.key(seed, name, step)) for name, step, seed in others)]:
        assert (
            abs(float(torch.corrcoef(torch.stack([first.flatten(), other.flatten()]).float())[0, 1]))
            < 4 / (N * D) ** 0.5
        )
