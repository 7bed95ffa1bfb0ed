"""The rows of an attribution graph: the effects of all sources on a batch of targets.

Columns, before features are left out:

    N active features | errors, of A layers at positions 1 to T - 1 | T tokens | T positions, if any | A MLP outputs at
    position 0 | biases of A + 1 origins

Layers are counted from the first that is read: those of the base model that are not read have numbers below 0 and from
L on, and their MLPs' outputs are error throughout.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.core.sparse import Pattern
from pipeline.errors import UserError
from pipeline.interp.circuits import held_prompt
from pipeline.interp.circuits.graph import Kind
from pipeline.interp.circuits.graph_targets import Outputs
from pipeline.interp.circuits.held_prompt import Backward, Gradients, Recorded
from pipeline.interp.replacement import ReplacementModel, sparse

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-11}
"""Most that the sources of a target may miss of it, of the sum of their sizes."""


class Active(NamedTuple):
    """N features, by layer, position and index."""

    layer: Tensor
    position: Tensor
    index: Tensor  # type: ignore[assignment]  # tuples have a method of this name, which nobody needs here
    activation: Tensor
    value: Tensor
    """The pre-activation."""

    @property
    def n(self) -> int:
        return len(self.layer)

    def of(self, layer: int) -> slice:
        """Where those of a layer stand."""
        first, stop = torch.searchsorted(self.layer, torch.tensor([layer, layer + 1]).to(self.layer)).tolist()
        return slice(first, stop)


class Columns(NamedTuple):
    """Where the columns of a kind stand, and what each is."""

    kind: list[Kind]
    layer: Tensor
    position: Tensor
    places: dict[Kind, slice]


class Decoded(NamedTuple):
    """What the transcoder makes of a prompt."""

    active: Active
    error: Tensor
    """[A, T, D], 0 at position 0."""


def decoded(model: ReplacementModel, prompt: Recorded) -> Decoded:
    """Features and errors of a prompt."""
    transcoder, lm = model.transcoder, model.lm
    found: list[tuple[Pattern, Tensor]] = []
    error = torch.stack(prompt.mlp_out)
    parts: list[tuple[Tensor, ...]] = []
    for layer, x in enumerate(prompt.x):
        pattern, values = transcoder.layer_features(x, layer)
        found.append((pattern, values))
        error[lm.layers[layer]] -= transcoder.decode_layer(sparse(found), layer, x)
        kept = (values > 0) & (pattern.tokens > 0)
        position, index = pattern.tokens[kept], pattern.indices[kept]
        pre_acts = transcoder.encode_layer(x, layer)[position, index]
        parts.append((torch.full_like(index, layer), position, index, values[kept], pre_acts))
    error[:, 0] = 0
    return Decoded(Active(*(torch.cat(column) for column in zip(*parts, strict=True))), error)


def columns(model: ReplacementModel, prompt: Recorded, active: Active) -> Columns:
    lm, n_tokens = model.lm, prompt.tokens.shape[1]
    layers = torch.arange(lm.n_base_layers + 1) - lm.layers.start
    later, all_positions, nowhere = torch.arange(1, n_tokens), torch.arange(n_tokens), torch.tensor(-1)
    grid = [t.flatten() for t in torch.meshgrid(layers[:-1], later, indexing="ij")]
    parts = [
        (Kind.feature, active.layer.cpu(), active.position.cpu()),
        (Kind.error, grid[0], grid[1]),
        (Kind.token, nowhere.expand(n_tokens), all_positions),
        *((Kind.position, nowhere.expand(n_tokens), all_positions) for _ in prompt.positions),
        (Kind.position_0, layers[:-1], torch.zeros_like(layers[:-1])),
        (Kind.bias, layers, nowhere.expand(len(layers))),
    ]
    places: dict[Kind, slice] = {}
    start = 0
    for kind, layer, _ in parts:
        places[kind] = slice(places[kind].start if kind in places else start, start + len(layer))
        start += len(layer)
    kinds = [kind for kind, layer, _ in parts for _ in range(len(layer))]
    return Columns(kinds, torch.cat([p[1] for p in parts]), torch.cat([p[2] for p in parts]), places)


def counted(model: ReplacementModel, prompt: Recorded, active: Active) -> Tensor:
    """Active features of each layer and position. [L, T]"""
    n_layers, n_tokens = model.lm.n_layers, prompt.tokens.shape[1]
    return torch.bincount(active.layer * n_tokens + active.position, minlength=n_layers * n_tokens).view(n_layers, -1)


def decoder_bytes(model: ReplacementModel, prompt: Recorded, active: Active) -> int:
    """Of the decoder rows of all active features, side by side by position."""
    most = counted(model, prompt, active).max(dim=1).values.tolist()
    n_rows = sum(n * len(model.transcoder.targets(layer)) for layer, n in enumerate(most))
    return n_rows * prompt.tokens.shape[1] * model.lm.d_model * prompt.embedding.itemsize


class Rows:
    """Makes rows [m, C] of targets: features by their number among the active ones, and outputs behind them (N + i)."""

    def __init__(
        self, model: ReplacementModel, prompt: Recorded, found: Decoded, outputs: Outputs, keep_bytes: float
    ) -> None:
        """keep_bytes: decoder rows are gathered once if they take no more than this, anew in each batch else."""
        self.model, self.prompt, self.outputs = model, prompt, outputs
        self.active, self.error = found
        self.columns = columns(model, prompt, self.active)
        n_tokens = prompt.tokens.shape[1]
        self._counts = counted(model, prompt, self.active)
        counts = self._counts.flatten()
        first = (counts.cumsum(0) - counts)[self.active.layer * n_tokens + self.active.position]
        self._slot = torch.arange(self.active.n, device=first.device) - first
        n_bytes = decoder_bytes(model, prompt, self.active)
        self._kept: dict[tuple[int, int], Tensor] | None = {} if n_bytes <= keep_bytes else None
        self.biases = self._biases()

    @property
    def n_targets(self) -> int:
        return self.active.n + len(self.outputs.ids)

    def values(self, targets: Tensor) -> Tensor:
        return torch.cat([self.active.value, self.outputs.values])[targets]

    def make(self, backward: Backward, targets: Tensor) -> Tensor:
        """int64 [m] -> [m, C]. UserError where the sources of a target do not add up to it."""
        layer, position, vectors = self._reads(targets)
        gradients = backward.gradients(layer.tolist(), position, vectors)
        rows = self.error.new_zeros(len(targets), len(self.columns.kind))
        self._add_features(rows, gradients)
        places = self.columns.places
        for a, gradient in enumerate(gradients.mlp_out):
            if gradient is None:
                continue
            n_later = gradient.shape[1] - 1
            start = places[Kind.error].start + a * n_later
            rows[:, start : start + n_later] = torch.einsum("ntd,td->nt", gradient[:, 1:], self.error[a, 1:])
            rows[:, places[Kind.position_0].start + a] = gradient[:, 0] @ self.prompt.mlp_out[a][0]
        embedded = [(Kind.token, gradients.embedding, self.prompt.embedding)]
        embedded += [(Kind.position, *pair) for pair in zip(gradients.positions, self.prompt.positions, strict=True)]
        for kind, gradient, value in embedded:
            if gradient is not None:
                rows[:, places[kind]] = torch.einsum("ntd,td->nt", gradient, value)
        rows[:, places[Kind.bias]] = self.biases[targets]
        self._check(rows, targets)
        return rows

    def _reads(self, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Layer [m], position [m] and row [m, D] of targets."""
        n, outputs = self.active.n, self.outputs
        more = torch.full((len(outputs.ids),), 0, device=self.active.layer.device)
        layer = torch.cat([self.active.layer, more + outputs.layer])[targets]
        position = torch.cat([self.active.position, more + outputs.position])[targets]
        rows = self.error.new_zeros(len(targets), self.error.shape[2])
        rows[targets >= n] = outputs.rows[targets[targets >= n] - n]
        for l in layer[targets < n].unique().tolist():
            here = (targets < n) & (layer == l)
            rows[here] = self.model.transcoder.encoder_rows(l, self.active.index[targets[here]])
        return layer, position, rows

    def _add_features(self, rows: Tensor, gradients: Gradients) -> None:
        """a_s sum_m W_dec[s -> m] . g^m at the feature's position."""
        first, transcoder = self.model.lm.layers.start, self.model.transcoder
        # [T, D, n] of each layer that is written: one product for each position.
        by_position = {}
        for m in range(self.model.lm.n_layers):
            gradient = gradients.mlp_out[first + m]
            if gradient is not None:
                by_position[m] = gradient.permute(1, 2, 0).contiguous()
        for source in range(self.model.lm.n_layers):
            here, total = self.active.of(source), None
            if here.start == here.stop:
                continue
            for m in transcoder.targets(source):
                if m in by_position:
                    part = self._decoders(source, m) @ by_position[m]
                    total = part if total is None else total.add_(part)
            if total is not None:
                rows[:, here] = total[self.active.position[here], self._slot[here]].T

    def _decoders(self, source: int, target: int) -> Tensor:
        """What active features of a layer write to another, by position: [T, most at a position, D], 0 beyond."""
        if self._kept is not None and (source, target) in self._kept:
            return self._kept[source, target]
        here = self.active.of(source)
        written = self.model.transcoder.table(source, target, self.active.index[here])
        n_tokens, n_most = self.error.shape[1], int(self._counts[source].max())
        table = self.error.new_zeros(n_tokens, n_most, self.error.shape[2])
        table[self.active.position[here], self._slot[here]] = written * self.active.activation[here, None]
        if self._kept is not None:
            self._kept[source, target] = table
        return table

    def _biases(self) -> Tensor:
        """What the biases of each origin add to each target. [N + k, A + 1]"""
        lm, transcoder, active, outputs = self.model.lm, self.model.transcoder, self.active, self.outputs
        n, first = active.n, lm.layers.start
        found = self.error.new_zeros(self.n_targets, lm.n_base_layers + 1)
        rows = [transcoder.encoder_rows(l, active.index[active.of(l)]) for l in range(lm.n_layers)]
        for origin, reads, last in held_prompt.of_biases(self.model, self.prompt):
            for l in range(max(origin, 0), lm.n_layers):
                here = active.of(l)
                found[here, origin + first] = (rows[l] * reads[l][active.position[here]]).sum(dim=1)
            read = [*reads, last][outputs.layer][outputs.position]
            found[n:, origin + first] = outputs.rows @ read
        found[torch.arange(n), active.layer + first] += transcoder.b_enc[active.layer, active.index]
        # An unembedding's bias belongs behind the last layer, a feature's to its own.
        own = lm.n_base_layers if outputs.layer == lm.n_layers else outputs.layer + first
        found[n:, own] += outputs.biases
        return found

    def _check(self, rows: Tensor, targets: Tensor) -> None:
        """|sum - h| <= tolerance x sum of |terms|."""
        values = self.values(targets).double()
        sums = rows.sum(dim=1, dtype=torch.float64)
        gap = (sums - values).abs()
        limit = TOLERANCE[rows.dtype] * rows.abs().sum(dim=1, dtype=torch.float64)
        if (wrong := (gap > limit).nonzero().flatten().tolist()) or not bool(gap.isfinite().all()):
            i = wrong[0] if wrong else 0
            lm = self.model.lm
            what = f"the sources of a target add up to {float(sums[i]):.6g}, not to {float(values[i]):.6g}"
            why = f"{lm.architecture} has more than attention patterns and norms that is not linear between its MLPs"
            raise UserError(f"model={lm.name}: {what}: {why}; use a model of another family (GPT-2, Llama, Gemma)")


def influence(rows: Tensor, owners: Tensor, weights: Tensor, n_features: int) -> Tensor:
    """w N + w N^2 + ... of the features, N the sizes of the rows, each divided by its sum; rows that are not there yet
    count as zero. rows [m, C], the feature that owns each row (-1: none) [m], weights w [m] -> [n_features]"""
    sizes = rows.abs()
    normal = sizes[:, :n_features] / sizes.sum(dim=1, keepdim=True).clamp(min=1e-10)
    total, flow = normal.new_zeros(n_features), weights.to(normal)
    inner = owners >= 0
    while bool(flow.any()):
        reached = flow @ normal
        total += reached
        flow = torch.where(inner, reached[owners.clamp(min=0)], 0.0) if n_features else torch.zeros_like(flow)
    return total


def batches(order: Sequence[int] | Tensor, n: int) -> list[Tensor]:
    """In pieces of n at the most, as equal as can be."""
    targets = torch.as_tensor(order, dtype=torch.int64)
    return list(targets.tensor_split(max(1, -(-len(targets) // n)))) if len(targets) else []
