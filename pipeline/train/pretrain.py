"""A small language model of the GPT-2 architecture in Hugging Face format: tokenizer, model, samples, files.

1. The tokenizer is a byte-level BPE trained on the training documents, or one that exists.
2. The model is a plain GPT-2, so that whatever reads Hugging Face directories reads this one. `lm_loop` trains it.
3. Samples of its text are drawn beside torch's generator, so that looking at them changes nothing.
"""

import json
import logging
import shutil
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from pipeline.data.text import hash_files
from pipeline.data.tokens import count
from pipeline.errors import UserError
from pipeline.train.options import LmOptions, OptimOptions, Weights

if TYPE_CHECKING:
    from transformers import GPT2LMHeadModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

BOS, EOS = "<bos>", "<eos>"
N_BYTES = 256
PROMPT_TOKENS = 8
"""Given beginning of a sample."""
TOKENIZER_FILES = ("tokenizer*.json", "vocab*", "merges.txt", "special_tokens_map.json", "*.model")


class Sample(NamedTuple):
    prompt: str
    """The given beginning; empty for a sample from nothing."""
    text: str


def check(options: LmOptions, context: int) -> None:
    """Raises UserError for what cannot be trained, before anything is done."""
    for name in ("n_layers", "d_model", "n_heads", "d_mlp", "log_every", "eval_every", "checkpoint_every"):
        if getattr(options, name) < 1:
            raise UserError(f"lm.{name}={getattr(options, name)} must be at least 1")
    for name in ("seed", "n_samples", "sample_tokens", "temperature", "early_attention_penalty", "weight_decay"):
        if getattr(options, name) < 0:
            raise UserError(f"lm.{name}={getattr(options, name)} must not be negative")
    if options.d_model % options.n_heads:
        raise UserError(
            f"lm.d_model={options.d_model} must be a multiple of lm.n_heads={options.n_heads}; change either"
        )
    if (options.n_tokens is None) == (options.n_steps is None):
        raise UserError("give the length of the training once: lm.n_tokens or lm.n_steps, the other null")
    if options.n_tokens is not None:
        count(options.n_tokens)
    elif options.n_steps is not None and options.n_steps < 1:
        raise UserError(f"lm.n_steps={options.n_steps} must be at least 1")
    if options.batch_tokens < context:
        raise UserError(
            f"lm.batch_tokens={options.batch_tokens} holds no context; use lm.batch_tokens={context} or more"
        )
    if options.vocab_size < N_BYTES + 2:
        raise UserError(f"lm.vocab_size={options.vocab_size}: 256 bytes and 2 special tokens are {N_BYTES + 2} already")
    if options.tokenizer_mb <= 0:
        raise UserError(f"lm.tokenizer_mb={options.tokenizer_mb} must be above 0")
    optim = options.optim
    if optim.name != "adamw":
        raise UserError(f"lm.optim.name={optim.name}: a language model is trained with adamw only")
    if optim.lr <= 0:
        raise UserError(f"lm.optim.lr={optim.lr} must be above 0")
    for name, fix in (("momentum", "leave it out"), ("clip", "leave it out"), ("weight_decay", "use lm.weight_decay")):
        if getattr(optim, name) != getattr(OptimOptions(name="adamw"), name):
            raise UserError(f"lm.optim.{name} has no meaning for a language model; {fix}")
    for name, top in (("beta1", 0.999999), ("beta2", 0.999999), ("warmup", 1), ("decay", 1)):
        if not 0 <= getattr(optim, name) <= top:
            raise UserError(f"lm.optim.{name}={getattr(optim, name)} must lie between 0 and 1")


# --------------------------------------------------------------------------------------------------- tokenizer


def train_tokenizer(texts: Iterable[str], vocab_size: int, most_mb: float) -> "PreTrainedTokenizerBase":
    """A byte-level BPE of at most `vocab_size` tokens, trained on the first `most_mb` MB of training documents. Ids 0
    and 1 are <bos> and <eos>; it adds neither by itself, and decoding gives the text back. The same texts give the same
    tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_first(texts, most_mb), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, clean_up_tokenization_spaces=False
    )


def load_tokenizer(name: str) -> "PreTrainedTokenizerBase":
    """That of a directory or a hub name. Raises UserError when it cannot be had or has no end-of-text token."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(Path(name).expanduser() if Path(name).expanduser().is_dir() else name)
    except (OSError, ValueError) as error:
        why = "holds no tokenizer" if Path(name).expanduser().exists() else "no directory, and the hub did not give it"
        fix = f"give a directory with a tokenizer.json, or run `hf download {name}` where there is a network"
        raise UserError(f"lm.tokenizer={name}: {why} ({type(error).__name__}); {fix}") from error
    if tokenizer.eos_token_id is None:
        raise UserError(f"lm.tokenizer={name} has no end-of-text token; name its eos_token in tokenizer_config.json")
    return tokenizer


def tokenizer_identity(name: str | None) -> str | None:
    """sha256 of the files of a local tokenizer; None where there are none."""
    directory = Path(name).expanduser() if name is not None else None
    if directory is None or not directory.is_dir():
        return None
    files = sorted({file for pattern in TOKENIZER_FILES for file in directory.glob(pattern)})
    return hash_files(files) if files else None


def n_words(tokenizer: "PreTrainedTokenizerBase") -> int:
    """Rows that an embedding needs for this tokenizer."""
    return int(max(tokenizer.get_vocab().values())) + 1


def _first(texts: Iterable[str], most_mb: float) -> Iterator[str]:
    left = most_mb * 1e6
    for text in texts:
        yield text
        left -= len(text.encode("utf-8", "surrogatepass"))
        if left <= 0:
            return


# ------------------------------------------------------------------------------------------------------- model


def build(options: LmOptions, n_words: int, context: int, bos: int | None, eos: int) -> "GPT2LMHeadModel":
    """A plain GPT-2 of this size, freshly initialised from torch's generator."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=n_words,
        n_positions=context,
        n_embd=options.d_model,
        n_layer=options.n_layers,
        n_head=options.n_heads,
        n_inner=options.d_mlp,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=bos,
        eos_token_id=eos,
        # Only eager attention says what it attends to.
        attn_implementation="eager" if options.early_attention_penalty > 0 else "sdpa",
    )
    return GPT2LMHeadModel(config).train()


def save(model: "GPT2LMHeadModel", tokenizer: Path, weights: Weights, to: Path) -> None:
    """The files of a Hugging Face directory. Converts the model to the dtype of the stored weights.

    tokenizer: directory with its files, which are copied: transformers saves one that it has read with other words.
    """
    from transformers.utils import logging as noise

    noise.disable_progress_bar()
    model.eval().to(dtype=getattr(torch, weights.value)).save_pretrained(to)
    (to / "generation_config.json").unlink(missing_ok=True)  # nothing to say: GPT-2's defaults
    shutil.copytree(tokenizer, to, dirs_exist_ok=True)
    config = json.loads((to / "config.json").read_text())
    config.pop("_name_or_path", None)
    (to / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    mode = stat.S_IMODE((to / "config.json").stat().st_mode)
    (to / "model.safetensors").chmod(mode)  # safetensors makes it private


# ----------------------------------------------------------------------------------------------------- samples


def prompts(n: int, held_out: np.ndarray, bos: int | None, eos: int) -> list[list[int]]:
    """Token ids to begin samples with: nothing, then the beginnings of held-out documents (of contexts, where too few
    documents begin).  held_out [n, T]"""
    start = [eos] if bos is None else [bos, eos]
    text = held_out[:, 1:]
    found = [row[i + 1 : i + 1 + PROMPT_TOKENS] for row in text for i in np.flatnonzero(row == eos) if i + 1 < len(row)]
    whole = [ids for ids in found if len(ids) == PROMPT_TOKENS and eos not in ids]
    begun = [*whole, *(row[:PROMPT_TOKENS] for row in text if eos not in row[:PROMPT_TOKENS])]
    return [start, *([*start, *map(int, ids)] for ids in begun)][:n]


def samples(
    model: "GPT2LMHeadModel", tokenizer: "PreTrainedTokenizerBase", begun: list[list[int]], options: LmOptions
) -> list[Sample]:
    """A continuation of each beginning, the same for the same weights and seed. Leaves torch's generator as it was and
    the model in training mode."""
    eos = tokenizer.eos_token_id
    chosen = {"do_sample": True, "temperature": options.temperature, "top_k": 0} if options.temperature > 0 else {}
    found = []
    model.eval()
    cuda = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(cuda), torch.no_grad():
        torch.manual_seed(options.seed)
        for ids in begun:
            room = min(options.sample_tokens, model.config.n_positions - len(ids))
            if room < 1:
                continue
            tokens = torch.tensor([ids], device=model.device)
            mask = torch.ones_like(tokens)
            out = model.generate(
                tokens, attention_mask=mask, max_new_tokens=room, eos_token_id=eos, pad_token_id=eos, **chosen
            )
            prompt, text = (
                tokenizer.decode(part, skip_special_tokens=True) for part in (ids, out[0, len(ids) :].tolist())
            )
            found.append(Sample(prompt, text))
    model.train()
    return found


def say(found: Iterable[Sample]) -> None:
    """Log samples, a line each: the given beginning, a bar, what the model wrote."""
    for sample in found:
        logger.info("  %s", f"{sample.prompt}|{sample.text}".replace("\n", "\\n"))
