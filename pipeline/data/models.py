"""The base language model, frozen: what runs it, reads it and writes to it.

The model is the one that transformers makes of its Hugging Face files: same weights, same coordinates (nothing folded,
nothing centred), same attention kernel, no dropout. transformer_lens tells where things are in each architecture
(`data/model_sites.py`), so two places of every layer have names that mean the same everywhere:

    resid_mid   blocks.{l}.ln2.hook_in      the residual stream where the MLP's norm reads it (in a parallel block, as
                                            in GPT-NeoX, that is the block's input)
    mlp_out     blocks.{l}.hook_mlp_out     what the MLP adds to the residual stream (in Gemma-2, after its second norm)

Collecting runs the body of the model, without its head and without the layers above the last one that is read: for
GPT-2 small the head is a third of the forward pass.
"""

import copy
import functools
import hashlib
import inspect
import json
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from pipeline.core.normalize import MlpNorm
from pipeline.data.mlps import Mlps
from pipeline.data.model_files import check_files, fetch, weights_hash
from pipeline.data.model_loading import load_tokenizer, load_weights, resolve_device, resolve_dtype
from pipeline.data.model_sites import sites_of
from pipeline.data.options import ModelOptions
from pipeline.errors import UserError

if TYPE_CHECKING:
    from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["LanguageModel", "load", "resolve_device", "resolve_dtype"]

ReplaceMlp = Callable[[int, Tensor, Tensor], Tensor]
"""(layer, resid_mid [n, T, D], the MLP's own output [n, T, D]) -> the output that takes its place [n, T, D].
layer counts from 0 at the first layer that is read."""


class LanguageModel:
    """A frozen language model and its tokenizer. Made by `load`."""

    def __init__(
        self,
        options: ModelOptions,
        directory: Path,
        revision: str | None,
        weights: "PreTrainedModel",
        tokenizer: "PreTrainedTokenizerBase",
    ) -> None:
        config = weights.config.get_text_config()
        self.name = options.name
        self.path = options.path
        self.directory = directory
        """Where the files are; for a hub name, the snapshot in the local hub cache."""
        self.revision = revision
        """Commit on the hub; None for local directories."""
        self.architecture: str = weights.config.architectures[0]
        self.weights = weights
        self.tokenizer = tokenizer
        self.eos_token_id: int = tokenizer.eos_token_id
        self.n_base_layers: int = config.num_hidden_layers
        """Those that are not read included."""
        self.layers = layers_of(options, self.n_base_layers)
        """The layers of the base model that are read and replaced."""
        self.n_layers: int = len(self.layers)
        self.d_model: int = config.hidden_size
        self.vocab_size: int = config.vocab_size
        self.n_context: int = getattr(config, "max_position_embeddings", 2**31 - 1)
        """Positions; models without position embeddings (ALiBi) have no limit."""
        self.attention: str = weights.config._attn_implementation
        self.device = _input_device(weights)
        self.dtype = next(weights.parameters()).dtype
        self._sites = sites_of(options, weights)
        self._keeps_some_logits = "logits_to_keep" in inspect.signature(weights.forward).parameters
        self._norms = [self._module(layer, self._sites.norm) for layer in self.layers]
        self._outs = [self._module(layer, self._sites.mlp_out) for layer in self.layers]

    def __str__(self) -> str:
        """gpt2, layers 0 to 11 of width 768, float32 on cpu, sdpa attention"""
        dtype = str(self.dtype).removeprefix("torch.")
        layers = f"layers {self.layers.start} to {self.layers.stop - 1} of width {self.d_model}"
        return f"{self.name}, {layers}, {dtype} on {self.device}, {self.attention} attention"

    def check_context(self, context: int) -> None:
        """Raises UserError for contexts that are longer than the model's positions."""
        if context > self.n_context:
            limit = f"model={self.name} has {self.n_context} positions"
            raise UserError(f"dataset.context={context}: {limit}; use dataset.context={self.n_context} or less")

    @torch.inference_mode()
    def body(self, tokens: Tensor) -> None:
        """One forward pass of the layers up to the last one that is read, without the head: what `collect` costs at the
        least. tokens int64 [n, T]"""
        assert not self.weights.training
        with self._without_layers_above():
            self.weights.base_model(tokens.to(self.device), use_cache=False)

    @torch.inference_mode()
    def collect(
        self, tokens: Tensor, first: int = 0, out: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """(resid_mid, mlp_out), each [n, T - first, L, D], from tokens int64 [n, T]: positions `first` and later. `out`
        is where to put them, rounded to its dtype; None: new tensors of the model's."""
        shape = (tokens.shape[0], tokens.shape[1] - first, self.n_layers, self.d_model)
        resid_mid, mlp_out = torch.empty(2, *shape, device=self.device, dtype=self.dtype) if out is None else out
        assert resid_mid.shape == mlp_out.shape == shape

        def read(module: nn.Module, inputs: tuple[Tensor], out: Tensor) -> None:
            out.copy_(self._checked(inputs[0], tokens)[:, first:])

        def written(module: nn.Module, inputs: object, output: Tensor, out: Tensor) -> None:
            out.copy_(self._checked(output, tokens)[:, first:])

        with ExitStack() as hooks:
            for layer, (norm, mlp) in enumerate(zip(self._norms, self._outs, strict=True)):
                keep = functools.partial(read, out=resid_mid[:, :, layer])
                hooks.enter_context(norm.register_forward_pre_hook(keep))
                hooks.enter_context(mlp.register_forward_hook(functools.partial(written, out=mlp_out[:, :, layer])))
            self.body(tokens)
        return resid_mid, mlp_out

    @torch.inference_mode()
    def mlp_inputs(self, tokens: Tensor) -> Tensor:
        """What each MLP really reads, behind its norm: [n, T, L, D], from tokens int64 [n, T]. For checks: a
        transcoder's input is computed from resid_mid by `mlp_norm`."""
        found: list[Tensor] = []

        def keep(module: nn.Module, inputs: object, output: Tensor) -> None:
            found.append(output.to(self.device))

        with ExitStack() as hooks:
            for norm in self._norms:
                hooks.enter_context(norm.register_forward_hook(keep))
            self.body(tokens)
        return torch.stack(found, dim=2)

    @torch.inference_mode()
    def logits(
        self,
        tokens: Tensor,
        mlp: ReplaceMlp | None = None,
        past: "DynamicCache | None" = None,
        own_at_0: Collection[int] = (),
        last: bool = False,
    ) -> Tensor:
        """Logits [n, T, V] for tokens int64 [n, T]. `mlp`, if given, replaces the output of every MLP that is read, in
        the order of the layers: each sees the residual stream as the replacements before it left it. `past` holds the
        keys and values of the tokens that come before these (`new_past`), and those of these afterwards. own_at_0:
        the layers where `mlp` reads no more of an MLP's own output than [:, :1], position 0, so that these MLPs need
        not run on the others where this can be had; what it is given has that position at least. last: only the last
        position's logits, [n, 1, V]."""
        assert not self.weights.training
        resid: dict[int, Tensor] = {}

        def read(module: nn.Module, inputs: tuple[Tensor], layer: int) -> None:
            resid[layer] = inputs[0]

        def write(module: nn.Module, inputs: object, output: Tensor, layer: int) -> Tensor:
            assert mlp is not None
            return mlp(layer, resid.pop(layer), output)

        def shorten(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return (inputs[0][:, :1], *inputs[1:])

        with ExitStack() as hooks:
            for layer in range(self.n_layers) if mlp is not None else ():
                hooks.enter_context(self._norms[layer].register_forward_pre_hook(functools.partial(read, layer=layer)))
                hooks.enter_context(self._outs[layer].register_forward_hook(functools.partial(write, layer=layer)))
                if layer in own_at_0 and self._sites.mlp is not None:
                    inside = self._module(self.layers[layer], self._sites.mlp)
                    hooks.enter_context(inside.register_forward_pre_hook(shorten))
            only = {"logits_to_keep": 1} if last and self._keeps_some_logits else {}
            out = self.weights(tokens.to(self.device), past_key_values=past, use_cache=past is not None, **only)
        logits: Tensor = out.logits
        return logits[:, -1:] if last else logits

    def new_past(self) -> "DynamicCache":
        """What `logits` keeps of tokens that it has seen, so that the next ones cost no more than themselves: empty."""
        from transformers import DynamicCache

        return DynamicCache(config=self.weights.config.get_text_config())

    @property
    def end_tokens(self) -> frozenset[int]:
        """Tokens at which a text ends: the tokenizer's end-of-text token and those of the model's generation_config."""
        named = getattr(self.weights.generation_config, "eos_token_id", None)
        listed = named if isinstance(named, list) else [] if named is None else [named]
        return frozenset({self.eos_token_id, *listed})

    def mlp_norm(self, dtype: torch.dtype = torch.float32) -> MlpNorm:
        """The norm in front of each MLP that is read, in float32 (or float64) on the CPU, with weights as this model
        rounds them.

        Its formula is checked against the module itself, so that an architecture with another kind of norm is refused
        (UserError) rather than misread.
        """
        modules = [_float_copy(norm).to(dtype) for norm in self._norms]
        zeros, ones = torch.zeros(self.d_model, dtype=dtype), torch.ones(self.d_model, dtype=dtype)
        weights, biases = ([getattr(module, name, None) for module in modules] for name in ("weight", "bias"))
        gain = torch.stack([ones if w is None else w.detach() + self._sites.gain_offset for w in weights])
        bias = torch.stack([zeros if b is None else b.detach() for b in biases])
        norm = MlpNorm("rms" if self._sites.is_rms else "layer", gain, bias, _eps(modules[0]))
        probe = torch.linspace(-2, 3, 2 * self.d_model, dtype=dtype).view(2, self.d_model).sin()
        for layer, module in enumerate(modules):
            with torch.no_grad():
                if not torch.allclose(norm.layer(probe, layer), module(probe), rtol=1e-4, atol=1e-5):
                    found = f"{type(module).__name__} of {self.architecture}"
                    raise UserError(f"model={self.name}: {found} is no plain LayerNorm or RMSNorm; use another model")
        return norm

    def read_out(self, direction: Tensor) -> Tensor:
        """What directions of the residual stream [n, D] add to the logits, [n, V] in float32: through the gain of the
        final norm, in front of which a LayerNorm takes the mean off, and the unembedding. The norm's denominator, which
        depends on the rest of the stream, its bias, and a soft cap of the logits are left out."""
        norm = _float_copy(self.weights.get_submodule(self._sites.final_norm))
        weight = getattr(norm, "weight", None)
        gain = torch.ones(self.d_model) if weight is None else weight.detach() + self._sites.gain_offset
        direction = direction.float().cpu()
        if not self._sites.is_rms:
            direction = direction - direction.mean(dim=-1, keepdim=True)
        unembedding = self.weights.get_output_embeddings().weight.detach()
        return ((direction * gain).to(unembedding.device) @ unembedding.float().T).cpu()

    def mlps(self) -> Mlps:
        """The norm and the MLP of each layer that is read (in Gemma-2 the norm behind it too): this model's own
        modules, on its device, so that their arithmetic is its own. Raises UserError where an MLP is no module."""
        names = [self._sites.norm, self._sites.mlp, self._sites.mlp_out]
        if self._sites.mlp is None:
            raise UserError(
                f"model={self.name}: the MLP of {self.architecture} is no module that can be run alone; "
                "use cache.targets=stored"
            )
        if f"{self._sites.mlp_out}.".startswith(f"{self._sites.mlp}."):
            names.pop()  # the MLP's own output is what is added
        layers = [[self._module(layer, name) for name in names if name is not None] for layer in self.layers]
        return Mlps(layers, self.d_model, self.dtype, self.device, f"model={self.name}")

    def modules(self, base_layer: int) -> tuple[nn.Module, nn.Module, nn.Module | None]:
        """Of a layer of the base model, read or not: the norm whose input is resid_mid, the module whose output is
        mlp_out, and the MLP, where it is a module."""
        mlp = None if self._sites.mlp is None else self._module(base_layer, self._sites.mlp)
        return self._module(base_layer, self._sites.norm), self._module(base_layer, self._sites.mlp_out), mlp

    def layer_of(self, name: str) -> int | None:
        """The layer of the base model that a module or parameter of this name (as in `named_modules`) is in."""
        prefix = f"{self._sites.blocks}."
        return int(name.removeprefix(prefix).partition(".")[0]) if name.startswith(prefix) else None

    def is_inside_mlp(self, name: str) -> bool:
        """Whether a module of this name is an MLP of the base model or a part of one."""
        layer = self.layer_of(name)
        return layer is not None and f"{name}.".startswith(f"{self._sites.blocks}.{layer}.{self._sites.mlp}.")

    def weights_hash(self) -> str:
        """sha256 of the weights as they are stored, whatever dtype and device they were loaded to."""
        return weights_hash(self.directory)

    def tokenizer_hash(self) -> str:
        """sha256 of the vocabulary and, for the usual (fast) tokenizers, of all their rules."""
        tokenizer = self.tokenizer
        fast = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else ""
        vocab = json.dumps(tokenizer.get_vocab(), sort_keys=True)
        special = f"{tokenizer.bos_token_id} {tokenizer.eos_token_id}"
        return hashlib.sha256(f"{vocab}\n{fast}\n{special}".encode()).hexdigest()

    def _checked(self, value: object, tokens: Tensor) -> Tensor:
        """What a hook is given, which must be [n, T, D]. Raises UserError for an architecture that hands on more."""
        shape = (*tokens.shape, self.d_model)
        if isinstance(value, Tensor) and value.shape == shape:
            return value
        found = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise UserError(
            f"model={self.name}: an MLP of {self.architecture} handles {found}, not {shape}; use another model"
        )

    def _module(self, layer: int, name: str) -> nn.Module:
        return self.weights.get_submodule(f"{self._sites.blocks}.{layer}.{name}")

    @contextmanager
    def _without_layers_above(self) -> Iterator[None]:
        """The body as a model of so many layers: its list of blocks ends with the last one that is read."""
        parent, _, name = self._sites.blocks.rpartition(".")
        owner = self.weights.get_submodule(parent)
        blocks = getattr(owner, name)
        if self.layers.stop < len(blocks):
            setattr(owner, name, blocks[: self.layers.stop])
        try:
            yield
        finally:
            setattr(owner, name, blocks)


def load(options: ModelOptions) -> LanguageModel:
    """The language model that the options name. Raises UserError for a device that is not there, a path that is neither
    a directory in Hugging Face format nor a model that the hub (or its local cache) gives, and an architecture in
    which the two sites cannot be read."""
    device = resolve_device(options.device)
    dtype = resolve_dtype(options.dtype, device)
    directory, revision = fetch(options)
    check_files(options, directory)
    tokenizer = load_tokenizer(options, directory)
    weights = load_weights(options, directory, dtype, device)
    assert not any(module.training for module in weights.modules())
    model = LanguageModel(options, directory, revision, weights, tokenizer)
    if len(tokenizer) > model.vocab_size:
        sizes = f"the tokenizer has {len(tokenizer)} tokens, the model {model.vocab_size}"
        raise UserError(f"model.path={options.path}: {sizes}; they do not belong together, restore the right tokenizer")
    model.mlp_norm()  # refuses here what could not be used later, as the next line does
    model.collect(torch.zeros(1, 2, dtype=torch.int64))
    return model


def layers_of(options: ModelOptions, n_layers: int) -> range:
    """The layers that `model.layers` names, all of them when it is null. Raises UserError for anything but
    [first, stop] within the model."""
    if options.layers is None:
        return range(n_layers)
    match options.layers:
        case [int(first), int(stop)] if 0 <= first < stop <= n_layers:
            return range(first, stop)
    asked = "[" + ",".join(map(str, options.layers)) + "]"
    fix = f"give [first,stop] with 0 <= first < stop <= {n_layers}: [0,{n_layers}] is all of them"
    raise UserError(f"model.layers={asked}: {options.name} has {n_layers} layers, counted from 0; {fix}")


def _input_device(weights: "PreTrainedModel") -> torch.device:
    """Where tokens go: with a device map, accelerate moves what is computed from there on."""
    places = list(getattr(weights, "hf_device_map", {}).values())
    if not places:
        return next(weights.parameters()).device
    computes = [place for place in places if str(place) not in ("cpu", "disk")]  # what lies there runs on the first GPU
    return torch.device(computes[0] if computes else "cpu")


def _float_copy(norm: nn.Module) -> nn.Module:
    """A copy in float32 on the CPU, of a module that may lie on another device, or on disk."""
    if not hasattr(norm, "_hf_hook"):
        return copy.deepcopy(norm).float().cpu()
    from accelerate.hooks import remove_hook_from_module
    from accelerate.utils import align_module_device

    with align_module_device(norm, torch.device("cpu")):
        return remove_hook_from_module(copy.deepcopy(norm)).float()


def _eps(norm: nn.Module) -> float:
    """LayerNorm and Gemma call it eps, Llama and Qwen variance_epsilon."""
    return float(norm.eps if hasattr(norm, "eps") else norm.variance_epsilon)  # type: ignore[arg-type]
