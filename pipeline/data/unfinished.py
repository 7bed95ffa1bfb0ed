"""Packing that goes on after an interruption: tokens so far and where each reader stands, in a directory.

    state.json          key of the request, lengths of the streams, state of each member; replaced as a whole
    train.i32, ...      tokens of each split, little-endian int32; appended to, and synced before state.json says so

What lies behind the recorded length of a file was written after the last state and is cut off. The finished streams
stay, so that the same request costs nothing a second time; the owner of the directory removes it.
"""

import json
import logging
import sys
import time
from array import array
from pathlib import Path
from typing import Any

from pipeline.data.documents import Split
from pipeline.data.packing import Stream
from pipeline.files import sync, write_aside

logger = logging.getLogger(__name__)

SAVE_SECONDS = 10.0
"""Between two saves. No effect on the result."""

Json = dict[str, Any]


class Unfinished:
    """`members` is what the last save said, None when there was none. Without a directory nothing is kept."""

    def __init__(self, directory: Path | None, key: str, streams: dict[Split, Stream]) -> None:
        self.directory, self.key, self.streams = directory, key, streams
        self.members: dict[str, Json] | None = None
        self.complete, self.ended = False, ""
        self._saved = dict.fromkeys(streams, 0)
        self._last = time.monotonic()
        if directory is not None:
            directory.mkdir(parents=True, exist_ok=True)
            self._load(directory)

    @property
    def is_due(self) -> bool:
        """Whether it is time to save."""
        return self.directory is not None and time.monotonic() - self._last >= SAVE_SECONDS

    def save(self, members: dict[str, Json], complete: bool = False, ended: str = "") -> None:
        """`ended`: the member that gave no more, for a message."""
        self.complete, self.ended = complete, ended
        if self.directory is None:
            return
        for split, stream in self.streams.items():
            with self._file(split).open("ab") as file:
                file.write(_little(stream.tokens[self._saved[split] :]).tobytes())
            self._saved[split] = len(stream.tokens)
        sync([*(self._file(split) for split in self.streams), self.directory])
        lengths = {split.value: n for split, n in self._saved.items()}
        skipped = {split.value: stream.skipped for split, stream in self.streams.items()}
        state = {"key": self.key, "complete": complete, "ended": ended, "lengths": lengths, "members": members}
        state["skipped"] = skipped
        write_aside(self.directory / "state.json", json.dumps(state).encode())
        self._last = time.monotonic()

    def _load(self, directory: Path) -> None:
        file = directory / "state.json"
        state = json.loads(file.read_bytes()) if file.exists() else None
        if state is not None and state["key"] != self.key:
            logger.info("%s: packing of another text, tokenizer or setting lies there; starting anew", directory)
            file.unlink()
            state = None
        for split, stream in self.streams.items():
            n = state["lengths"][split.value] if state else 0
            with self._file(split).open("a+b") as stored:
                stored.truncate(4 * n)
                stored.seek(0)
                stream.tokens = _little(array("i", stored.read()))
            assert len(stream.tokens) == n, f"{self._file(split)} is shorter than recorded"
            self._saved[split] = n
            stream.skipped = state["skipped"][split.value] if state else 0
        if state is not None:
            self.members, self.complete, self.ended = state["members"], state["complete"], state["ended"]
            done = sum(self._saved.values())
            logger.info("packing: %s %s tokens", "already there," if self.complete else "going on after", f"{done:,}")

    def _file(self, split: Split) -> Path:
        assert self.directory is not None
        return self.directory / f"{split}.i32"


def _little(tokens: "array[int]") -> "array[int]":
    """To or from the order of bytes in files."""
    if sys.byteorder == "big":
        tokens.byteswap()
    return tokens
