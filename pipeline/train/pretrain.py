"""Trains a small language model of the GPT-2 architecture from scratch on packed contexts.

    loss = cross-entropy of the next token + early_attention_penalty * early_attention

early_attention is the mean, over sequences, heads and queries, of what layer 0 attends to on the earlier tokens other
than position 0. Without the penalty a model tends to copy a subject's embedding to the end of the prompt in layer 0
and to look the fact up there, out of reach of any feature at the subject.

Weights and optimiser are float32, matrix products bfloat16; AdamW with weight decay on matrices. The result is the same
for the same seed, contexts and number of threads.
"""

import json
import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.errors import UserError
from pipeline.progress import Progress
from pipeline.train.options import LmOptions, Weights
from pipeline.train.schedule import learning_rate

if TYPE_CHECKING:
    from transformers import GPT2LMHeadModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

EVAL_EVERY = 500
"""Steps between held-out losses; no effect on the model."""
EVAL_BATCH = 64


def fit(
    options: LmOptions,
    train: np.ndarray,
    held_out: np.ndarray,
    tokenizer: "PreTrainedTokenizerBase",
    to: Path,
) -> dict[str, float | int]:
    """Trains on `train` (int32 [n, T], each context once an epoch, in an order given by the seed) and writes a Hugging
    Face directory `to`. Returns n_parameters, n_steps, n_tokens, loss (last step) and held_out_loss, in nats a token.

    Raises UserError when `to` exists already or when the options do not fit one another.
    """
    check(options, to)
    n, context = train.shape
    per_step = max(1, options.batch_tokens // context)
    torch.manual_seed(options.seed)
    device = torch.device(_device(options.device))
    model = build(options, len(tokenizer), context, tokenizer.bos_token_id, tokenizer.eos_token_id).to(device)
    optimizer = _optimizer(model, options)
    n_tokens = options.n_steps * per_step * context
    held_out_loss = float("nan")
    with Progress(n_tokens, unit="tok", desc="pretrain") as progress, early_attention(model) as seen:
        for step, rows in enumerate(_batches(n, per_step, options.n_steps, options.seed)):
            tokens = torch.from_numpy(train[rows]).to(device, torch.long)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(options.optim, step, options.n_steps)
            with torch.autocast(device.type, torch.bfloat16):
                logits = model(tokens, use_cache=False).logits
            loss = next_token_loss(logits, tokens)
            penalty = options.early_attention_penalty * seen[-1]
            (loss + penalty).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            fields = {"loss": f"{loss.item():.3f}", "early": f"{seen[-1].item():.3f}"}
            if (step + 1) % EVAL_EVERY == 0 or step + 1 == options.n_steps:
                held_out_loss = evaluate(model, held_out)
                fields["held-out"] = f"{held_out_loss:.3f}"
                logger.info("step %d: loss %.4f, held-out loss %.4f", step + 1, loss.item(), held_out_loss)
            progress.update(len(rows) * context, **fields)
    save(model, tokenizer, options.weights, to)
    return {
        "n_parameters": sum(p.numel() for p in model.parameters()),
        "n_steps": options.n_steps,
        "n_tokens": n_tokens,
        "loss": loss.item(),
        "held_out_loss": held_out_loss,
    }


def check(options: LmOptions, to: Path) -> None:
    """Raises UserError for what cannot be trained or written, before anything is done."""
    if options.d_model % options.n_heads:
        raise UserError(
            f"lm.d_model={options.d_model} must be a multiple of lm.n_heads={options.n_heads}; change either"
        )
    if options.optim.name != "adamw":
        raise UserError(f"lm.optim.name={options.optim.name}: a language model is trained with adamw only")
    if to.exists():
        raise UserError(f"to={to} exists already; remove it or choose another directory")


def build(options: LmOptions, n_words: int, context: int, bos: int, eos: int) -> "GPT2LMHeadModel":
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
        attn_implementation="eager",  # the only one that says what it attends to
    )
    return GPT2LMHeadModel(config).train()


@contextmanager
def early_attention(model: "GPT2LMHeadModel") -> Iterator[list[Tensor]]:
    """While open, the list holds the mean layer-0 attention to keys between position 0 and the query, of the newest
    forward pass."""
    seen: list[Tensor] = []

    def note(module: torch.nn.Module, inputs: Any, output: tuple[Tensor, Tensor]) -> None:
        weights = output[1].float()  # [batch, head, query, key]
        seen[:] = [weights.tril(-1)[..., 1:].sum(-1).mean()]

    handle = model.transformer.h[0].attn.register_forward_hook(note)
    try:
        yield seen
    finally:
        handle.remove()


def next_token_loss(logits: Tensor, tokens: Tensor) -> Tensor:
    """Mean cross-entropy of tokens[:, 1:], in nats.  [n, T, V], [n, T] -> []"""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten())


@torch.no_grad()
def evaluate(model: "GPT2LMHeadModel", contexts: np.ndarray) -> float:
    """Mean next-token loss on contexts in float32, in nats."""
    model.eval()
    total = 0.0
    for rows in np.array_split(contexts, -(-len(contexts) // EVAL_BATCH)):
        tokens = torch.from_numpy(rows).to(model.device, torch.long)
        total += next_token_loss(model(tokens, use_cache=False).logits, tokens).item() * len(rows)
    model.train()
    return total / len(contexts)


def save(model: "GPT2LMHeadModel", tokenizer: "PreTrainedTokenizerBase", weights: Weights, to: Path) -> None:
    """A Hugging Face directory, written aside and renamed, so that it is either whole or not there."""
    from transformers.utils import logging as noise

    noise.disable_progress_bar()
    aside = to.with_name(f".{to.name}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    model.eval().to(dtype=getattr(torch, weights.value)).save_pretrained(aside)
    (aside / "generation_config.json").unlink(missing_ok=True)  # nothing to say: GPT-2's defaults
    tokenizer.save_pretrained(aside)
    config = json.loads((aside / "config.json").read_text())
    config.pop("_name_or_path", None)
    (aside / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    (aside / "model.safetensors").chmod(0o644)  # safetensors makes it private
    aside.rename(to)


def _optimizer(model: "GPT2LMHeadModel", options: LmOptions) -> torch.optim.AdamW:
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [
        {"params": matrices, "weight_decay": options.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    optim = options.optim
    return torch.optim.AdamW(groups, lr=optim.lr, betas=(optim.beta1, optim.beta2), fused=True)


def _batches(n: int, per_step: int, n_steps: int, seed: int) -> Iterator[np.ndarray]:
    """Row numbers of each step: every context once an epoch; what is left over at its end waits for the next epoch."""
    generator = np.random.default_rng(seed)
    queue = np.empty(0, dtype=np.int64)
    for _ in range(n_steps):
        while len(queue) < per_step:
            queue = np.concatenate([queue, generator.permutation(n)])
        yield queue[:per_step]
        queue = queue[per_step:]


def _device(name: str) -> str:
    if name != "auto":
        return name
    return "cuda" if torch.cuda.is_available() else "cpu"
