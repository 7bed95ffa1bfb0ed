"""Which features a rank holds."""

import pytest
import torch

from pipeline.arch.options import ArchOptions
from pipeline.core.options import ActivationOptions
from pipeline.dist.shard import Shard, shards, whole
from pipeline.errors import UserError

TOPK = ActivationOptions(name="topk", k=3)


def ranges(arch: ArchOptions, n: int, activation: ActivationOptions = TOPK) -> list[list[tuple[int, int]]]:
    return [[(one.start, one.stop) for one in shard.ranges] for shard in shards(arch, activation, 2, n)]


@pytest.mark.parametrize("n", [1, 2, 3, 4, 7])
@pytest.mark.parametrize(
    "arch",
    [
        ArchOptions("clt", 29),
        ArchOptions("matryoshka", 29, prefixes=[2, 9, 29]),
        ArchOptions("matryoshka", 64, random_prefixes=3),
        ArchOptions("molt", 49, ranks=[4, 2, 1]),
    ],
)
def test_every_feature_is_held_once(arch: ArchOptions, n: int) -> None:
    found = shards(arch, TOPK, 2, n)
    held = torch.cat([shard.ids() for shard in found])
    assert held.sort().values.tolist() == list(range(arch.d_features))
    for shard in found:
        assert shard.ids().tolist() == sorted(shard.ids().tolist())
        assert shard.n == shard.ids().numel()
        for m in range(arch.d_features + 1):
            assert shard.below(m) == int((shard.ids() < m).sum())


def test_blocks_differ_by_one_feature_at_most() -> None:
    assert ranges(ArchOptions("clt", 11), 3) == [[(0, 4)], [(4, 8)], [(8, 11)]]


def test_a_prefix_is_spread_over_all_ranks() -> None:
    arch = ArchOptions("matryoshka", 16, prefixes=[4, 8, 16])
    assert ranges(arch, 2) == [[(0, 2), (4, 6), (8, 12)], [(2, 4), (6, 8), (12, 16)]]


def test_a_mixture_is_shared_in_whole_mixtures() -> None:
    # One of rank 4, two of rank 2, four of rank 1: three times over.
    assert ranges(ArchOptions("molt", 21, ranks=[4, 2, 1]), 2) == [
        [(0, 2), (3, 7), (9, 17)],
        [(2, 3), (7, 9), (17, 21)],
    ]


def test_groups_stay_whole_in_every_layer() -> None:
    groupmax = ActivationOptions(name="groupmax", k_per_layer=[4, 6])
    # Groups of 6 and of 4 features: every 12 both end.
    assert ranges(ArchOptions("clt", 24), 2, groupmax) == [[(0, 12)], [(12, 24)]]
    with pytest.raises(UserError, match=r"2 groups that are whole in every layer: not enough for dist\.features=3"):
        shards(ArchOptions("clt", 24), groupmax, 2, 3)


def test_too_few_features_are_refused() -> None:
    with pytest.raises(UserError, match=r"arch.d_features=3: not enough for dist.features=4 ranks"):
        shards(ArchOptions("clt", 3), TOPK, 2, 4)
    with pytest.raises(UserError, match="are 1 mixtures of 7 transforms"):
        shards(ArchOptions("molt", 7, ranks=[4, 2, 1]), TOPK, 2, 2)


def test_one_rank_holds_the_whole() -> None:
    assert shards(ArchOptions("clt", 5), TOPK, 2, 1) == [whole(5)]
    assert whole(5).is_whole
    assert not Shard((range(2),), 5).is_whole
