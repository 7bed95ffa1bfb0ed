"""The time of a step on paper."""

import pytest

from pipeline.dist import times
from pipeline.dist.plan import Axis, Grid, Talk
from pipeline.dist.times import Rates, Work
from pipeline.dist.wire import Op

RATES = Rates(gemm=1e12, gather=1e10, memory=1e11, link=1e9, net=1e8, latency=1e-3, ranks_per_machine=8)
WORK = Work(flops=2e12, gathered_bytes=3e10, parameter_bytes=5e11)


def test_the_parts_of_a_step_add_up_and_the_longest_bounds_it() -> None:
    found = times.seconds(WORK, [], Grid(4, 2), RATES)
    assert found == (2.0, 3.0, 5.0, 0.0, 0.0)
    assert found.step == 10.0
    assert found.bound == "memory"


def test_what_was_measured_above_the_floor_counts_for_the_device_and_not_for_the_links() -> None:
    said = [Talk("y", Axis.features, Op.reduce, 10**9, 1)]
    found = times.seconds(WORK, said, Grid(4, 2), RATES._replace(times_floor=2.0))
    assert found[:3] == (4.0, 6.0, 10.0)
    assert found.link == pytest.approx(1.5 + 1e-3)  # 2 n (P - 1) / P bytes, and a call


def test_neighbours_talk_within_a_machine_and_all_others_between_machines() -> None:
    said = [Talk(name, axis, Op.gather, 10**6, 2) for name, axis in (("f", Axis.features), ("d", Axis.data))]
    eight = times.seconds(WORK, said, Grid(4, 2), RATES)
    assert eight.net == 0.0
    assert eight.link == pytest.approx(2 * (3 + 1) * 1e-3 + 4e-3)
    more = times.seconds(WORK, said, Grid(4, 4), RATES)
    assert more.link == pytest.approx(2 * 3e-3 + 2e-3)
    assert more.net == pytest.approx(2 * 3e-2 + 2e-3)
    assert times.crosses(Axis.features, Grid(16, 1), 8)
    assert not times.crosses(Axis.features, Grid(8, 8), 8)


def test_an_axis_of_one_rank_says_nothing() -> None:
    said = [Talk("d", Axis.data, Op.reduce, 10**9, 3)]
    assert times.seconds(WORK, said, Grid(4, 1), RATES).link == 0.0
