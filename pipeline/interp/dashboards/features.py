"""What features respond to and what they write, from a text and a transcoder's weights.

1. Pass one over the tokens: counts, ranges, the highest activation of each context, a sample (`feature_sums.py`).
2. From these, which examples are shown; pass two: the activations along them, and histograms (`feature_examples.py`).
3. From the weights: decoder norms, logits, related features (`feature_weights.py`, `feature_activity.py`).

Each pass notes where it stands every few seconds, so that it goes on from there; where it was stopped has no effect on
the result.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import load, save
from torch import Tensor

from pipeline.arch.base import Transcoder
from pipeline.core.activations import FixedThreshold
from pipeline.dist import pieces
from pipeline.dist.pieces import ALONE
from pipeline.dist.wire import Group
from pipeline.files import write_aside
from pipeline.interp.dashboards import feature_examples
from pipeline.interp.dashboards.feature_examples import Examples, Windows
from pipeline.interp.dashboards.feature_options import FeatureOptions
from pipeline.interp.dashboards.feature_rows import widened
from pipeline.interp.dashboards.feature_sums import Sums, pairs
from pipeline.interp.dashboards.feature_text import Block, FeatureText

SECONDS_BETWEEN_NOTES = 5.0


class Chosen(NamedTuple):
    """The features that are described, by source, then by number."""

    source: NDArray[np.int64]
    feature: NDArray[np.int64]

    def of(self, source: int) -> tuple[int, Tensor]:
        """(place of the first one of a source, their numbers)"""
        first, stop = np.searchsorted(self.source, [source, source + 1])
        return int(first), torch.from_numpy(self.feature[first:stop])

    def part(self, some: range) -> "Chosen":
        """These of them."""
        return Chosen(self.source[some.start : some.stop], self.feature[some.start : some.stop])

    def identity(self, d_features: int) -> NDArray[np.int64]:
        """source * F + feature"""
        return self.source * d_features + self.feature


class Measured(NamedTuple):
    """What the two passes gave."""

    sums: Sums
    windows: Windows
    quantile_values: NDArray[np.float32]
    """[n, 100]"""

    @property
    def examples(self) -> Examples:
        return self.windows.examples


class Encoder:
    """The rows of chosen features, gathered once."""

    def __init__(self, transcoder: Transcoder, chosen: Chosen) -> None:
        assert isinstance(transcoder.activation, FixedThreshold)
        self._transcoder = transcoder
        self._rows: dict[int, tuple[int, Tensor, Tensor, Tensor]] = {}
        for source in range(transcoder.n_sources):
            first, ids = chosen.of(source)
            if len(ids):
                ids = ids.to(transcoder.b_enc.device)
                rows = widened(ids)
                bias, threshold = transcoder.b_enc[source][rows], transcoder.activation.threshold[source][ids]
                self._rows[source] = (first, transcoder.encoder_rows(source, rows).detach(), bias.detach(), threshold)

    def __call__(self, x: Tensor) -> list[tuple[int, Tensor]]:
        """x [B, L, D] -> for each source (place of its first feature, activations [B, n], 0 where not active)"""
        inputs = self._transcoder.inputs(x)
        found = []
        for source, (first, encoder, bias, threshold) in self._rows.items():
            pre_acts = torch.nn.functional.linear(inputs[source], encoder, bias)[:, : len(threshold)]
            found.append((first, torch.where((pre_acts > threshold) & (pre_acts > 0), pre_acts, 0.0)))
        return found


class Notes:
    """Where a pass stands, in one file that is there as a whole or not at all."""

    def __init__(self, file: Path, seconds: float = SECONDS_BETWEEN_NOTES) -> None:
        self._file, self._seconds, self._last = file, seconds, time.monotonic()

    def read(self) -> tuple[int, int, dict[str, NDArray[np.generic]]]:
        """(pass, next block, arrays); (0, 0, {}) where nothing was noted."""
        if not self._file.exists():
            return 0, 0, {}
        state = load(self._file.read_bytes())
        stage, block = state.pop("at").tolist()
        return stage, block, state

    def note(self, stage: int, block: int, state: Callable[[], dict[str, NDArray[np.generic]]]) -> None:
        """Every few seconds."""
        if time.monotonic() - self._last < self._seconds:
            return
        arrays = {name: np.ascontiguousarray(array) for name, array in state().items()}
        write_aside(self._file, save({"at": np.array([stage, block]), **arrays}))
        self._last = time.monotonic()


@torch.inference_mode()
def measure(
    transcoder: Transcoder, text: FeatureText, chosen: Chosen, options: FeatureOptions, notes: Notes | None = None,
    done: Callable[[int], None] = lambda tokens: None,
) -> Measured:  # fmt: skip
    """Both passes. `done` is told of tokens as they are read, each token twice; of those noted earlier at once.
    notes: where it goes on from, after a stop."""
    identity = chosen.identity(transcoder.d_features)
    encode = Encoder(transcoder, chosen)
    blocks = text.blocks()
    sums = Sums(identity, text.length, options.top, options.sample, options.seed)
    stage, at, state = notes.read() if notes else (0, 0, {})
    first_state = {name.removeprefix("sums."): array for name, array in state.items() if name.startswith("sums.")}
    if first_state:
        sums.restore(first_state)

    start = at if stage == 0 else len(blocks)
    done(sum(block.n_rows for block in blocks[:start]))
    for block in blocks[start:]:
        for first, activations in encode(text.read(block)):
            sums.add(pairs(activations, first, block.start * text.length))
        done(block.n_rows)
        if notes:
            notes.note(0, block.number + 1, lambda: _named(sums))

    windows = Windows(feature_examples.choose(sums, text.length, options), sums, text.length, text.n_rows, options)
    start = at if stage == 1 else 0
    if start:
        windows.restore({name: array for name, array in state.items() if not name.startswith("sums.")})
    done(sum(block.n_rows for block in blocks[:start]))
    for block in blocks[start:]:
        for first, activations in encode(text.read(block)):
            _extend(windows, block, activations, first, text.length)
        done(block.n_rows)
        if notes:
            notes.note(1, block.number + 1, lambda: _named(sums) | windows.state())
    return Measured(sums, windows, feature_examples.quantile_values(sums))


@torch.inference_mode()
def counts(
    transcoder: Transcoder, text: FeatureText, chosen: Chosen, done: Callable[[int], None], group: Group = ALONE
) -> NDArray[np.int64]:
    """On how many tokens each of the features is active. The ranks divide the tokens. -> [n]"""
    encode = Encoder(transcoder, chosen)
    found = torch.zeros(len(chosen.source), dtype=torch.int64)
    blocks = text.blocks()
    for block in [blocks[i] for i in pieces.mine(len(blocks), group)]:
        for first, activations in encode(text.read(block)):
            found[first : first + activations.shape[1]] += (activations > 0).sum(dim=0).cpu()
        done(block.n_rows)
    return pieces.added(found, group, "active tokens").numpy()


def bytes_of(options: FeatureOptions) -> int:
    """Of memory for each feature, at the most: running sums with those that wait, and examples as they are written."""
    entries = 2 * 24 * (options.sample + options.top)
    examples = options.top + options.quantiles * options.per_quantile
    return entries + examples * (options.before + options.after + 1) * 4 + 8 * options.bins + 1000


def _extend(windows: Windows, block: Block, activations: Tensor, first: int, length: int) -> None:
    windows.add(block, activations, pairs(activations, first, block.start * length), first)


def _named(sums: Sums) -> dict[str, NDArray[np.generic]]:
    return {f"sums.{name}": array for name, array in sums.state().items()}
