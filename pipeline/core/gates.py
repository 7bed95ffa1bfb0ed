"""Rules that look at one pre-activation alone.

    relu        a = max(h, 0)
    jumprelu    a = h * 1[h > theta], theta = exp(t) learned (Rajamanoharan et al. 2024, arXiv 2407.14435)

Thresholds learn through a rectangle K = 1[|h - theta| < bandwidth / 2] in place of the derivative of the step,
g = dL/da. Two published rules differ by a factor theta:

    anthropic   dL/dt     = -g theta K / bandwidth         (Anthropic, January 2025 update)
    gdm         dL/dtheta = -g theta K / bandwidth         so dL/dt = -g theta^2 K / bandwidth

The number of active features has the same kind of gradient: d 1[h > theta] / dtheta = -K / bandwidth (`active`).

In the sparse step a layer's pattern holds the active pairs. Those in the window that are not active, `beyond`, write
nothing and teach the encoder nothing: all that is needed of them is the sum of g over a feature's tokens,

    sum over b of g[b, i] = sum over targets m of W[i, m] . (sum over b of dL/dy[b, m])

which takes no product a pair. Where they are many (`core/density.py`) g comes from dense products. An architecture
whose features write no row of a table has them in the pattern, with the value 0.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pipeline.core import products
from pipeline.core.density import Form, Limits
from pipeline.core.options import ActivationOptions, ThetaGrad
from pipeline.core.pattern import from_positions, positions
from pipeline.core.peers import ALONE, Peers
from pipeline.core.rule import Activation
from pipeline.core.sparse import Chosen, Features, Pattern, Sparse, of_layer
from pipeline.errors import UserError


class Pairs(NamedTuple):
    """Where a layer's features, or their gradients, are needed."""

    pattern: Pattern | None
    """None: everywhere."""
    values: Tensor | None = None
    """The pre-activations at the pattern's pairs. [nnz]"""
    beyond: Pattern | Tensor | None = None
    """Pairs in the window, not active, that are not in the pattern; where they are many as bool [B, F]. None: there
    are none."""


class Gate(Activation):
    """A rule with several forms in training. `form` [L] says which each layer took in the last step."""

    form: Tensor

    def __init__(self, options: ActivationOptions, n_layers: int, d_features: int, peers: Peers = ALONE) -> None:
        super().__init__(options, n_layers, d_features, peers)
        # A buffer, so that it is in checkpoints: the form of the next step depends on it.
        self.register_buffer("form", torch.full((n_layers,), Form.sparse, dtype=torch.uint8))

    def pairs(self, pre_acts: Tensor, layer: int, limits: Limits, wide: bool) -> Pairs:
        """The pairs that a step needs. In a step of training the layer's form is remembered, since it has hysteresis.

        pre_acts [B, F] without gradient; `wide` says whether the form `dense_window` can be had.
        """
        before = Form(int(self.form[layer]))
        if self.windowed and not wide:
            form, pairs = self._in_one(pre_acts, layer, limits, before)
        else:
            form, pairs = self._apart(pre_acts, layer, limits, before)
        if self.training and torch.is_grad_enabled():
            self.form[layer] = form
        return pairs

    def _in_one(self, pre_acts: Tensor, layer: int, limits: Limits, before: Form) -> tuple[Form, Pairs]:
        """Every pair in the pattern."""
        theta, half = self.edge(layer, pre_acts)
        needed = products.exceeds(pre_acts, products.below(theta, half))
        share = int(needed.count_nonzero()) / max(1, needed.numel())
        if not limits.hold(share, before is Form.sparse):
            return Form.dense, Pairs(None)
        where = positions(needed)
        return Form.sparse, Pairs(from_positions(where, needed.shape), pre_acts.flatten().index_select(0, where))

    def _apart(self, pre_acts: Tensor, layer: int, limits: Limits, before: Form) -> tuple[Form, Pairs]:
        """The active pairs in the pattern, those in the window beside it."""
        theta, half = self.edge(layer, pre_acts)
        n = max(1, pre_acts.numel())
        found = products.gate(pre_acts, theta, half, math.ceil(min(1.0, max(0.0, limits.above)) * n))
        if limits.hold((found.n_active + found.n_beyond) / n, before is Form.sparse) and found.active is not None:
            return Form.sparse, Pairs(found.active, found.values, found.beyond)
        if self.windowed and limits.hold(found.n_active / n, before is not Form.dense) and found.active is not None:
            above = pre_acts - theta
            return Form.dense_window, Pairs(found.active, found.values, (above > -half) ^ (above > 0))
        return Form.dense, Pairs(None)

    windowed = False
    """Whether gradients are needed at pairs that are not active."""

    def edge(self, layer: int, like: Tensor) -> tuple[Tensor, float]:
        """The thresholds [F] above which a pair is active, and how far below them one is needed; `like` pre_acts."""
        raise NotImplementedError

    def at_pairs(self, pre_acts: Tensor, pattern: Pattern, layer: int) -> Tensor:
        """The features at the pairs of a pattern of `pairs`. [nnz] -> [nnz]"""
        raise NotImplementedError


class ReLU(Gate):
    def layer(self, pre_acts: Tensor, layer: int, norms: Tensor | None = None) -> Tensor:
        return pre_acts.relu()

    def edge(self, layer: int, like: Tensor) -> tuple[Tensor, float]:
        return like.new_zeros(self.d_features), 0.0

    def at_pairs(self, pre_acts: Tensor, pattern: Pattern, layer: int) -> Tensor:
        return pre_acts


class JumpReLU(Gate):
    """log_threshold [L, F] is t."""

    def __init__(self, options: ActivationOptions, n_layers: int, d_features: int, peers: Peers = ALONE) -> None:
        super().__init__(options, n_layers, d_features, peers)
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

    def layer(self, pre_acts: Tensor, layer: int, norms: Tensor | None = None) -> Tensor:
        return _JumpReLU.apply(pre_acts, self.log_threshold[layer], self.bandwidth, self.theta_grad)

    windowed = True

    @torch.no_grad()
    def edge(self, layer: int, like: Tensor) -> tuple[Tensor, float]:
        return self.log_threshold[layer].exp(), self.bandwidth / 2

    def at_pairs(self, pre_acts: Tensor, pattern: Pattern, layer: int) -> Tensor:
        return _JumpReLU.apply(pre_acts, self._at(pattern, layer), self.bandwidth, self.theta_grad)

    def active(self, pre_acts: Features) -> Features:
        """1[h > theta], with a gradient for the thresholds alone. [B, L, F] -> [B, L, F]; or at the pairs of `pairs`,
        and in full where a layer is dense."""
        if isinstance(pre_acts, Tensor):
            return _Step.apply(pre_acts, self.log_threshold, self.bandwidth)
        values = []
        for layer in range(self.n_layers):
            one = of_layer(pre_acts, layer)
            h, t = (
                (one.values, self._at(one.pattern, layer))
                if isinstance(one, Chosen)
                else (one, self.log_threshold[layer])
            )
            values.append(_Step.apply(h, t, self.bandwidth))
        return Sparse(pre_acts.patterns, values)

    def sum_beyond(self, beyond: Pattern | Tensor, layer: int) -> Tensor:
        """Each feature's sum over the pairs in `beyond`: 0, with the gradient for t that its values have. -> [F]"""
        t = self.log_threshold[layer]
        return _Beyond.apply(t, _tokens_of_each(beyond, t), self.bandwidth, self.theta_grad)

    def count_beyond(self, beyond: Pattern | Tensor, layer: int) -> Tensor:
        """The same for the sum of 1[h > theta]. -> [F]"""
        t = self.log_threshold[layer]
        return _Beyond.apply(t, _tokens_of_each(beyond, t), self.bandwidth, ThetaGrad.anthropic)

    def write_beyond(
        self, y_hat: Tensor, beyond: Pattern | Tensor, layer: int, tables: Mapping[int, Callable[[], Tensor]]
    ) -> Tensor:
        """`y_hat` [B, L, D] as it is, with the gradient for t of what the pairs in `beyond` would write.

        tables: for each target what gives the table [F, D] that the layer writes there with.
        """
        t = self.log_threshold[layer]
        return _WriteBeyond.apply(y_hat, t, beyond, tables, self.bandwidth, self.theta_grad)

    def _at(self, pattern: Pattern, layer: int) -> Tensor:
        """t of each pair. [nnz]"""
        return self.log_threshold[layer].index_select(0, pattern.indices)


class FixedThreshold(Activation):
    """a = h * 1[h > theta] with theta [L, F] fixed: what a finished transcoder uses, whatever it was trained with."""

    threshold: Tensor

    def __init__(self, threshold: Tensor) -> None:
        super().__init__(ActivationOptions(name="threshold"), *threshold.shape)
        self.register_buffer("threshold", threshold)

    def layer(self, pre_acts: Tensor, layer: int, norms: Tensor | None = None) -> Tensor:
        return pre_acts * (pre_acts > self.threshold[layer])


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
        # Thresholds [F] were broadcast over tokens; those of single pairs were not.
        per_threshold = (grad * window).sum_to_size(theta.shape)
        return grad * (h > theta), -per_threshold * _slope(theta, ctx.bandwidth, ctx.rule), None, None


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, log_threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(h, log_threshold)
        ctx.bandwidth = bandwidth
        return (h > log_threshold.exp()).to(h.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, None]:
        h, log_threshold = ctx.saved_tensors
        theta = log_threshold.exp()
        window = (h - theta).abs() < ctx.bandwidth / 2
        return None, -(grad * window).sum_to_size(theta.shape) * theta / ctx.bandwidth, None


class _Beyond(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, log_threshold: Tensor, count: Tensor, bandwidth: float, rule: ThetaGrad) -> Tensor:
        ctx.save_for_backward(log_threshold, count)
        ctx.bandwidth, ctx.rule = bandwidth, rule
        return torch.zeros_like(log_threshold)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        log_threshold, count = ctx.saved_tensors
        return -grad * count * _slope(log_threshold.exp(), ctx.bandwidth, ctx.rule), None, None, None


class _WriteBeyond(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        y_hat: Tensor,
        log_threshold: Tensor,
        beyond: Pattern | Tensor,
        tables: Mapping[int, Callable[[], Tensor]],
        bandwidth: float,
        rule: ThetaGrad,
    ) -> Tensor:
        ctx.save_for_backward(log_threshold)
        ctx.beyond, ctx.tables, ctx.bandwidth, ctx.rule = beyond, tables, bandwidth, rule
        return y_hat.view_as(y_hat)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None, None]:
        (log_threshold,) = ctx.saved_tensors
        per_threshold = _read(ctx.beyond, grad, ctx.tables)
        slope = _slope(log_threshold.exp(), ctx.bandwidth, ctx.rule)
        return grad, -per_threshold * slope, None, None, None, None


def _read(beyond: Pattern | Tensor, grad: Tensor, tables: Mapping[int, Callable[[], Tensor]]) -> Tensor:
    """Each feature's sum of g over the pairs beyond. grad [B, L, D] -> [F]"""
    if isinstance(beyond, Pattern):
        sums = grad.new_zeros(beyond.n_features)
        for target, table in tables.items():
            products.sum_products(beyond, grad[:, target], table().to(grad.dtype), sums)
        return sums
    g = grad.new_zeros(beyond.shape)
    for target, table in tables.items():
        g.addmm_(grad[:, target], table().T.to(grad.dtype))
    return _over_tokens(g.mul_(beyond.to(g.dtype)))


def _tokens_of_each(beyond: Pattern | Tensor, like: Tensor) -> Tensor:
    """How many tokens each feature is beyond for. -> [F]"""
    if isinstance(beyond, Pattern):
        return beyond.indices.bincount(minlength=beyond.n_features).to(like.dtype)
    return _over_tokens(beyond.to(like.dtype))


def _slope(theta: Tensor, bandwidth: float, rule: ThetaGrad) -> Tensor:
    """-da/dt of a pair in the window."""
    return (theta if rule == ThetaGrad.anthropic else theta.square()) / bandwidth


def _over_tokens(x: Tensor) -> Tensor:
    """Sums over tokens, as a product, which is several times as fast on a CPU. [B, F] -> [F]"""
    return x.new_ones(x.shape[0]) @ x
