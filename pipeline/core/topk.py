"""Rules that choose a few pairs of token and feature by comparing them.

    topk               the k largest of relu(h), for each token and layer (Gao et al. 2024, arXiv 2406.04093)
    groupmax           F in k groups of neighbours; the largest relu(h) of each group, for each token and layer
    batchtopk          the k B largest of relu(h) in the batch, per layer (Bussmann et al. 2024, arXiv 2412.06410)
    batchtopk_across   the k B L largest of relu(h) in the batch, over all layers

Each has two forms: `forward` on dense pre-activations, which is the reference, and `choose`, which gives the pattern
alone. `rank=norm` compares relu(h) |W_dec,i|, what a feature adds to the outputs, in place of relu(h); the features
keep their values. Nothing is chosen that is not above 0 in what is compared. Ties go to the lowest index.

The BatchTopK rules look at other tokens, so they have no exact form on one prompt: thresholds take their place
(`train/calibrate.py`).
"""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from pipeline.core import products
from pipeline.core.options import ActivationOptions, Rank
from pipeline.core.rule import Activation
from pipeline.core.sparse import Pattern, fixed_k, from_pairs
from pipeline.errors import UserError


class Choosing(Activation):
    """`k` is the number for each layer, now; `final_k` what it falls to."""

    chooses = True

    fixed_norms: Tensor | None
    """Decoder norms [L, F] to rank by in place of those handed over: those of training, once weights are folded."""

    def __init__(self, options: ActivationOptions, n_layers: int, d_features: int) -> None:
        super().__init__(options, n_layers, d_features)
        self.options = options
        self.by_norm = options.rank == Rank.norm
        self.final_k = _checked_k(options, n_layers, d_features)
        self.k_start, self.k_anneal = options.k_start, options.k_anneal or 0.0
        _check_annealing(options, self.final_k, d_features)
        self.k = list(self.final_k)
        self.register_buffer("fixed_norms", None, persistent=False)

    def at(self, done: float) -> None:
        """k falls linearly from k_start, over the first `k_anneal` of the run."""
        left = 0.0 if self.k_start is None else max(0.0, 1 - done / self.k_anneal)
        self.k = [k + round(((self.k_start or k) - k) * left) for k in self.final_k]

    def compared(self, positive: Tensor, norms: Tensor | None, layers: int | slice) -> Tensor:
        """What is ranked: relu(h), or relu(h) |W_dec,i|. [B, ..., F] -> the same shape"""
        if not self.by_norm:
            return positive
        norms = self.fixed_norms if self.fixed_norms is not None else norms
        assert norms is not None, "a rule that ranks by decoder norms is handed them"
        return positive * norms[layers]


class TopK(Choosing):
    grouped = False
    """Whether features compete within groups alone."""

    def layer(self, pre_acts: Tensor, layer: int, norms: Tensor | None = None) -> Tensor:
        positive = pre_acts.relu()
        indices, above = self._best(positive.detach(), layer, norms)
        # Entries that are not above 0 may repeat an index, so they are added, not assigned.
        return torch.zeros_like(positive).scatter_add(-1, indices, positive.gather(-1, indices) * above)

    def choose(self, pre_acts: Iterable[Tensor], norms: Tensor | None = None) -> Iterator[tuple[Pattern, Tensor]]:
        for layer, h in enumerate(pre_acts):
            values, indices = self._chosen(h, layer, norms)
            yield fixed_k(indices, self.d_features), values.reshape(-1)

    def _chosen(self, h: Tensor, layer: int, norms: Tensor | None) -> tuple[Tensor, Tensor]:
        """The chosen features of each row, and which they are. [B, F] -> 2 x [B, k]"""
        if not self.by_norm and not self.grouped:
            return products.topk(h, self.k[layer])
        positive = h.relu_()
        indices, above = self._best(positive, layer, norms)
        return positive.gather(-1, indices) * above, indices

    def _best(self, positive: Tensor, layer: int, norms: Tensor | None) -> tuple[Tensor, Tensor]:
        """The chosen of each row, and whether each is above 0 in what is compared. [..., F] -> 2 x [..., k]"""
        values, indices = self._largest(self.compared(positive, norms, layer), self.k[layer])
        return indices, values > 0

    def _largest(self, compared: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The k largest of each row, ties to the lowest index. [..., F] -> values [..., k], indices [..., k]"""
        return products.topk(compared, k)


class GroupMax(TopK):
    """Feature i belongs to group i // (F / k). Groups compete for nothing, so no sort is needed."""

    grouped = True

    def __init__(self, options: ActivationOptions, n_layers: int, d_features: int) -> None:
        super().__init__(options, n_layers, d_features)
        for k in self.final_k:
            if d_features % k:
                nearest = next(n for n in range(k, 0, -1) if d_features % n == 0)
                raise UserError(
                    f"activation=groupmax makes {k} equal groups of arch.d_features={d_features}, which {k} does not "
                    f"divide; use activation.k={nearest} or arch.d_features={-(-d_features // k) * k}"
                )

    def _largest(self, compared: Tensor, k: int) -> tuple[Tensor, Tensor]:
        size = self.d_features // k
        values, best = compared.unflatten(-1, (k, size)).max(dim=-1)  # the first of equals
        return values, best + torch.arange(0, self.d_features, size, device=best.device)


class BatchTopK(Choosing):
    """`threshold_ema` [L] follows the smallest chosen value: the threshold when a checkpoint is looked at mid-run."""

    per_token = False
    ema_decay = 0.999
    """Remembers about 1,000 steps; bias-corrected, so that it is right from the first one."""

    threshold_ema: Tensor
    ema_weight: Tensor

    def __init__(self, options: ActivationOptions, n_layers: int, d_features: int) -> None:
        super().__init__(options, n_layers, d_features)
        self.register_buffer("threshold_ema", torch.zeros(n_layers, dtype=torch.float64))
        self.register_buffer("ema_weight", torch.zeros(n_layers, dtype=torch.float64))

    @property
    def threshold(self) -> Tensor:
        """tau [L], bias-corrected, of what is compared: with rank=norm a feature's threshold is tau / |W_dec,i|. 0
        where nothing was chosen yet."""
        return self.threshold_ema / self.ema_weight.clamp(min=1e-30)

    def layer(self, pre_acts: Tensor, layer: int, norms: Tensor | None = None) -> Tensor:
        return self._keep(pre_acts.relu(), slice(layer, layer + 1), norms)

    def choose(self, pre_acts: Iterable[Tensor], norms: Tensor | None = None) -> Iterator[tuple[Pattern, Tensor]]:
        for layer, h in enumerate(pre_acts):
            positive = (h.relu_() if self.by_norm else h).contiguous()
            chosen = self._chosen(positive, slice(layer, layer + 1), norms)
            tokens, indices = chosen // self.d_features, chosen % self.d_features
            yield from_pairs(tokens, indices, h.shape[0], self.d_features), positive.view(-1)[chosen]

    def _keep(self, positive: Tensor, layers: slice, norms: Tensor | None) -> Tensor:
        """`positive` with all but the chosen values set to 0."""
        mask = torch.zeros(positive.numel(), dtype=torch.bool, device=positive.device)
        mask[self._chosen(positive.detach(), layers, norms)] = True
        return positive * mask.view_as(positive)

    @torch.no_grad()
    def _chosen(self, positive: Tensor, layers: slice, norms: Tensor | None) -> Tensor:
        """Positions of the chosen values in `positive` laid flat, ascending. [B, ..., F] -> int64 [nnz]"""
        n = sum(self.k[layers]) * positive.shape[0]
        compared = self.compared(positive, norms, layers)
        chosen, smallest = products.largest(compared.reshape(-1), n, float(self.threshold[layers].min()))
        if self.training and chosen.numel():
            keep = self.ema_decay
            self.threshold_ema[layers] = keep * self.threshold_ema[layers] + (1 - keep) * smallest.double()
            self.ema_weight[layers] = keep * self.ema_weight[layers] + (1 - keep)
        return chosen


class BatchTopKAcross(BatchTopK):
    compares_layers = True

    def forward(self, pre_acts: Tensor, norms: Tensor | None = None) -> Tensor:
        return self._keep(pre_acts.relu(), slice(None), norms)

    def choose(self, pre_acts: Iterable[Tensor], norms: Tensor | None = None) -> Iterator[tuple[Pattern, Tensor]]:
        positive = torch.stack([h.relu_() for h in pre_acts], dim=1)
        chosen = self._chosen(positive, slice(None), norms)
        values, rows, indices = positive.view(-1)[chosen], chosen // self.d_features, chosen % self.d_features
        tokens, layers = rows // self.n_layers, rows % self.n_layers
        for layer in range(self.n_layers):
            here = (layers == layer).nonzero().squeeze(1)
            pattern = from_pairs(tokens[here], indices[here], positive.shape[0], self.d_features)
            yield pattern, values[here]

    def layer(self, pre_acts: Tensor, layer: int, norms: Tensor | None = None) -> Tensor:
        raise NotImplementedError("the rule compares layers, so that it has no form for one of them")


def _checked_k(options: ActivationOptions, n_layers: int, d_features: int) -> list[int]:
    """k for each layer."""
    per_layer = options.k_per_layer
    if per_layer is None:
        if options.k is None or not 1 <= options.k <= d_features:
            raise UserError(f"activation.k={options.k} must lie between 1 and arch.d_features={d_features}")
        return [options.k] * n_layers
    given = f"activation.k_per_layer={list(per_layer)}"
    if options.k is not None:
        raise UserError(f"{given} and activation.k={options.k} say the same thing twice; add activation.k=null")
    if len(per_layer) != n_layers:
        raise UserError(f"{given} has {len(per_layer)} numbers for {n_layers} layers of features; give {n_layers}")
    if not all(1 <= k <= d_features for k in per_layer):
        raise UserError(f"{given}: each must lie between 1 and arch.d_features={d_features}")
    return list(per_layer)


def _check_annealing(options: ActivationOptions, final_k: list[int], d_features: int) -> None:
    start, share = options.k_start, options.k_anneal
    if (start is None) != (share is None):
        raise UserError(f"activation.k_start={start} and activation.k_anneal={share} go together; set both, or neither")
    if start is None or share is None:
        return
    if not max(final_k) <= start <= d_features:
        raise UserError(
            f"activation.k_start={start} must lie between the k that it falls to ({max(final_k)}) and "
            f"arch.d_features={d_features}"
        )
    if not 0 < share <= 1:
        raise UserError(f"activation.k_anneal={share} is a share of the run and must lie in (0, 1]")
