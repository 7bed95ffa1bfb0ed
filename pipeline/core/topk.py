"""Rules that choose a few pairs of token and feature by comparing them.

    topk               the k largest of relu(h), for each token and layer (Gao et al. 2024, arXiv 2406.04093)
    groupmax           F in k groups of neighbours; the largest relu(h) of each group, for each token and layer
    batchtopk          the k B largest of relu(h) in the batch, per layer (Bussmann et al. 2024, arXiv 2412.06410)
    batchtopk_across   the k B L largest of relu(h) in the batch, over all layers

Each has two forms: `forward` on dense pre-activations, which is the reference, and `choose`, which gives the pattern
alone. `rank=norm` compares relu(h) |W_dec,i|, what a feature adds to the outputs, in place of relu(h); the features
keep their values. Nothing is chosen that is not above 0 in what is compared. Ties go to the lowest index.

Features and tokens that lie elsewhere compete through `peers` (`core/peers.py`); k and the checks of options are those
of the whole.

The BatchTopK rules look at other tokens, so they have no exact form on one prompt: thresholds take their place
(`train/calibrate.py`).
"""

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from pipeline.core import products
from pipeline.core.options import ActivationOptions, Rank
from pipeline.core.peers import ALONE, Found, Peers, Row
from pipeline.core.rule import Activation
from pipeline.core.sparse import Pattern, fixed_k, from_pairs
from pipeline.errors import UserError


class Choosing(Activation):
    """`k` is the number for each layer, now; `final_k` what it falls to. `whole` is F, `d_features` is what is here."""

    chooses = True

    fixed_norms: Tensor | None
    """Decoder norms [L, F] to rank by in place of those handed over: those of training, once weights are folded."""

    def __init__(self, options: ActivationOptions, n_layers: int, d_features: int, peers: Peers = ALONE) -> None:
        super().__init__(options, n_layers, d_features, peers)
        self.options, self.whole = options, peers.whole(d_features)
        self.by_norm = options.rank == Rank.norm
        self.final_k = _checked_k(options, n_layers, self.whole)
        self.k_start, self.k_anneal = options.k_start, options.k_anneal or 0.0
        _check_annealing(options, self.final_k, self.whole)
        self.k = list(self.final_k)
        self.register_buffer("fixed_norms", None, persistent=False)

    def forward(self, pre_acts: Tensor, norms: Tensor | None = None) -> Tensor:
        positive = [h.relu() for h in pre_acts.unbind(1)]
        return torch.stack(list(self._kept(positive, range(self.n_layers), norms)), dim=1)

    def layer(self, pre_acts: Tensor, layer: int, norms: Tensor | None = None) -> Tensor:
        return next(self._kept([pre_acts.relu()], [layer], norms))

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

    def _kept(self, positive: Sequence[Tensor], layers: Sequence[int], norms: Tensor | None) -> Iterator[Tensor]:
        """Of these layers' relu(h) [B, F] the features: what is not chosen is 0."""
        raise NotImplementedError


class TopK(Choosing):
    grouped = False
    """Whether features compete within groups alone, so that nobody elsewhere is asked."""

    @property
    def rivals(self) -> Peers:
        return ALONE if self.grouped else self.peers

    def choose(self, pre_acts: Iterable[Tensor], norms: Tensor | None = None) -> Iterator[tuple[Pattern, Tensor]]:
        layers = (self._found(h, layer, norms) for layer, h in enumerate(pre_acts))
        for found, kept in self.rivals.best(layers, self.k):
            if kept is None:
                yield fixed_k(found.indices, self.d_features), found.values.reshape(-1)
            else:
                tokens = kept.nonzero()[:, 0]
                pattern = from_pairs(tokens, found.indices[kept], kept.shape[0], self.d_features)
                yield pattern, found.values[kept]

    def _kept(self, positive: Sequence[Tensor], layers: Sequence[int], norms: Tensor | None) -> Iterator[Tensor]:
        best = (self._best(h.detach(), layer, norms) for layer, h in zip(layers, positive, strict=True))
        chosen = self.rivals.best(best, [self.k[layer] for layer in layers])
        for h, (found, kept) in zip(positive, chosen, strict=True):
            above = found.compared > 0 if kept is None else kept
            # Entries that are not above 0 may repeat an index, so they are added, not assigned.
            yield torch.zeros_like(h).scatter_add(-1, found.indices, h.gather(-1, found.indices) * above)

    def _found(self, h: Tensor, layer: int, norms: Tensor | None) -> Found:
        """The candidates of each row. [B, F] -> [B, k] each"""
        if not self.by_norm and not self.grouped:
            values, indices = self._largest(h, self.k[layer])
            return Found(values, indices, values)
        return self._best(h.relu_(), layer, norms)

    def _best(self, positive: Tensor, layer: int, norms: Tensor | None) -> Found:
        """The candidates of each row of relu(h). [..., F] -> [..., k] each"""
        compared, indices = self._largest(self.compared(positive, norms, layer), self.k[layer])
        return Found(compared, indices, positive.gather(-1, indices) * (compared > 0))

    def _largest(self, compared: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The k largest of each row, ties to the lowest index. [..., F] -> values [..., k], indices [..., k]"""
        return products.topk(compared, min(k, self.d_features))


class GroupMax(TopK):
    """Feature i belongs to group i // (F / k). Groups compete for nothing, so no sort is needed, and who holds whole
    groups needs nobody else."""

    grouped = True

    def __init__(self, options: ActivationOptions, n_layers: int, d_features: int, peers: Peers = ALONE) -> None:
        super().__init__(options, n_layers, d_features, peers)
        for k in self.final_k:
            if self.whole % k:
                nearest = next(n for n in range(k, 0, -1) if self.whole % n == 0)
                raise UserError(
                    f"activation=groupmax makes {k} equal groups of arch.d_features={self.whole}, which {k} does not "
                    f"divide; use activation.k={nearest} or arch.d_features={-(-self.whole // k) * k}"
                )
            assert d_features % (self.whole // k) == 0, "only whole groups are here"

    def _largest(self, compared: Tensor, k: int) -> tuple[Tensor, Tensor]:
        size = self.whole // k
        values, best = compared.unflatten(-1, (-1, size)).max(dim=-1)  # the first of equals
        return values, best + torch.arange(0, self.d_features, size, device=best.device)


class BatchTopK(Choosing):
    """`threshold_ema` [L] follows the smallest chosen value: the threshold when a checkpoint is looked at mid-run."""

    per_token = False
    ema_decay = 0.999
    """Remembers about 1,000 steps; bias-corrected, so that it is right from the first one."""

    threshold_ema: Tensor
    ema_weight: Tensor

    def __init__(self, options: ActivationOptions, n_layers: int, d_features: int, peers: Peers = ALONE) -> None:
        super().__init__(options, n_layers, d_features, peers)
        self.register_buffer("threshold_ema", torch.zeros(n_layers, dtype=torch.float64))
        self.register_buffer("ema_weight", torch.zeros(n_layers, dtype=torch.float64))
        self._guesses: dict[int, float] = {}

    @property
    def threshold(self) -> Tensor:
        """tau [L], bias-corrected, of what is compared: with rank=norm a feature's threshold is tau / |W_dec,i|. 0
        where nothing was chosen yet."""
        return self.threshold_ema / self.ema_weight.clamp(min=1e-30)

    def choose(self, pre_acts: Iterable[Tensor], norms: Tensor | None = None) -> Iterator[tuple[Pattern, Tensor]]:
        n_tokens = 0

        def rows() -> Iterator[Row]:
            nonlocal n_tokens
            for layer, h in enumerate(pre_acts):
                n_tokens, positive = h.shape[0], (h.relu_() if self.by_norm else h).contiguous()
                yield Row(self.compared(positive, norms, layer), positive)

        for positions, values in self._chosen(rows(), [slice(i, i + 1) for i in range(self.n_layers)]):
            tokens, indices = positions // self.d_features, positions % self.d_features
            yield from_pairs(tokens, indices, n_tokens, self.d_features), values

    def _kept(self, positive: Sequence[Tensor], layers: Sequence[int], norms: Tensor | None) -> Iterator[Tensor]:
        rows = (Row(self.compared(h.detach(), norms, layer), h) for layer, h in zip(layers, positive, strict=True))
        chosen = self._chosen(rows, [slice(layer, layer + 1) for layer in layers])
        return (_masked(h, positions) for h, (positions, _) in zip(positive, chosen, strict=True))

    @torch.no_grad()
    def _chosen(self, rows: Iterable[Row], layers: Sequence[slice]) -> Iterator[tuple[Tensor, Tensor]]:
        """Of each row, which has these layers, the positions of the chosen values in it laid flat, ascending, and the
        features there. -> 2 x [nnz]"""
        k = [sum(self.k[here]) for here in layers]
        found = self.peers.largest(rows, k, (self._guess(here) for here in layers))
        for here, one in zip(layers, found, strict=True):
            self._guesses[here.start or 0] = one.guess
            if self.training and one.smallest is not None:
                keep = self.ema_decay
                self.threshold_ema[here] = keep * self.threshold_ema[here] + (1 - keep) * one.smallest.double()
                self.ema_weight[here] = keep * self.ema_weight[here] + (1 - keep)
            yield one.positions, one.values

    def _guess(self, layers: slice) -> float:
        """What the last search of such a row ended at. What is chosen does not depend on it."""
        return self._guesses.get(layers.start or 0, 0.0) or float(self.threshold[layers].min())


class BatchTopKAcross(BatchTopK):
    compares_layers = True

    def forward(self, pre_acts: Tensor, norms: Tensor | None = None) -> Tensor:
        positive = pre_acts.relu()
        compared = self.compared(positive.detach(), norms, slice(None))
        ((positions, _),) = self._chosen([Row(compared, positive)], [slice(None)])
        return _masked(positive, positions)

    def choose(self, pre_acts: Iterable[Tensor], norms: Tensor | None = None) -> Iterator[tuple[Pattern, Tensor]]:
        positive = torch.stack([h.relu_() for h in pre_acts], dim=1)
        compared = self.compared(positive, norms, slice(None))
        ((chosen, values),) = self._chosen([Row(compared, positive)], [slice(None)])
        rows, indices = chosen // self.d_features, chosen % self.d_features
        tokens, layers = rows // self.n_layers, rows % self.n_layers
        for layer in range(self.n_layers):
            here = (layers == layer).nonzero().squeeze(1)
            pattern = from_pairs(tokens[here], indices[here], positive.shape[0], self.d_features)
            yield pattern, values[here]

    def layer(self, pre_acts: Tensor, layer: int, norms: Tensor | None = None) -> Tensor:
        raise NotImplementedError("the rule compares layers, so that it has no form for one of them")


def _masked(positive: Tensor, positions: Tensor) -> Tensor:
    """`positive` with all but the values at these positions, laid flat, set to 0."""
    mask = torch.zeros(positive.numel(), dtype=torch.bool, device=positive.device)
    mask[positions] = True
    return positive * mask.view_as(positive)


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
