"""One prompt in a model whose gates are held: what was recorded of it, and its linear maps.

With attention patterns and norm denominators held (`frozen.py`) and every MLP's output a source, what a
transcoder reads and what the unembedding reads are linear in the sources: the MLPs' outputs, the embeddings and the
biases. A skip path of the transcoder stays linear in what it reads.

    backwards   a row v of a target, put in where the target reads, gives g = v . d(read) / d(source) at every source
    forwards    all biases that belong to one layer, and nothing else, give what they add to every target

Backwards there is one forward pass of n copies of the prompt, whose graph serves every batch of n targets. It keeps no
activations: products with fixed weights, patterns and denominators need none.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from pipeline.arch.options import Site
from pipeline.data.models import LanguageModel
from pipeline.interp.circuits import frozen
from pipeline.interp.circuits.frozen import Gates
from pipeline.interp.replacement import ReplacementModel


class Recorded(NamedTuple):
    """A prompt of T tokens in the model itself. Layers are the base model's, A of them; L are read."""

    tokens: Tensor
    """int64 [1, T]"""
    gates: Gates
    embedding: Tensor
    """[T, D], what the embedding of tokens puts out, Gemma's factor included."""
    positions: list[Tensor]
    """The same of each embedding of positions: none, or one."""
    x: list[Tensor]
    """What the transcoder reads: L times [T, D]."""
    mlp_out: list[Tensor]
    """A times [T, D]"""
    head: Tensor
    """[V], what the unembedding puts out at the last position: before a soft cap."""
    logits: Tensor
    """[V], the model's own."""


class Gradients(NamedTuple):
    """Of n targets by their sources; None where no target depends on it."""

    mlp_out: list[Tensor | None]
    """A times [n, T, D]"""
    embedding: Tensor | None
    positions: list[Tensor | None]


@torch.no_grad()
def recorded(model: ReplacementModel, tokens: Tensor) -> Recorded:
    """tokens int64 [1, T]. Raises UserError as `frozen.recording` does."""
    lm = model.lm
    tokens = tokens.to(lm.device)
    seen: dict[Any, Tensor] = {}

    def keep(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor, key: Any) -> None:
        seen[key] = output

    def keep_input(module: nn.Module, inputs: tuple[Tensor, ...], key: Any) -> None:
        seen[key] = inputs[0]

    with frozen.recording(lm) as gates, ExitStack() as hooks:
        # Behind those of the recording: in float64 these change what a norm puts out.
        for layer in range(lm.n_base_layers):
            norm, out, _ = lm.modules(layer)
            hooks.enter_context(norm.register_forward_pre_hook(partial(keep_input, key=("mid", layer))))
            hooks.enter_context(norm.register_forward_hook(partial(keep, key=("in", layer))))
            hooks.enter_context(out.register_forward_hook(partial(keep, key=("out", layer))))
        embeddings = [lm.weights.get_input_embeddings(), *_position_embeddings(lm)]
        for i, module in enumerate([*embeddings, lm.weights.get_output_embeddings()]):
            hooks.enter_context(module.register_forward_hook(partial(keep, key=i)))
        logits = lm.weights(tokens, use_cache=False).logits
    read = "in" if model.site == Site.mlp_in else "mid"
    n_tokens, n = tokens.shape[1], len(embeddings)
    return Recorded(
        tokens,
        gates,
        seen[0][0],
        [seen[i].view(n_tokens, -1) for i in range(1, n)],
        [seen[read, layer][0] for layer in lm.layers],
        [seen["out", layer][0] for layer in range(lm.n_base_layers)],
        seen[n][0, -1],
        logits[0, -1],
    )


class Backward:
    """n copies of the prompt, ready for any number of batches of up to n targets. A context manager."""

    def __init__(self, model: ReplacementModel, prompt: Recorded, n: int) -> None:
        self.model, self.prompt, self.n = model, prompt, n

    def __enter__(self) -> "Backward":
        prompt, lm = self.prompt, self.model.lm
        with ExitStack() as stack:
            stack.enter_context(torch.enable_grad())
            stack.enter_context(_without_gradients(lm.weights))
            own = [self._own(layer) for layer in range(lm.n_base_layers)]
            self.mlp_out = [self._leaf(value) for value in own]
            self.embedding, *self.positions = (self._leaf(v) for v in (prompt.embedding, *prompt.positions))
            # Each of the prompt's own numbers and for each copy the gradient of its own: the view takes no memory.
            tokens = prompt.tokens.expand(self.n, -1)
            sources = _sources(self.model, self.mlp_out, [self.embedding, *self.positions])
            with sources as self.reads, frozen.held(lm, prompt.gates):
                self.last: Tensor = lm.weights.base_model(tokens, use_cache=False)[0]
        return self

    def __exit__(self, *args: object) -> None:
        del self.last, self.reads, self.mlp_out, self.embedding, self.positions

    def gradients(self, layer: Sequence[int], position: Tensor, rows: Tensor) -> Gradients:
        """Of m <= n targets: rows [m, D], each put in at a position [m] where the transcoder reads its layer, or with
        layer L where the unembedding reads."""
        at = torch.tensor(layer, device=rows.device)
        outputs, grads = [], []
        for l, read in enumerate([*self.reads, self.last]):
            here = (at == l).nonzero().squeeze(1)
            if len(here):
                grad = torch.zeros_like(read)
                grad[here, position[here]] = rows[here]
                outputs.append(read)
                grads.append(grad)
        leaves = [*self.mlp_out, self.embedding, *self.positions]
        found = torch.autograd.grad(outputs, leaves, grads, retain_graph=True, allow_unused=True)
        cut: list[Tensor | None] = [None if g is None else g[: len(layer)] for g in found]
        n = len(self.mlp_out)
        return Gradients(cut[:n], cut[n], cut[n + 1 :])

    def _own(self, layer: int) -> Tensor:
        """What a layer's MLP writes beside the skip path. [T, D]"""
        read = layer - self.model.lm.layers.start
        if layer not in self.model.lm.layers or self.model.transcoder.W_skip is None:
            return self.prompt.mlp_out[layer]
        return self.prompt.mlp_out[layer] - _skipped(self.model, read, self.prompt.x[read][None])[0]

    def _leaf(self, value: Tensor) -> Tensor:
        return value.expand(self.n, *value.shape).detach().requires_grad_()


@torch.no_grad()
def of_biases(model: ReplacementModel, prompt: Recorded) -> Iterator[tuple[int, list[Tensor], Tensor]]:
    """For each layer of origin, what its biases alone put where the transcoder reads (L times [T, D]) and where the
    unembedding reads ([T, D]): those of the model's body and b_dec. Origins are counted from the first layer that is
    read; behind the last layer comes the final norm."""
    lm, first, body = model.lm, model.lm.layers.start, model.lm.weights.base_model
    n_tokens = prompt.tokens.shape[1]
    of = _origins(lm)
    zeros = {name: torch.zeros_like(body.get_parameter(name)) for name in of}
    embeddings = [torch.zeros_like(value)[None] for value in (prompt.embedding, *prompt.positions)]
    written = prompt.embedding.new_zeros(lm.n_base_layers, 1, n_tokens, lm.d_model)
    with _sources(model, written.unbind(0), embeddings) as reads, frozen.held(lm, prompt.gates):
        for origin in range(lm.n_base_layers + 1):
            mine = {name: body.get_parameter(name) for name in of if of[name] == origin}
            written.zero_()
            if origin in lm.layers:
                written[origin, :, 1:] = model.transcoder.b_dec[origin - first]
            reads.clear()
            last = functional_call(body, zeros | mine, (prompt.tokens,), {"use_cache": False})[0]
            yield origin - first, [read[0] for read in reads], last[0]


def _origins(lm: LanguageModel) -> dict[str, int]:
    """The biases of the model's body by their names there: the layer that each belongs to, the number of layers for
    what lies behind them, 0 for the embeddings. Those of MLPs reach nothing, since what MLPs put out is replaced."""
    prefix = f"{lm.weights.base_model_prefix}."
    of = {}
    for name, parameter in lm.weights.named_parameters():
        if name.startswith(prefix) and name.endswith("bias") and parameter.dim() == 1:
            layer, behind = lm.layer_of(name), 0 if "emb" in name else lm.n_base_layers
            of[name.removeprefix(prefix)] = behind if layer is None else layer
    return of


@contextmanager
def _sources(
    model: ReplacementModel, mlp_out: Sequence[Tensor], embeddings: Sequence[Tensor]
) -> Iterator[list[Tensor]]:
    """The model with these in place of what its MLPs (A times [n, T, D]) and embeddings put out; a skip path is added.
    What the transcoder reads at each layer comes into the list: [n, T, D]."""
    lm = model.lm
    reads: list[Tensor] = []

    def put(module: nn.Module, inputs: object, output: Tensor, value: Tensor) -> Tensor:
        return value

    def read(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        reads.append(output if model.site == Site.mlp_in else inputs[0])

    def write(module: nn.Module, inputs: object, output: Tensor, layer: int) -> Tensor:
        at = layer - lm.layers.start
        if layer not in lm.layers or model.transcoder.W_skip is None:
            return mlp_out[layer]
        return mlp_out[layer] + _skipped(model, at, reads[at])

    def little(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (inputs[0][:1, :1].detach(), *inputs[1:])  # what the MLP makes of it is thrown away

    with ExitStack() as hooks:
        for layer in range(lm.n_base_layers):
            norm, out, mlp = lm.modules(layer)
            if layer in lm.layers:
                hooks.enter_context(norm.register_forward_hook(read))
            if mlp is not None:
                hooks.enter_context(mlp.register_forward_pre_hook(little))
            hooks.enter_context(out.register_forward_hook(partial(write, layer=layer)))
        modules = [lm.weights.get_input_embeddings(), *_position_embeddings(lm)]
        for module, value in zip(modules, embeddings, strict=True):
            hooks.enter_context(module.register_forward_hook(partial(put, value=value)))
        yield reads


def _skipped(model: ReplacementModel, layer: int, x: Tensor) -> Tensor:
    """What the skip path of a layer adds, nothing at position 0. [n, T, D] -> [n, T, D]"""
    W_skip = model.transcoder.W_skip
    assert W_skip is not None
    added = nn.functional.linear(x[:, 1:], W_skip[layer])
    return nn.functional.pad(added, (0, 0, 1, 0))


def _position_embeddings(lm: LanguageModel) -> list[nn.Module]:
    tokens = lm.weights.get_input_embeddings()
    return [m for m in lm.weights.base_model.modules() if isinstance(m, nn.Embedding) and m is not tokens]


@contextmanager
def _without_gradients(weights: nn.Module) -> Iterator[None]:
    """Parameters that ask for no gradient, for which activations would be kept."""
    asked = [parameter for parameter in weights.parameters() if parameter.requires_grad]
    for parameter in asked:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in asked:
            parameter.requires_grad_()
