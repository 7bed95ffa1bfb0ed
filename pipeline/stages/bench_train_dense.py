"""The dense reference of `clt bench train`: the same CLT as a plain torch module, with autograd.

    h^l = x^l W_enc^l^T + b^l                 a product for each layer
    a^l = the rule's features, the others 0   top-k scattered into zeros, or h 1[h > theta]
    y_hat^m = b^m + sum over l <= m of a^l W^{l,m}                a product for each (layer, target) pair

What a step needs not compute is left out: no counters, no log. Parameters have the names of `arch/clt.py`, so that
gradients can be compared one by one. Nothing of `core/` is used: it is what is measured.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.core.options import ActivationOptions, LossOptions, PreActForm, SparsityForm, ThetaGrad
from pipeline.errors import UserError

RULES = ("topk", "batchtopk", "jumprelu", "relu")


class Dense(nn.Module):
    """Filled from `weights`, the state of a CLT: encoders.l, decoders.l.j, b_enc, b_dec, activation.log_threshold."""

    def __init__(self, weights: dict[str, Tensor], activation: ActivationOptions, loss: LossOptions) -> None:
        super().__init__()
        self.rule, self.options = activation, loss
        n_layers = weights["b_dec"].shape[0]
        self.encoders = nn.ParameterList(weights[f"encoders.{i}"].detach().clone() for i in range(n_layers))
        self.decoders = nn.ModuleList(
            nn.ParameterList(weights[f"decoders.{i}.{j}"].detach().clone() for j in range(n_layers - i))
            for i in range(n_layers)
        )
        self.b_enc = nn.Parameter(weights["b_enc"].detach().clone())
        self.b_dec = nn.Parameter(weights["b_dec"].detach().clone())
        if activation.name == "jumprelu":
            self.log_threshold = nn.Parameter(weights["activation.log_threshold"].detach().clone())

    def encode(self, x: Tensor) -> list[Tensor]:
        """x [B, L, D] -> pre-activations [B, F] of each layer"""
        pairs = zip(x.unbind(1), self.encoders, self.b_enc, strict=True)
        return [F.linear(read, weight, bias) for read, weight, bias in pairs]

    def select(self, pre_acts: list[Tensor], masks: list[Tensor] | None = None) -> list[Tensor]:
        """Features [B, F] of each layer. masks: the pairs that are active, in place of the rule's own choice."""
        features = []
        for i, h in enumerate(pre_acts):
            mask = None if masks is None else masks[i]
            if self.rule.name == "jumprelu":
                assert self.rule.bandwidth is not None
                power = 1 if self.rule.theta_grad == ThetaGrad.anthropic else 2
                features.append(_Jump.apply(h, self.log_threshold[i], self.rule.bandwidth, power, mask))
            elif mask is not None:
                features.append(h * mask)
            elif self.rule.name == "relu":
                features.append(h.relu())
            else:
                features.append(self._largest(h.relu()))
        return features

    def _largest(self, positive: Tensor) -> Tensor:
        assert self.rule.k is not None
        if self.rule.name == "topk":
            values, indices = positive.topk(self.rule.k, dim=-1)
            return torch.zeros_like(positive).scatter(-1, indices, values)
        flat = positive.flatten()
        values, indices = flat.topk(self.rule.k * positive.shape[0], sorted=False)
        return torch.zeros_like(flat).scatter(0, indices, values).view_as(positive)

    def decode(self, features: list[Tensor]) -> Tensor:
        """Features [B, F] of each layer -> y_hat [B, L, D]"""
        rows = []
        for m, bias in enumerate(self.b_dec):
            row = torch.addmm(bias, features[0], self._table(0, m))
            for source in range(1, m + 1):
                row = torch.addmm(row, features[source], self._table(source, m))
            rows.append(row)
        return torch.stack(rows, dim=1)

    def loss(self, x: Tensor, y: Tensor, penalty: float = 0.0, masks: list[Tensor] | None = None) -> Tensor:
        """x, y [B, L, D]; penalty: lambda of the sparsity term at this step -> []"""
        pre_acts = self.encode(x)
        features = self.select(pre_acts, masks)
        total = (self.decode(features) - y).square().sum()
        if self.options.sparsity > 0:
            total = total + penalty * self._sparsity(features)
        if self.options.pre_act > 0:
            total = total + self.options.pre_act * torch.stack([(-h).relu().sum() for h in pre_acts]).sum()
        return total / x.shape[0]

    def _sparsity(self, features: list[Tensor]) -> Tensor:
        parts = []
        for source, z in enumerate(features):
            tables = self.decoders[source]
            assert isinstance(tables, nn.ParameterList)
            written = z * torch.stack([table.square().sum(dim=1) for table in tables]).sum(dim=0).sqrt()
            is_l1 = self.options.sparsity_form == SparsityForm.l1
            parts.append((written if is_l1 else torch.tanh(self.options.sparsity_c * written)).sum())
        return torch.stack(parts).sum()

    def _table(self, source: int, target: int) -> Tensor:
        tables = self.decoders[source]
        assert isinstance(tables, nn.ParameterList)
        return tables[target - source]


class _Jump(torch.autograd.Function):
    """h 1[h > theta], theta = exp(t), with dL/dt = -sum over tokens of g theta^power 1[|h - theta| < w/2] / w."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, t: Tensor, width: float, power: int, mask: Tensor | None) -> Tensor:
        theta = t.exp()
        active = h > theta if mask is None else mask
        ctx.save_for_backward(h, theta, active)
        ctx.width, ctx.power = width, power
        return h * active

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        h, theta, active = ctx.saved_tensors
        near = (h - theta).abs() < ctx.width / 2
        return grad * active, -(grad * near).sum(dim=0) * theta**ctx.power / ctx.width, None, None, None


def check(activation: ActivationOptions, loss: LossOptions) -> None:
    """UserError for what the dense reference does not compute: the two sides would do different work."""
    if activation.name not in RULES:
        raise UserError(f"clt bench train has no dense {activation.name}; use one of activation={', '.join(RULES)}")
    unknown = [name for name in ("k_per_layer", "k_start", "rank") if getattr(activation, name) is not None]
    unknown = [f"activation.{name}" for name in unknown]
    terms = {"l0": 0.0, "target_l0": None, "aux_k": 0.0, "multi_topk": 0.0, "layer_weights": None}
    unknown += [f"loss.{name}" for name, off in terms.items() if getattr(loss, name) != off]
    unknown += ["loss.pre_act_form=january"] if loss.pre_act and loss.pre_act_form != PreActForm.clt else []
    unknown += [f"loss.layer_weighting={loss.layer_weighting}"] if loss.layer_weighting != "equal" else []
    unknown += ["loss.resample_every"] if loss.resample_every is not None else []
    if unknown:
        known = "loss=mse, tanh and l1"
        raise UserError(f"the dense reference has no {', '.join(unknown)}, so nothing fair to compare; use {known}")
