"""Rows reach the writer in order, beside the caller, and what goes wrong there is raised here."""

import threading
from typing import Any, cast

import numpy as np
import pytest
import torch

from pipeline.data.conveyor import DEPTH, Conveyor
from pipeline.data.harvest import Rows
from pipeline.data.layout import SITES
from pipeline.data.plan import Block
from pipeline.data.tokens import Split
from pipeline.data.writer import Writer
from pipeline.errors import UserError

BLOCKS = [Block(n, Split.train, range(n, n + 1)) for n in range(3)]


class Noting:
    """A writer that notes what it is told, and waits for a sign when it has one."""

    def __init__(self) -> None:
        self.seen: list[Any] = []
        self.sign: threading.Event | None = None
        self.thread = ""

    def write(self, split: Split, rows: Rows) -> None:
        if self.sign is not None:
            assert self.sign.wait(10)
        self.thread = threading.current_thread().name
        self.seen.append(rows.first)

    def finish_block(self, block: Block, sums: np.ndarray) -> None:
        self.seen.append((block.number, sums.copy()))


def rows(first: int) -> Rows:
    return Rows(first, torch.zeros(2, 3, 4, dtype=torch.bfloat16), torch.zeros(2, 3, 4, dtype=torch.bfloat16))


def total(value: float) -> torch.Tensor:
    return torch.full((len(SITES), 2, 3, 4), value, dtype=torch.float64)


def test_blocks_are_finished_after_their_rows_with_the_sum_of_their_sums() -> None:
    writer = Noting()
    with Conveyor(cast(Writer, writer), 0) as conveyor:
        for block in BLOCKS:
            for part in range(2):
                conveyor.put(block, rows(10 * block.number + part), total(1 + part + block.number))
            conveyor.finish(block)
    assert [seen if isinstance(seen, int) else seen[0] for seen in writer.seen] == [0, 1, 0, 10, 11, 1, 20, 21, 2]
    assert [seen[1].max() for seen in writer.seen if not isinstance(seen, int)] == [3, 5, 7]
    assert writer.thread.startswith("clt-writer")


def test_the_caller_goes_on_while_rows_are_written_but_not_far_ahead() -> None:
    writer = Noting()
    writer.sign = threading.Event()
    with Conveyor(cast(Writer, writer), 0) as conveyor:
        for n in range(DEPTH + 1):
            conveyor.put(BLOCKS[0], rows(n), total(1))
        assert writer.seen == []  # all handed over, nothing written
        ahead = threading.Thread(target=lambda: conveyor.put(BLOCKS[0], rows(99), total(1)))
        ahead.start()
        ahead.join(0.1)
        assert ahead.is_alive()
        writer.sign.set()
        ahead.join(10)
        assert not ahead.is_alive()
        conveyor.flush()
        assert writer.seen == [*range(DEPTH + 1), 99]


def hand_over(writer: Noting, n: int) -> None:
    with Conveyor(cast(Writer, writer), 8) as conveyor:
        for first in range(n):
            conveyor.put(BLOCKS[0], rows(first), total(1))


def test_an_error_of_the_writer_is_raised_by_a_later_call_and_nothing_follows_it() -> None:
    class Full(Noting):
        def write(self, split: Split, rows: Rows) -> None:
            if rows.first == 1:
                raise UserError("the disk is full")
            super().write(split, rows)

    for n in (2, 20):  # found by the last call, and by one before
        writer = Full()
        with pytest.raises(UserError, match="the disk is full"):
            hand_over(writer, n)
        assert writer.seen == [0]


def interrupted(writer: Noting) -> None:
    with Conveyor(cast(Writer, writer), 8) as conveyor:
        conveyor.put(BLOCKS[0], rows(0), total(1))
        conveyor.finish(BLOCKS[0])
        conveyor.put(BLOCKS[1], rows(10), total(1))
        raise KeyboardInterrupt


def test_what_was_handed_over_is_written_when_the_caller_is_interrupted() -> None:
    writer = Noting()
    with pytest.raises(KeyboardInterrupt):
        interrupted(writer)
    assert [seen if isinstance(seen, int) else "block" for seen in writer.seen] == [0, "block", 10]


def test_an_activation_that_is_not_finite_ends_the_block_with_its_layer_in_the_base_model() -> None:
    writer = Noting()
    bad = total(1)
    bad[2, 1, 1, 3] = float("nan")
    conveyor = Conveyor(cast(Writer, writer), 8)
    conveyor.put(BLOCKS[0], rows(0), bad)
    with pytest.raises(UserError, match="mlp_out of layer 9 is not finite"):
        conveyor.finish(BLOCKS[0])
    conveyor.__exit__(None, None, None)
    assert writer.seen == [0]  # the block is not noted as done
