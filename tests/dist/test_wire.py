"""Collectives against what they mean, and their counts against the formulas."""

import pytest
import torch

from pipeline.dist import mesh
from pipeline.dist.options import DistOptions
from pipeline.dist.wire import Group, Op, Wire, sent_bytes
from pipeline.errors import UserError
from tests.dist import processes

CPU = torch.device("cpu")


def talk(options: DistOptions) -> dict[str, object]:
    with mesh.started(options, CPU) as ranks:
        rank = ranks.world.rank
        own = torch.tensor([float(rank), 1.0, -float(rank)])
        return {
            "place": (ranks.data.rank, ranks.features.rank, ranks.data.size, ranks.features.size),
            "speaks": ranks.speaks,
            "features": ranks.features.sum(own.clone(), "sums").tolist(),
            "data": ranks.data.sum(own.clone(), "sums").tolist(),
            "largest": ranks.world.largest(own.clone(), "ends").tolist(),
            "smallest": ranks.world.smallest(own.clone(), "ends").tolist(),
            "gathered": ranks.data.gather(own[:2], "gather").tolist(),
            "ragged": [part.tolist() for part in ranks.world.gather_ragged(torch.arange(rank), "ragged")],
            "said": ranks.world.share({"a": [1, "x"]} if rank == 0 else None, "said"),
            "counts": {what: (count.calls, count.sent) for what, count in ranks.wire.counts.items()},
        }


def test_ranks_of_a_grid_talk_along_its_axes() -> None:
    found = processes.run(4, talk, DistOptions("mesh", features=2, data=None))
    assert [one["place"] for one in found] == [(0, 0, 2, 2), (0, 1, 2, 2), (1, 0, 2, 2), (1, 1, 2, 2)]
    assert [one["speaks"] for one in found] == [True, False, False, False]
    assert found[2]["features"] == [5.0, 2.0, -5.0]  # ranks 2 and 3
    assert found[2]["data"] == [2.0, 2.0, -2.0]  # ranks 0 and 2
    assert found[1]["largest"] == [3.0, 1.0, 0.0]
    assert found[1]["smallest"] == [0.0, 1.0, -3.0]
    assert found[3]["gathered"] == [[1.0, 1.0], [3.0, 1.0]]
    for one in found:
        assert one["ragged"] == [[], [0], [0, 1], [0, 1, 2]]
        assert one["said"] == {"a": [1, "x"]}


def test_what_is_sent_is_counted() -> None:
    counts = processes.run(4, talk, DistOptions("mesh", features=2, data=None))[1]["counts"]
    assert counts["sums"] == (2, 2 * 12)  # 12 bytes over 2 ranks, twice
    assert counts["ends"] == (2, 2 * 18)  # 12 bytes over 4
    assert counts["gather"] == (1, 8)
    assert counts["ragged"] == (2, 3 * 8 + 3 * 3 * 8)  # sizes, then 3 numbers of 8 bytes to 3 others
    assert counts["said"] == (2, 8 * 3 // 4 + len('{"a": [1, "x"]}') * 3 // 4)


def test_counting_begins_at_nothing_and_leaves_what_was() -> None:
    wire = Wire()
    wire.note("a", Op.gather, 10, 3)
    with wire.counting() as inside:
        wire.note("b", Op.gather, 10, 3)
        assert {what: count.sent for what, count in inside.items()} == {"b": 20}
    assert {what: count.sent for what, count in wire.counts.items()} == {"a": 20}


def test_ring_formulas() -> None:
    assert sent_bytes(Op.reduce, 100, 4) == 150
    assert sent_bytes(Op.gather, 100, 4) == 300
    assert sent_bytes(Op.share, 100, 4) == 75
    assert sent_bytes(Op.reduce, 100, 1) == 0


def test_one_rank_is_the_identity_and_counts_nothing() -> None:
    group = Group(1, 0, Wire())
    own = torch.tensor([2.0, 3.0])
    assert group.sum(own, "a") is own
    assert group.gather(own, "a").tolist() == [[2.0, 3.0]]
    assert group.gather_ragged(own, "a")[0] is own
    assert group.share({"a": 1}, "a") == {"a": 1}
    assert group.wire.counts == {}


def test_one_process_needs_no_process_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with mesh.started(DistOptions("feature_shard", features=None, data=1), CPU) as ranks:
        assert (ranks.features.size, ranks.data.size, ranks.world.size, ranks.speaks) == (1, 1, 1, True)


@pytest.mark.parametrize(
    ("options", "world", "grid"),
    [
        (DistOptions(), 1, (1, 1)),
        (DistOptions("ddp", 1, None), 6, (1, 6)),
        (DistOptions("feature_shard", None, 1), 6, (6, 1)),
        (DistOptions("mesh", 2, None), 6, (2, 3)),
        (DistOptions("mesh", 3, 2), 6, (3, 2)),
    ],
)
def test_null_is_what_the_other_axis_leaves(options: DistOptions, world: int, grid: tuple[int, int]) -> None:
    assert mesh.grid(options, world) == grid


@pytest.mark.parametrize(
    ("options", "world", "line"),
    [
        (DistOptions(), 4, "4 were started; add dist=feature_shard"),
        (DistOptions("mesh", 4, None), 6, "dist.features=4 does not divide the 6 ranks"),
        (DistOptions("mesh", 2, 2), 6, "is for 4 ranks .2 x 2. and 6 were started"),
        (DistOptions("mesh", None, None), 6, "both null"),
        (DistOptions("mesh", 0, None), 6, "dist.features=0 must be at least 1"),
    ],
)
def test_grids_that_do_not_make_up_the_world_are_refused(options: DistOptions, world: int, line: str) -> None:
    with pytest.raises(UserError, match=line):
        mesh.grid(options, world)


def test_a_rank_that_fails_is_told_with_its_traceback() -> None:
    with pytest.raises(AssertionError, match=r"rank 1:\n(.|\n)*ZeroDivisionError"):
        processes.run(2, lambda: 1 / (1 - int(__import__("os").environ["RANK"])))
