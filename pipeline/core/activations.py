"""From pre-activations to features.

    relu               a = max(h, 0)
    jumprelu           a = h * 1[h > theta], theta = exp(t) learned (Rajamanoharan et al. 2024, arXiv 2407.14435)
    topk               the k largest of relu(h), for each token and layer (Gao et al. 2024, arXiv 2406.04093)
    batchtopk          the k B largest of relu(h) in the batch, per layer (Bussmann et al. 2024, arXiv 2412.06410)
    batchtopk_across   the k B L largest of relu(h) in the batch, over all layers

The last three choose a few pairs of token and feature (`chooses` is true) and have two forms of the same rule:
`forward` on dense pre-activations, which is the reference, and `choose`, which gives the pattern alone. Ties go to
the lowest index. The BatchTopK rules look at other tokens, so they have no exact form on one prompt: thresholds take
their place (`train/calibrate.py`).

JumpReLU thresholds learn through a rectangle K = 1[|h - theta| < bandwidth / 2] in place of the derivative of the step,
g = dL/da. Two published rules differ by a factor theta:

    anthropic   dL/dt     = -g theta K / bandwidth         (Anthropic, January 2025 update)
    gdm         dL/dtheta = -g theta K / bandwidth         so dL/dt = -g theta^2 K / bandwidth
"""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.core.options import ActivationOptions, ThetaGrad
from pipeline.core.sparse import Pattern, fixed_k, from_pairs
from pipeline.errors import UserError


class Activation(nn.Module):
    """An activation rule over all layers."""

    chooses = False
    """Whether the rule chooses a few pairs, so that the sparse path applies."""

    per_token = True
    """Whether a token's features depend on that token's layer alone, so that the rule can run live in a model."""

    def __init__(self, options: ActivationOptions, n_layers: int, d_features: int) -> None:
        super().__init__()
        self.n_layers, self.d_features = n_layers, d_features

    def forward(self, pre_acts: Tensor) -> Tensor:
        """[B, L, F] -> features [B, L, F]"""
        return torch.stack([self.layer(h, i) for i, h in enumerate(pre_acts.unbind(1))], dim=1)

    def layer(self, pre_acts: Tensor, layer: int) -> Tensor:
        """One layer's features, for the rules whose layers are independent. [B, F] -> [B, F]"""
        raise NotImplementedError

    def choose(self, pre_acts: Iterable[Tensor]) -> Iterator[tuple[Pattern, Tensor]]:
        """For each layer's pre-activations [B, F], which it may overwrite: the chosen pairs and their features [nnz].

        Layers are taken one at a time where the rule allows it, so that no more than one need be in memory.
        """
        raise NotImplementedError


class ReLU(Activation):
    def layer(self, pre_acts: Tensor, layer: int) -> Tensor:
        return pre_acts.relu()


class JumpReLU(Activation):
    """log_threshold [L, F] is t."""

    def __init__(self, options: ActivationOptions, n_layers: int, d_features: int) -> None:
        super().__init__(options, n_layers, d_features)
        if options.threshold is None or options.threshold <= 0:
            raise UserError(f"activation.threshold={options.threshold} must be above 0, since its logarithm is learned")
        if options.bandwidth is None or options.bandwidth <= 0:
            raise UserError(f"activation.bandwidth={options.bandwidth} must be above 0")
        if options.theta_grad is None:
            raise UserError("activation.theta_grad is not set; choose anthropic or gdm")
        self.bandwidth, self.theta_grad = options.bandwidth, options.theta_grad
        initial = torch.full((n_layers, d_features), options.threshold).log()
        self.log_threshold = nn.Parameter(initial)

    @property
    def threshold(self) -> Tensor:
        """theta [L, F]"""
        return self.log_threshold.exp()

    def layer(self, pre_acts: Tensor, layer: int) -> Tensor:
        return _JumpReLU.apply(pre_acts, self.log_threshold[layer], self.bandwidth, self.theta_grad)


class FixedThreshold(Activation):
    """a = h * 1[h > theta] with theta [L, F] fixed: what a finished transcoder uses, whatever it was trained with."""

    threshold: Tensor

    def __init__(self, threshold: Tensor) -> None:
        super().__init__(ActivationOptions(name="threshold"), *threshold.shape)
        self.register_buffer("threshold", threshold)

    def layer(self, pre_acts: Tensor, layer: int) -> Tensor:
        return pre_acts * (pre_acts > self.threshold[layer])


class TopK(Activation):
    chooses = True

    def __init__(self, options: ActivationOptions, n_layers: int, d_features: int) -> None:
        super().__init__(options, n_layers, d_features)
        self.k = _checked_k(options, d_features)

    def layer(self, pre_acts: Tensor, layer: int) -> Tensor:
        positive = pre_acts.relu()
        indices = self._indices(positive.detach())
        return torch.zeros_like(positive).scatter(-1, indices, positive.gather(-1, indices))

    def choose(self, pre_acts: Iterable[Tensor]) -> Iterator[tuple[Pattern, Tensor]]:
        for h in pre_acts:
            positive = h.relu_()
            indices = self._indices(positive)
            yield fixed_k(indices, self.d_features), positive.gather(-1, indices).reshape(-1)

    def _indices(self, positive: Tensor) -> Tensor:
        """The k largest of each row, ties to the lowest index. [..., F] -> [..., k]"""
        extra = min(self.k + 1, self.d_features)
        values, indices = positive.topk(extra, dim=-1)
        if extra > self.k:
            # topk orders equal values as it likes; only a tie across the cut can change the choice.
            tied = (values[..., self.k - 1] == values[..., self.k]) & (values[..., self.k] > 0)
            if tied.any():
                again = positive[tied].sort(dim=-1, descending=True, stable=True).indices[..., : self.k]
                indices[tied] = torch.cat([again, indices[tied][..., self.k :]], dim=-1)
        return indices[..., : self.k]


class BatchTopK(Activation):
    """`threshold_ema` [L] follows the smallest chosen value: the threshold when a checkpoint is looked at mid-run."""

    chooses = True
    per_token = False
    ema_decay = 0.999
    """Remembers about 1,000 steps; bias-corrected, so that it is right from the first one."""

    threshold_ema: Tensor
    ema_weight: Tensor

    def __init__(self, options: ActivationOptions, n_layers: int, d_features: int) -> None:
        super().__init__(options, n_layers, d_features)
        self.k = _checked_k(options, d_features)
        self.register_buffer("threshold_ema", torch.zeros(n_layers, dtype=torch.float64))
        self.register_buffer("ema_weight", torch.zeros(n_layers, dtype=torch.float64))

    @property
    def threshold(self) -> Tensor:
        """[L], bias-corrected; 0 where nothing was chosen yet."""
        return self.threshold_ema / self.ema_weight.clamp(min=1e-30)

    def layer(self, pre_acts: Tensor, layer: int) -> Tensor:
        return self._keep(pre_acts.relu(), slice(layer, layer + 1))

    def choose(self, pre_acts: Iterable[Tensor]) -> Iterator[tuple[Pattern, Tensor]]:
        for layer, h in enumerate(pre_acts):
            positive = h.relu_()
            chosen = self._chosen(positive, slice(layer, layer + 1))
            tokens, indices = chosen // self.d_features, chosen % self.d_features
            yield from_pairs(tokens, indices, h.shape[0], self.d_features), positive.view(-1)[chosen]

    def _keep(self, positive: Tensor, layers: slice) -> Tensor:
        """`positive` with all but the chosen values set to 0."""
        mask = torch.zeros(positive.numel(), dtype=torch.bool, device=positive.device)
        mask[self._chosen(positive.detach(), layers)] = True
        return positive * mask.view_as(positive)

    @torch.no_grad()
    def _chosen(self, positive: Tensor, layers: slice) -> Tensor:
        """Positions of the chosen values in `positive` laid flat, ascending. [B, ..., F] -> int64 [nnz]"""
        n = self.k * (positive.numel() // self.d_features)
        chosen, smallest = largest(positive.reshape(-1), n, float(self.threshold[layers].min()))
        if self.training and chosen.numel():
            keep = self.ema_decay
            self.threshold_ema[layers] = keep * self.threshold_ema[layers] + (1 - keep) * smallest.double()
            self.ema_weight[layers] = keep * self.ema_weight[layers] + (1 - keep)
        return chosen


class BatchTopKAcross(BatchTopK):
    def forward(self, pre_acts: Tensor) -> Tensor:
        return self._keep(pre_acts.relu(), slice(None))

    def choose(self, pre_acts: Iterable[Tensor]) -> Iterator[tuple[Pattern, Tensor]]:
        positive = torch.stack([h.relu_() for h in pre_acts], dim=1)
        chosen = self._chosen(positive, slice(None))
        values, rows, indices = positive.view(-1)[chosen], chosen // self.d_features, chosen % self.d_features
        tokens, layers = rows // self.n_layers, rows % self.n_layers
        for layer in range(self.n_layers):
            here = (layers == layer).nonzero().squeeze(1)
            pattern = from_pairs(tokens[here], indices[here], positive.shape[0], self.d_features)
            yield pattern, values[here]

    def layer(self, pre_acts: Tensor, layer: int) -> Tensor:
        raise NotImplementedError("the rule compares layers, so that it has no form for one of them")


ACTIVATIONS: dict[str, type[Activation]] = {
    "relu": ReLU,
    "jumprelu": JumpReLU,
    "topk": TopK,
    "batchtopk": BatchTopK,
    "batchtopk_across": BatchTopKAcross,
}

USES = {
    "relu": set[str](),
    "jumprelu": {"threshold", "bandwidth", "theta_grad"},
    "topk": {"k"},
    "batchtopk": {"k"},
    "batchtopk_across": {"k"},
}
"""The options that each rule reads."""


def build(options: ActivationOptions, n_layers: int, d_features: int) -> Activation:
    """The activation named in the options. UserError for an unknown name or an option that it does not use."""
    if options.name not in ACTIVATIONS:
        raise UserError(f"activation.name={options.name} does not exist; choose one of {', '.join(ACTIVATIONS)}")
    for field in ("k", "threshold", "bandwidth", "theta_grad"):
        if getattr(options, field) is not None and field not in USES[options.name]:
            raise UserError(f"activation.{field} has no meaning for activation={options.name}; leave it out")
    return ACTIVATIONS[options.name](options, n_layers, d_features)


def _checked_k(options: ActivationOptions, d_features: int) -> int:
    if options.k is None or not 1 <= options.k <= d_features:
        raise UserError(f"activation.k={options.k} must lie between 1 and arch.d_features={d_features}")
    return options.k


def largest(flat: Tensor, n: int, guess: float) -> tuple[Tensor, Tensor]:
    """Positions of the n largest values above 0, ascending, ties to the lowest position; and the smallest of them.

    flat [N] without negative values. Exact whatever `guess` is: where at least n values exceed 0.8 of it, the n largest
    lie among those, and only they are ranked. From one step to the next the threshold hardly moves, so that the ranking
    sees a few percent of the values.
    """
    candidates = (flat > 0.8 * guess).nonzero().squeeze(1)
    if candidates.numel() < n:
        candidates = (flat > 0).nonzero().squeeze(1)
    values = flat[candidates]
    if candidates.numel() <= n:
        return candidates, values.min() if n and candidates.numel() else flat.new_zeros(())
    cut = values.topk(n, sorted=False).values.min()
    above, ties = values > cut, (values == cut).nonzero().squeeze(1)
    above[ties[: n - int(above.sum())]] = True
    return candidates[above.nonzero().squeeze(1)], cut


class _JumpReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, log_threshold: Tensor, bandwidth: float, rule: ThetaGrad) -> Tensor:
        ctx.save_for_backward(h, log_threshold)
        ctx.bandwidth, ctx.rule = bandwidth, rule
        return h * (h > log_threshold.exp())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        h, log_threshold = ctx.saved_tensors
        theta = log_threshold.exp()
        window = (h - theta).abs() < ctx.bandwidth / 2
        power = theta if ctx.rule == ThetaGrad.anthropic else theta.square()
        # Thresholds [F] were broadcast over tokens.
        per_token = (grad * window).reshape(-1, theta.shape[-1]).sum(dim=0)
        return grad * (h > theta), -per_token * power / ctx.bandwidth, None, None
