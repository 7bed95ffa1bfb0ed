"""The base language model, frozen: the only file that loads one, and the only one that imports transformer_lens.

The model keeps the weights and the coordinates of its Hugging Face files (nothing folded, nothing centred), runs
without dropout, and is read at two places of every layer, by names that mean the same in every architecture:

    resid_mid   blocks.{l}.ln2.hook_in     the residual stream where the MLP's norm reads it (in a parallel block, as in
                                           GPT-NeoX, that is the block's input)
    mlp_out     blocks.{l}.hook_mlp_out    what the MLP adds to the residual stream (in Gemma-2, after its second norm)

Collecting calls the body of the model, not its head: for GPT-2 small the head is a third of the forward pass.
"""

import copy
import functools
import hashlib
import json
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from pipeline.core.normalize import MlpNorm
from pipeline.data.model_files import check_files, fetch, source_identity, weights_hash
from pipeline.data.options import Dtype, ModelOptions
from pipeline.errors import UserError

if TYPE_CHECKING:
    from transformer_lens import TransformerBridge
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["LanguageModel", "load", "resolve_device", "resolve_dtype", "source_identity"]

ReplaceMlp = Callable[[int, Tensor, Tensor], Tensor]
"""(layer, resid_mid [n, T, D], the MLP's own output [n, T, D]) -> the output that takes its place [n, T, D]"""


class LanguageModel:
    """A frozen language model and its tokenizer. Made by `load`."""

    def __init__(
        self,
        options: ModelOptions,
        directory: Path,
        revision: str | None,
        bridge: "TransformerBridge",
        tokenizer: "PreTrainedTokenizerBase",
    ) -> None:
        config = bridge.original_model.config
        self.name = options.name
        self.path = options.path
        self.directory = directory
        """Where the files are; for a hub name, the snapshot in the local hub cache."""
        self.revision = revision
        """Commit on the hub; None for local directories."""
        self.architecture: str = config.architectures[0]
        self.bridge = bridge
        self.tokenizer = tokenizer
        self.bos_token_id: int | None = tokenizer.bos_token_id
        self.eos_token_id: int = tokenizer.eos_token_id
        self.n_layers: int = bridge.cfg.n_layers
        self.d_model: int = bridge.cfg.d_model
        self.vocab_size: int = config.vocab_size
        self.n_context: int = getattr(config, "max_position_embeddings", 2**31 - 1)
        """Positions; models without position embeddings (ALiBi) have no limit."""
        parameter = next(bridge.original_model.parameters())
        self.device = parameter.device
        self.dtype = parameter.dtype

    def check_context(self, context: int) -> None:
        """Raises UserError for contexts that are longer than the model's positions."""
        if context > self.n_context:
            limit = f"model={self.name} has {self.n_context} positions"
            raise UserError(f"dataset.context={context}: {limit}; use dataset.context={self.n_context} or less")

    @torch.inference_mode()
    def collect(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """(resid_mid, mlp_out), each [n, T, L, D] in the model's dtype, from tokens int64 [n, T]."""
        assert not self.bridge.original_model.training
        tokens = tokens.to(self.device)
        shape = (*tokens.shape, self.n_layers, self.d_model)
        resid_mid, mlp_out = (torch.empty(shape, device=self.device, dtype=self.dtype) for _ in range(2))

        def keep(value: Tensor, hook: object, out: Tensor, layer: int) -> None:
            out[:, :, layer] = value

        hooks = []
        for layer, (site_in, site_out) in enumerate(self._sites()):
            hooks.append((site_in, functools.partial(keep, out=resid_mid, layer=layer)))
            hooks.append((site_out, functools.partial(keep, out=mlp_out, layer=layer)))
        with self.bridge.hooks(fwd_hooks=hooks):
            self.bridge.original_model.base_model(tokens, use_cache=False)
        return resid_mid, mlp_out

    @torch.inference_mode()
    def logits(self, tokens: Tensor, mlp: ReplaceMlp | None = None) -> Tensor:
        """Logits [n, T, V] for tokens int64 [n, T]. `mlp`, if given, replaces the output of every MLP, in the order of
        the layers: each sees the residual stream as the replacements before it left it."""
        assert not self.bridge.original_model.training
        resid: dict[int, Tensor] = {}

        def read(value: Tensor, hook: object, layer: int) -> None:
            resid[layer] = value

        def write(value: Tensor, hook: object, layer: int) -> Tensor:
            assert mlp is not None
            return mlp(layer, resid.pop(layer), value)

        hooks: list[tuple[str, Callable[..., Tensor | None]]] = []
        for layer, (site_in, site_out) in enumerate(self._sites() if mlp is not None else []):
            hooks.append((site_in, functools.partial(read, layer=layer)))
            hooks.append((site_out, functools.partial(write, layer=layer)))
        with self.bridge.hooks(fwd_hooks=hooks):
            logits: Tensor = self.bridge.original_model(tokens.to(self.device), use_cache=False).logits
        return logits

    def mlp_norm(self) -> MlpNorm:
        """The norm in front of each MLP, in float32 on the CPU, with the weights as this model rounds them.

        Its formula is checked against the module itself, so that an architecture with another kind of norm is refused
        (UserError) rather than misread.
        """
        norms = [self.bridge.blocks[layer].ln2 for layer in range(self.n_layers)]
        modules = [copy.deepcopy(norm.original_component).float().cpu() for norm in norms]
        offsets = [float(norm.uses_weight_offset) for norm in norms]
        kind, eps = "rms" if norms[0].uses_rms_norm else "layer", _eps(modules[0])
        gain = torch.stack([m.weight.detach() + offset for m, offset in zip(modules, offsets, strict=True)])
        biases = [getattr(m, "bias", None) for m in modules]
        bias = torch.stack([torch.zeros(self.d_model) if b is None else b.detach() for b in biases])
        norm = MlpNorm(kind, gain, bias, eps)
        probe = torch.linspace(-2, 3, 2 * self.d_model).view(2, self.d_model).sin()
        for layer, module in enumerate(modules):
            with torch.no_grad():
                if not torch.allclose(norm.layer(probe, layer), module(probe), rtol=1e-4, atol=1e-5):
                    found = f"{type(module).__name__} of {self.architecture}"
                    raise UserError(f"model={self.name}: {found} is no plain LayerNorm or RMSNorm; use another model")
        return norm

    def weights_hash(self) -> str:
        """sha256 of the weights as they are stored, whatever dtype and device they were loaded to."""
        return weights_hash(self.directory)

    def tokenizer_hash(self) -> str:
        """sha256 of the vocabulary and, for the usual (fast) tokenizers, of all their rules."""
        fast = self.tokenizer.backend_tokenizer.to_str() if self.tokenizer.is_fast else ""
        vocab = json.dumps(self.tokenizer.get_vocab(), sort_keys=True)
        return hashlib.sha256(f"{vocab}\n{fast}\n{self.bos_token_id} {self.eos_token_id}".encode()).hexdigest()

    def _sites(self) -> list[tuple[str, str]]:
        return [(f"blocks.{layer}.ln2.hook_in", f"blocks.{layer}.hook_mlp_out") for layer in range(self.n_layers)]


def load(options: ModelOptions) -> LanguageModel:
    """The language model that the options name. Raises UserError for a device that is not there, a path that is neither
    a directory in Hugging Face format nor a model that the hub (or its local cache) gives, and an architecture in
    which the two sites cannot be read."""
    device = resolve_device(options.device)
    dtype = resolve_dtype(options.dtype, device)
    directory, revision = fetch(options)
    check_files(options, directory)
    with _quiet():
        tokenizer = _load_tokenizer(options, directory)
        weights = _load_weights(options, directory, dtype)
        bridge = _wrap(options, directory, weights.to(device), tokenizer)
    model = LanguageModel(options, directory, revision, bridge, tokenizer)
    if len(tokenizer) > model.vocab_size:
        sizes = f"the tokenizer has {len(tokenizer)} tokens, the model {model.vocab_size}"
        raise UserError(f"model.path={options.path}: {sizes}; they do not belong together, restore the right tokenizer")
    model.mlp_norm()  # refuses here what could not be used later
    return model


def resolve_device(device: str) -> torch.device:
    """auto is the first CUDA device, else the CPU. Raises UserError for a device that this machine does not have."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    match = re.fullmatch(r"(cpu|mps|cuda)(?::(\d+))?", device)
    if match is None:
        raise UserError(f"device '{device}' is unknown; use auto, cpu, cuda, cuda:N or mps")
    n_found = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}[match[1]]
    if int(match[2] or 0) >= n_found:
        raise UserError(
            f"device '{device}' is not there: this machine has {n_found} {match[1]} devices; use auto or cpu"
        )
    return torch.device(device)


def resolve_dtype(dtype: Dtype, device: torch.device) -> torch.dtype:
    """auto is bfloat16 on CUDA and float32 elsewhere."""
    if dtype is Dtype.auto:
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return {Dtype.float32: torch.float32, Dtype.bfloat16: torch.bfloat16}[dtype]


def _load_tokenizer(options: ModelOptions, directory: Path) -> "PreTrainedTokenizerBase":
    from transformers import AutoTokenizer

    tokenizer = None
    if any((directory / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")):
        with _as_user_error(options, "tokenizer"):
            tokenizer = AutoTokenizer.from_pretrained(directory)
    if tokenizer is None:
        raise UserError(f"model.path={options.path}: no tokenizer in {directory}; put its tokenizer.json there")
    if tokenizer.eos_token_id is None:
        fix = "name its eos_token in tokenizer_config.json"
        raise UserError(f"model.path={options.path}: the tokenizer has no end-of-text token; {fix}")
    return tokenizer


def _load_weights(options: ModelOptions, directory: Path, dtype: torch.dtype) -> "PreTrainedModel":
    from transformers import AutoConfig, AutoModelForCausalLM

    with _as_user_error(options, "configuration"):
        config = AutoConfig.from_pretrained(directory)
    architecture = (config.architectures or ["nothing"])[0]
    if not architecture.endswith(("ForCausalLM", "LMHeadModel")):
        raise UserError(f"model.path={options.path}: {architecture} is no causal language model; use another model")
    with _as_user_error(options, "weights"):
        weights, info = AutoModelForCausalLM.from_pretrained(
            directory, config=config, dtype=dtype, attn_implementation="eager", output_loading_info=True
        )
    if info["missing_keys"]:  # transformers would make them up at random
        missing = f"{len(info['missing_keys'])} tensors are missing, {sorted(info['missing_keys'])[0]} for one"
        raise UserError(f"model.path={options.path}: {missing}; download or save the model again")
    return weights.eval()


def _wrap(
    options: ModelOptions, directory: Path, weights: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase"
) -> "TransformerBridge":
    """Hooks around the weights, which stay as they are. The tokenizer is copied: the bridge adds tokens to it."""
    from transformer_lens import TransformerBridge

    with _as_user_error(options, "architecture"):
        bridge = TransformerBridge.boot_transformers(
            str(directory),
            hf_model=weights,
            tokenizer=copy.deepcopy(tokenizer),
            device=weights.device,
            dtype=weights.dtype,
        )
    bridge.eval()
    assert not any(module.training for module in bridge.original_model.modules())
    if not {"blocks.0.ln2.hook_in", "blocks.0.hook_mlp_out"} <= set(bridge.hook_dict):
        why = f"{weights.config.architectures[0]} has no norm of its own in front of the MLP to read the residual at"
        raise UserError(f"model.path={options.path}: {why}; use a model of another family (GPT-2, Llama, Qwen, Gemma)")
    return bridge


@contextmanager
def _as_user_error(options: ModelOptions, what: str) -> Iterator[None]:
    """What transformers raises for files it cannot use, as one line."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"model.path={options.path}: cannot use its {what} ({reason}); check the files") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the progress bars and warnings of a load (attention kernels, generation flags), on which a user of this
    program cannot act."""
    from transformers.utils import logging as hf_logging

    verbosity, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        hf_logging.set_verbosity(verbosity)
        if bars:
            hf_logging.enable_progress_bar()


def _eps(norm: nn.Module) -> float:
    """LayerNorm and Gemma call it eps, Llama and Qwen variance_epsilon."""
    return float(norm.eps if hasattr(norm, "eps") else norm.variance_epsilon)  # type: ignore[arg-type]
