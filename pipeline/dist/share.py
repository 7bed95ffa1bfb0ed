"""Which rows of a batch belong to which of the ranks that share the tokens.

A batch of B rows goes through the model in `parts` parts of S = B / parts rows, one after the other, and each part is
cut into `count` contiguous slices:

    rank d has rows [S d // count, S (d + 1) // count) of each part

so that sizes differ by one at most, and the slices of a part, one rank after the other, are the part in its order. What
a rank holds of a batch is its slice of part 0, then of part 1, ...: again `parts` parts of equal size.
"""

from dataclasses import dataclass

from pipeline.errors import UserError


@dataclass(frozen=True)
class Share:
    """The default is everything, in one part."""

    index: int = 0
    """Which of the ranks, from 0."""

    count: int = 1
    """Ranks that share the tokens."""

    parts: int = 1
    """Parts of a batch (`train.accumulate`)."""

    def part(self, n: int) -> range:
        """The rows that this rank has of a part of n: where its tokens stand among those of all ranks."""
        return self.of(self.index, n)

    def of(self, index: int, n: int) -> range:
        """The rows that rank `index` has of a part of n."""
        return range(n * index // self.count, n * (index + 1) // self.count)

    def sizes(self, n: int) -> list[int]:
        """How many rows of a part of n each rank has."""
        return [len(self.of(index, n)) for index in range(self.count)]

    def weight(self, n: int) -> float:
        """This rank's rows of a part of n, as a share of them: what its means over tokens count in those of all."""
        return len(self.part(n)) / n

    def part_rows(self, batch_rows: int) -> int:
        """S: rows of a part, those of all ranks."""
        assert batch_rows % self.parts == 0, "a batch is equal parts"
        return batch_rows // self.parts

    def rows(self, batch_rows: int) -> int:
        """How many rows this rank has of a batch."""
        return self.parts * len(self.part(self.part_rows(batch_rows)))

    def spans(self, batch_rows: int) -> list[range]:
        """The rows of a batch that this rank has: a range of each part, ascending."""
        size = self.part_rows(batch_rows)
        own = self.part(size)
        return [range(part * size + own.start, part * size + own.stop) for part in range(self.parts)]

    def check(self, batch_rows: int) -> None:
        """UserError where a rank would have nothing."""
        size = self.part_rows(batch_rows)
        if size < self.count:
            in_parts = f" in train.accumulate={self.parts} parts of {size}" if self.parts > 1 else ""
            raise UserError(
                f"train.batch_tokens={batch_rows}{in_parts} cannot be shared by {self.count} data ranks, one would "
                "have no token; raise train.batch_tokens, or start fewer ranks"
            )
