"""Tokenizers and weights, from a directory in Hugging Face format, through transformers."""

import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pipeline.data.options import Attention, Dtype, ModelOptions
from pipeline.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


def resolve_device(device: str, here: bool = True) -> torch.device:
    """auto is the first CUDA device, else the CPU (mps only on request: its kernels have given wrong numbers before).
    Raises UserError for a device that this machine does not have. here: False for one of another machine."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    match = re.fullmatch(r"(cpu|mps|cuda)(?::(\d+))?", device)
    if match is None:
        raise UserError(f"device '{device}' is unknown; use auto, cpu, cuda, cuda:N or mps")
    n_found = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}[match[1]]
    if here and int(match[2] or 0) >= n_found:
        raise UserError(
            f"device '{device}' is not there: this machine has {n_found} {match[1]} devices; use auto or cpu"
        )
    return torch.device(device)


def resolve_dtype(dtype: Dtype, device: torch.device) -> torch.dtype:
    """auto is bfloat16 on CUDA and float32 elsewhere."""
    if dtype is Dtype.auto:
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if dtype is Dtype.bfloat16 and device.type == "cpu" and not _cpu_has_bfloat16():
        logger.warning("this CPU has no bfloat16 instructions: model.dtype=float32 is faster on it")
    return {Dtype.float32: torch.float32, Dtype.bfloat16: torch.bfloat16}[dtype]


def load_tokenizer(options: ModelOptions, directory: Path) -> "PreTrainedTokenizerBase":
    """Raises UserError when there is none, or none with an end-of-text token."""
    from transformers import AutoTokenizer

    tokenizer = None
    if any((directory / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")):
        with quiet(), as_user_error(options, "tokenizer"):
            tokenizer = AutoTokenizer.from_pretrained(directory)
    if tokenizer is None:
        raise UserError(f"model.path={options.path}: no tokenizer in {directory}; put its tokenizer.json there")
    if tokenizer.eos_token_id is None:
        fix = "name its eos_token in tokenizer_config.json"
        raise UserError(f"model.path={options.path}: the tokenizer has no end-of-text token; {fix}")
    return tokenizer


def load_weights(options: ModelOptions, directory: Path, dtype: torch.dtype, device: torch.device) -> "PreTrainedModel":
    """The model, in eval mode, on `device` or spread by `model.device_map`. Raises UserError for what is no causal
    language model, for files that are broken or incomplete, and for a device map that cannot be met."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with quiet():
        with as_user_error(options, "configuration"):
            config = AutoConfig.from_pretrained(directory)
        architecture = (config.architectures or ["nothing"])[0]
        if not architecture.endswith(("ForCausalLM", "LMHeadModel")):
            raise UserError(f"model.path={options.path}: {architecture} is no causal language model; use another model")
        with as_user_error(options, "weights"):
            weights, info = AutoModelForCausalLM.from_pretrained(
                directory,
                config=config,
                dtype=dtype,
                attn_implementation=None if options.attention is Attention.auto else options.attention.value,
                output_loading_info=True,
                **_placement(options),
            )
    if info["missing_keys"]:  # transformers would make them up at random
        missing = f"{len(info['missing_keys'])} tensors are missing, {sorted(info['missing_keys'])[0]} for one"
        raise UserError(f"model.path={options.path}: {missing}; download or save the model again")
    if options.device_map is None:
        weights = weights.to(device)
    return weights.eval()


def _placement(options: ModelOptions) -> dict[str, Any]:
    """What accelerate is told."""
    if options.device_map is None:
        if options.max_memory or options.offload_dir:
            raise UserError(
                "model.max_memory and model.offload_dir go with model.device_map; add model.device_map=auto"
            )
        return {}
    if options.device != "auto":
        fix = "leave out either; model.max_memory says what each device may hold"
        raise UserError(f"model.device={options.device} and model.device_map={options.device_map} contradict; {fix}")
    limits = {int(key) if key.isdecimal() else key: limit for key, limit in options.max_memory.items()}
    return {"device_map": options.device_map, "max_memory": limits or None, "offload_folder": options.offload_dir}


def _cpu_has_bfloat16() -> bool:
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


@contextmanager
def as_user_error(options: ModelOptions, what: str) -> Iterator[None]:
    """What transformers raises for files it cannot use, as one line."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"model.path={options.path}: cannot use its {what} ({reason}); check the files") from error


@contextmanager
def quiet() -> Iterator[None]:
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
