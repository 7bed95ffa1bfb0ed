"""Fixed thresholds for a rule that looks at the batch or ranks features against each other.

For each feature: how often did the training rule choose it on the calibration split? Its threshold is the midpoint
between the smallest pre-activation that keeps this count and the largest that would exceed it, so that a = h 1[h >
theta] fires exactly as often on that split. A feature that the rule never chose there gets a
threshold just above the largest pre-activation seen.

Where features lie on several ranks, each has the thresholds of its own, and everyone reads the same tokens.
"""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from pipeline.arch.base import Transcoder
from pipeline.core.activations import FixedThreshold, JumpReLU
from pipeline.core.metrics import Firing, Reconstruction
from pipeline.core.sparse import Sparse
from pipeline.dist import sharded
from pipeline.dist.sharded import Ranks

SILENT_MARGIN = 1e-5
"""How far above its largest pre-activation, as a share of it, the threshold of a never chosen feature lies: rounding of
float32 products is a hundred times smaller."""

FEATURES_AT_ONCE = 1024
"""Bounds the memory of sorting: this many pre-activations of every calibration token."""


def shuffled_batches(n: int, batch: int, seed: int) -> Iterator[Tensor]:
    """Row numbers of [0, n) in seeded order, `batch` at a time: what the BatchTopK rules are measured on."""
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    return iter(order.split(batch))


@torch.no_grad()
def firing_counts(model: Transcoder, x: Tensor, batch: int, seed: int) -> Tensor:
    """How often the model's own rule fires each feature. x [n, L, D] -> int64 [S, F]"""
    firing = Firing(model.n_sources, model.d_features)
    with model.activation.peers.same_tokens():
        for rows in shuffled_batches(x.shape[0], batch, seed):
            firing.update(dense_features(model, x[rows]))
    return firing.fires


@torch.no_grad()
def thresholds(model: Transcoder, x: Tensor, batch: int, seed: int) -> Tensor:
    """theta [S, F] >= 0 for the calibration inputs x [n, L, D], in the transcoder's units."""
    if isinstance(model.activation, JumpReLU | FixedThreshold):
        return model.activation.threshold.detach().clone()
    if not model.activation.chooses:
        return torch.zeros(model.n_sources, model.d_features, device=x.device)
    counts = firing_counts(model, x, batch, seed)
    theta = torch.empty(counts.shape, device=x.device, dtype=x.dtype)
    for layer, read in enumerate(model.inputs(x)):
        for start in range(0, model.d_features, FEATURES_AT_ONCE):
            block = slice(start, start + FEATURES_AT_ONCE)
            weight, bias = model.encoders[layer][block], model.b_enc[layer][block]
            # The same product as in training, row for row, so that the midpoint separates what the rule separated.
            pre_acts = torch.cat([torch.nn.functional.linear(h, weight, bias) for h in read.split(batch)])
            theta[layer, block] = at_count(pre_acts, counts[layer, block].to(x.device))
    return theta


@torch.no_grad()
def layer_thresholds(model: Transcoder, x: Tensor, batch: int, seed: int) -> Tensor:
    """theta [L, F] >= 0, one number for a layer, with which the layer fires as often as under the model's own rule.

    x [n, L, D] are the calibration inputs, in the transcoder's units; the rule is one that chooses.
    """
    counts = firing_counts(model, x, batch, seed).sum(dim=1)
    largest = [x.new_empty(0) for _ in counts]
    for rows in x.split(batch):
        for layer, h in enumerate(model.encode(rows).unbind(1)):
            # One more than fires, so that the midpoint has two sides; the rest of the pre-activations is forgotten.
            found = torch.cat([largest[layer], h[h > 0]])
            largest[layer] = found.topk(min(int(counts[layer]) + 1, found.numel())).values
    theta = [at_count(values[:, None], n[None].to(x.device)) for values, n in zip(largest, counts, strict=True)]
    return torch.stack(theta).expand(-1, model.d_features).contiguous()


def at_count(pre_acts: Tensor, counts: Tensor) -> Tensor:
    """Thresholds above which exactly counts[i] of the positive values in column i lie. [n, F], [F] -> [F]"""
    ordered = pre_acts.clamp(min=0).sort(dim=0, descending=True).values
    last = torch.cat([ordered, torch.zeros_like(ordered[:1])])
    below = last.gather(0, counts[None])[0]
    above = last.gather(0, (counts - 1).clamp(min=0)[None])[0]
    middle = ((above.double() + below.double()) / 2).to(below.dtype)
    # Between neighbouring floats the midpoint rounds to one of them; `below` still separates under a strict >.
    theta = torch.where(middle < above, middle, below)
    # Folding moves pre-activations by a last bit, so a feature that is to stay silent needs some room above.
    return torch.where(counts > 0, theta, below * (1 + SILENT_MARGIN))


def measure(
    model: Transcoder, x: Tensor, y: Tensor, y_scale: Tensor, batch: int, seed: int, ranks: Ranks | None = None
) -> dict[str, float | None]:
    """Total L0 and pooled FVU (model's units) of the model as it stands, on shuffled batches of training size."""
    batches = ((x[rows], y[rows]) for rows in shuffled_batches(x.shape[0], batch, seed))
    firing, reconstruction = sums(model, batches, y_scale, ranks)
    return {"l0": l0(firing, ranks), "fvu": reconstruction.fvu()["pooled"]}


@torch.no_grad()
def sums(
    model: Transcoder, batches: Iterable[tuple[Tensor, Tensor]], y_scale: Tensor, ranks: Ranks | None = None
) -> tuple[Firing, Reconstruction]:
    """What the model does as it stands; of several feature ranks what its own features do, and how near the
    reconstruction from all comes. batches: x, y [B, L, D] in the transcoder's units, the same on every rank."""
    ranks = ranks or sharded.alone(model)
    firing = Firing(model.n_sources, model.d_features)
    reconstruction = Reconstruction(*model.dims)
    with model.activation.peers.same_tokens():
        for x, y in batches:
            out = model(x)
            firing.update(out.features.dense() if isinstance(out.features, Sparse) else out.features)
            (y_hat,) = ranks.summed([out.y_hat], "reconstruction")
            reconstruction.update(y_hat * y_scale, y * y_scale)
    return firing, reconstruction


def l0(firing: Firing, ranks: Ranks | None) -> float:
    """Active features of a token, those of other ranks too."""
    own: float = firing.l0()["total"]
    return own if ranks is None else ranks.total(own)


def dead_fraction(firing: Firing, ranks: Ranks | None) -> float:
    """The share of features that never fired, those of other ranks too."""
    own: float = firing.dead_fraction()["total"]
    if ranks is None:
        return own
    return ranks.total(own * ranks.shard.n / ranks.shard.d_features)


def dense_features(model: Transcoder, x: Tensor) -> Tensor:
    """Features under the model's own rule. [B, L, D] -> [B, S, F]"""
    return model.choose(x).dense() if model.activation.chooses else model.activation(model.encode(x))
