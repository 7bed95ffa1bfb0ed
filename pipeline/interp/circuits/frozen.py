"""A language model with its attention patterns and norm denominators held at those of a prompt.

What is left between the MLPs is linear (affine, with its biases) in what they write:

    attention   out = P V(x)                            P [T, T] recorded; queries and keys play no part
    norm        out = (x - mean x) / d * gain + bias    d recorded; RMSNorm: without the mean

P is what the architecture's own function gives (`eager_attention_forward`: scale, mask, window, soft cap and sinks lie
inside it, QK-norm and rotary positions before it), called through transformers' table of attention functions. A norm is
known by its values, not by its name: of the forms below the one that the module computes is taken, and a module of none
is refused.

    gates = record(lm, tokens)
    with held(lm, gates):
        lm.logits(tokens, mlp)           # any number of contexts that differ in what their MLPs write

Gradients flow through a held model as through any other. What is linear in neither sense (a gate on attention's
output, say) is not seen here: the sums of `attribution.py` show it.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pipeline.data.models import LanguageModel
from pipeline.errors import UserError

NAME = "clt_gates"
"""Under which transformers finds `_attend`."""

Attend = Callable[..., tuple[Tensor, Tensor]]

_current: ContextVar[Attend] = ContextVar("attend")


class Norm(NamedTuple):
    """What a norm computes: (x - centred mean x) / denominator * (weight + offset) + bias."""

    centred: bool
    offset: float
    """Added to the weight: 1 in Gemma, which stores gain - 1."""

    def denominator(self, module: nn.Module, x: Tensor) -> Tensor:
        """[..., D] -> [..., 1], in float32 at the least."""
        x = self._input(x)
        return (x.square().mean(dim=-1, keepdim=True) + _eps(module)).sqrt()

    def output(self, module: nn.Module, x: Tensor, denominator: Tensor) -> Tensor:
        """[..., D] -> [..., D], linear in x, in its dtype."""
        out = self._input(x) / denominator
        weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
        out = out if weight is None else out * (weight.to(out.dtype) + self.offset)
        return (out if bias is None else out + bias).to(x.dtype)

    def _input(self, x: Tensor) -> Tensor:
        x = x if x.dtype == torch.float64 else x.float()
        return x - x.mean(dim=-1, keepdim=True) if self.centred else x


FORMS = [Norm(centred, offset) for offset in (0.0, 1.0) for centred in (False, True)]


@dataclass
class Gates:
    """What is held, by the names of modules. n contexts, or one that stands for any number of copies."""

    patterns: dict[str, Tensor] = field(default_factory=dict)
    """[n, H, T, T] of each attention module."""
    norms: dict[str, tuple[Norm, Tensor]] = field(default_factory=dict)
    """Of each norm outside the MLPs, its form and its denominators [n, T, 1] (of a norm of heads, with their axis)."""

    @property
    def n_bytes(self) -> int:
        return sum(t.nbytes for t in self.patterns.values()) + sum(t.nbytes for _, t in self.norms.values())


def record(lm: LanguageModel, tokens: Tensor) -> Gates:
    """The gates of the model itself on tokens int64 [n, T]. Raises UserError as `recording` does."""
    with recording(lm) as gates:
        lm.logits(tokens)
    return gates


@contextmanager
def recording(lm: LanguageModel) -> Iterator[Gates]:
    """Whatever runs inside leaves its gates, complete when the context ends. The model computes what it always does; in
    float64 its norms do too, which some architectures compute in float32.

    Raises UserError for a model whose attention is not called through transformers' table, and for a norm of another
    form."""
    gates, names = Gates(), {module: name for name, module in lm.weights.named_modules()}

    def attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any) -> Any:
        eager = sys.modules[type(module).__module__].eager_attention_forward
        out, gates.patterns[names[module]] = eager(module, query, key, value, mask, **options)
        return out, gates.patterns[names[module]]

    def keep(module: nn.Module, inputs: tuple[Tensor], output: Tensor, name: str, norm: Norm) -> Tensor:
        denominator = norm.denominator(module, inputs[0])
        gates.norms[name] = (norm, denominator)
        return norm.output(module, inputs[0], denominator) if output.dtype == torch.float64 else output

    with ExitStack() as hooks, _attention(lm, attend):
        for name, module in norms_of(lm):
            hook = partial(keep, name=name, norm=_form(lm, module))
            hooks.enter_context(module.register_forward_hook(hook))
        yield gates
    # Tensors of inference mode cannot take part in a backward pass.
    for name, pattern in gates.patterns.items():
        gates.patterns[name] = pattern.clone() if pattern.is_inference() else pattern
    for name, (norm, denominator) in gates.norms.items():
        gates.norms[name] = (norm, denominator.clone() if denominator.is_inference() else denominator)


@contextmanager
def held(lm: LanguageModel, gates: Gates, attention: bool = True, norms: bool = True) -> Iterator[None]:
    """Whatever runs inside has these gates: attention patterns, norm denominators, or both. It is given contexts of as
    many tokens as were recorded: as many contexts, or any number where one was recorded."""
    names = {module: name for name, module in lm.weights.named_modules()}

    def attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any) -> Any:
        pattern = gates.patterns[names[module]]
        return mixed(pattern, value), pattern

    with ExitStack() as stack:
        if attention:
            stack.enter_context(_attention(lm, attend))
        for name, module in norms_of(lm) if norms else ():
            norm, denominator = gates.norms[name]
            stack.enter_context(_forward(module, partial(norm.output, module, denominator=denominator)))
        yield


def mixed(pattern: Tensor, value: Tensor) -> Tensor:
    """What each head gathers: pattern [n, H, T, S], or [1, H, T, S] for all, and value [n, G, S, d], each of whose G
    groups serves H / G heads. -> [n, T, H, d]"""
    (n, n_groups, n_from, width), (n_patterns, n_heads, n_to, _) = value.shape, pattern.shape
    if n_patterns == n > 1:
        return (pattern @ value.repeat_interleave(n_heads // n_groups, dim=1)).transpose(1, 2)
    assert n_patterns == 1
    assert pattern.shape[-1] == n_from
    # All contexts side by side: the pattern is not copied for each.
    rows = value.permute(1, 2, 0, 3).reshape(n_groups, n_from, n * width)
    out = pattern.view(n_groups, -1, n_from) @ rows
    return out.view(n_groups, n_heads // n_groups, n_to, n, width).permute(3, 2, 0, 1, 4).flatten(2, 3)


def norms_of(lm: LanguageModel) -> Iterator[tuple[str, nn.Module]]:
    """The norms outside the MLPs, by name."""
    for name, module in lm.weights.named_modules():
        if "Norm" in type(module).__name__ and not lm.is_inside_mlp(name):
            yield name, module


def _form(lm: LanguageModel, module: nn.Module) -> Norm:
    """How a norm computes, found by trying. UserError where it is another way."""
    weight = getattr(module, "weight", None)
    like = next(lm.weights.parameters()) if weight is None else weight
    width = lm.d_model if weight is None else weight.numel()
    probe = torch.linspace(-2, 3, 2 * width, device=like.device).view(2, width).sin().to(like.dtype)
    with torch.no_grad():
        own = module(probe)
        # Some compute in float32 whatever they are given.
        limit = 16 * max(torch.finfo(own.dtype).eps, torch.finfo(torch.float32).eps) * float(own.abs().max())
        for norm in FORMS:
            if float((norm.output(module, probe, norm.denominator(module, probe)) - own).abs().max()) <= limit:
                return norm
    found = f"{type(module).__name__} of {lm.architecture}"
    raise UserError(
        f"model={lm.name}: {found} is no plain LayerNorm or RMSNorm, so it cannot be held; use another model"
    )


def _eps(module: nn.Module) -> float:
    for name in ("eps", "variance_epsilon"):
        if hasattr(module, name):
            return float(getattr(module, name))
    return 0.0


@contextmanager
def _attention(lm: LanguageModel, attend: Attend) -> Iterator[None]:
    """The model with `attend` as its attention function."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, eager_mask

    weights = lm.weights
    if not weights._can_set_attn_implementation():
        why = f"{lm.architecture} computes its attention in a way of its own, so its patterns cannot be held"
        raise UserError(f"model={lm.name}: {why}; use a model of another family (GPT-2, Llama, Qwen, Gemma)")
    AttentionInterface.register(NAME, _attend)
    # Without a mask function of the same name the model would make no mask at all.
    AttentionMaskInterface.register(NAME, eager_mask)
    before, token = weights.config.get_text_config()._attn_implementation, _current.set(attend)
    try:
        weights.set_attn_implementation(NAME)
        yield
    finally:
        weights.set_attn_implementation(before)
        _current.reset(token)


def _attend(module: nn.Module, *inputs: Any, **options: Any) -> tuple[Tensor, Tensor]:
    return _current.get()(module, *inputs, **options)


@contextmanager
def _forward(module: nn.Module, forward: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """A module that computes something else; hooks on it stay as they are."""
    before = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before
