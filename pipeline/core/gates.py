"""Rules that look at one pre-activation alone.

    relu        a = max(h, 0)
    jumprelu    a = h * 1[h > theta], theta = exp(t) learned (Rajamanoharan et al. 2024, arXiv 2407.14435)

Thresholds learn through a rectangle K = 1[|h - theta| < bandwidth / 2] in place of the derivative of the step,
g = dL/da. Two published rules differ by a factor theta:

    anthropic   dL/dt     = -g theta K / bandwidth         (Anthropic, January 2025 update)
    gdm         dL/dtheta = -g theta K / bandwidth         so dL/dt = -g theta^2 K / bandwidth

The number of active features has the same kind of gradient: d 1[h > theta] / dtheta = -K / bandwidth (`active`).

In the sparse step a layer's pattern holds every pair whose g is needed: the active ones and, for jumprelu, those in the
window, active or not, which together are h > theta - bandwidth / 2. Those that are not active have the value 0. Where
the window is wide the pattern holds the active pairs alone, and g at the others in the window, `beyond`, comes from
dense products (`core/density.py`).
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pipeline.core.density import Form, Limits
from pipeline.core.options import ActivationOptions, ThetaGrad
from pipeline.core.rule import Activation
from pipeline.core.sparse import Chosen, Features, Pattern, Sparse, from_mask, of_layer
from pipeline.errors import UserError


class Pairs(NamedTuple):
    """Where a layer's features, or their gradients, are needed."""

    pattern: Pattern | None
    """None: everywhere."""
    beyond: Tensor | None = None
    """bool [B, F]: pairs in the window, not active, that are not in the pattern. None: there are none."""


class Gate(Activation):
    """A rule with several forms in training. `form` [L] says which each layer took in the last step."""

    form: Tensor

    def __init__(self, options: ActivationOptions, n_layers: int, d_features: int) -> None:
        super().__init__(options, n_layers, d_features)
        # A buffer, so that it is in checkpoints: the form of the next step depends on it.
        self.register_buffer("form", torch.full((n_layers,), Form.sparse, dtype=torch.uint8))

    def pairs(self, pre_acts: Tensor, layer: int, limits: Limits, wide: bool) -> Pairs:
        """The pairs that a step needs. In a step of training the layer's form is remembered, since it has hysteresis.

        pre_acts [B, F] without gradient; `wide` says whether the form `dense_window` can be had.
        """
        before, wide = Form(int(self.form[layer])), wide and self.windowed
        needed = pre_acts > self.lowest(layer)
        all_pairs = limits.third() if wide else limits
        form, pairs = Form.dense, Pairs(None)
        if all_pairs.hold(_share(needed), before is Form.sparse):
            form, pairs = Form.sparse, Pairs(from_mask(needed))
        elif wide:
            active, beyond = self.split(pre_acts, layer)
            if limits.hold(_share(active), before is not Form.dense):
                form, pairs = Form.dense_window, Pairs(from_mask(active), beyond)
        if self.training and torch.is_grad_enabled():
            self.form[layer] = form
        return pairs

    windowed = False
    """Whether gradients are needed at pairs that are not active."""

    def lowest(self, layer: int) -> Tensor | float:
        """What a pre-activation must exceed for its pair to be needed. [F] or a number"""
        raise NotImplementedError

    def split(self, pre_acts: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Which pairs are active, and which others are in the window. [B, F] -> bool [B, F], bool [B, F]"""
        raise NotImplementedError

    def at_pairs(self, pre_acts: Tensor, pattern: Pattern, layer: int) -> Tensor:
        """The features at the pairs of a pattern of `pairs`. [nnz] -> [nnz]"""
        raise NotImplementedError


class ReLU(Gate):
    def layer(self, pre_acts: Tensor, layer: int, norms: Tensor | None = None) -> Tensor:
        return pre_acts.relu()

    def lowest(self, layer: int) -> float:
        return 0.0

    def at_pairs(self, pre_acts: Tensor, pattern: Pattern, layer: int) -> Tensor:
        return pre_acts


class JumpReLU(Gate):
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

    def layer(self, pre_acts: Tensor, layer: int, norms: Tensor | None = None) -> Tensor:
        return _JumpReLU.apply(pre_acts, self.log_threshold[layer], self.bandwidth, self.theta_grad)

    windowed = True

    @torch.no_grad()
    def split(self, pre_acts: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        above = pre_acts - self.log_threshold[layer].exp()
        active = above > 0
        return active, (above > -self.bandwidth / 2) ^ active

    @torch.no_grad()
    def lowest(self, layer: int) -> Tensor:
        # Rounding may move the edge by an ulp of its terms: the pattern has a pair too many there, never one too few.
        theta = self.log_threshold[layer].exp()
        margin = 4 * torch.finfo(theta.dtype).eps * (theta + self.bandwidth)
        return theta - self.bandwidth / 2 - margin

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

    def sum_beyond(self, beyond: Tensor, layer: int) -> Tensor:
        """Each feature's sum over the pairs in `beyond`: 0, with the gradient for t that its values have. -> [F]"""
        return _Beyond.apply(self.log_threshold[layer], _over_tokens(beyond.float()), self.bandwidth, self.theta_grad)

    def count_beyond(self, beyond: Tensor, layer: int) -> Tensor:
        """The same for the sum of 1[h > theta]. -> [F]"""
        return _Beyond.apply(
            self.log_threshold[layer], _over_tokens(beyond.float()), self.bandwidth, ThetaGrad.anthropic
        )

    def write_beyond(
        self, y_hat: Tensor, beyond: Tensor, layer: int, tables: Mapping[int, Callable[[], Tensor]]
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
        beyond: Tensor,
        tables: Mapping[int, Callable[[], Tensor]],
        bandwidth: float,
        rule: ThetaGrad,
    ) -> Tensor:
        ctx.save_for_backward(log_threshold, beyond)
        ctx.tables, ctx.bandwidth, ctx.rule = tables, bandwidth, rule
        return y_hat.view_as(y_hat)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None, None]:
        log_threshold, beyond = ctx.saved_tensors
        g = grad.new_zeros(beyond.shape)
        for target, table in ctx.tables.items():
            g.addmm_(grad[:, target], table().T.to(grad.dtype))
        per_threshold = _over_tokens(g.mul_(beyond.to(g.dtype)))
        slope = _slope(log_threshold.exp(), ctx.bandwidth, ctx.rule)
        return grad, -per_threshold * slope, None, None, None, None


def _slope(theta: Tensor, bandwidth: float, rule: ThetaGrad) -> Tensor:
    """-da/dt of a pair in the window."""
    return (theta if rule == ThetaGrad.anthropic else theta.square()) / bandwidth


def _over_tokens(x: Tensor) -> Tensor:
    """Sums over tokens, as a product, which is several times as fast on a CPU. [B, F] -> [F]"""
    return x.new_ones(x.shape[0]) @ x


def _share(mask: Tensor) -> float:
    return int(mask.count_nonzero()) / max(1, mask.numel())
