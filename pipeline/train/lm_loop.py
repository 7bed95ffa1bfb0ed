"""The training loop of a small language model.

    loss = cross-entropy of the next token + early_attention_penalty * early_attention

early_attention is the mean, over sequences, heads and queries, of what layer 0 attends to on the earlier tokens other
than position 0. Without the penalty a model tends to copy a subject's embedding to the end of the prompt in layer 0
and to look the fact up there, out of reach of any feature at the subject.

Weights and optimiser are float32; AdamW with weight decay on matrices. On a CPU the result is the same for the same
seed, contexts and number of threads, whether training was stopped in between or not.
"""

import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.data.tokens import count
from pipeline.errors import UserError
from pipeline.progress import Progress
from pipeline.train.interrupt import leave, stop_requests
from pipeline.train.lm_measure import evaluate, next_token_loss
from pipeline.train.lm_run import Json, Work
from pipeline.train.options import LmOptions
from pipeline.train.schedule import learning_rate

logger = logging.getLogger(__name__)

MANY_EPOCHS = 8
"""From here on a run is warned about. Up to about four epochs are nearly as good as new text (arXiv:2305.16264)."""


class Plan(NamedTuple):
    """The numbers of a run, resolved."""

    n_steps: int
    per_step: int
    """Contexts of a step."""
    context: int
    n_contexts: int
    """Of the training split."""
    dtype: torch.dtype
    """Arithmetic of the matrix products."""

    @property
    def tokens_per_step(self) -> int:
        return self.per_step * self.context

    @property
    def n_tokens(self) -> int:
        return self.n_steps * self.tokens_per_step

    @property
    def epochs(self) -> float:
        return self.n_steps * self.per_step / self.n_contexts


def make_plan(options: LmOptions, n_contexts: int, context: int, dtype: torch.dtype) -> Plan:
    """The length in steps. Warns when the text is short for it."""
    per_step = options.batch_tokens // context
    tokens = count(options.n_tokens) if options.n_tokens is not None else 0
    n_steps = options.n_steps if options.n_steps is not None else max(1, round(tokens / (per_step * context)))
    plan = Plan(n_steps, per_step, context, n_contexts, dtype)
    if plan.epochs > MANY_EPOCHS:
        logger.warning(
            "%.0f epochs: the model may learn the text by heart; give more text (dataset.n_tokens) or a shorter run",
            plan.epochs,
        )
    return plan


def fit(
    options: LmOptions,
    plan: Plan,
    model: Any,
    train: np.ndarray,
    held_out: np.ndarray,
    work: Work,
    show: Callable[[], object],
) -> Json:
    """Train a Hugging Face model in place, from the newest checkpoint of `work` or from the start.

    train, held_out: int32 [n, T]; each context of `train` comes once an epoch, in an order given by the seed. `show` is
    called after each held-out loss but the last and must leave the model as it is. -> the last line of metrics.jsonl

    Ctrl-C saves a checkpoint first. Raises UserError when the loss is no longer finite.
    """
    optimizer = build_optimizer(model, options)
    step = work.resume(model, optimizer)
    order = islice(batches(plan.n_contexts, plan.per_step, plan.n_steps, options.seed), step, None)
    penalised = options.early_attention_penalty > 0
    clock = _Clock()
    with (
        stop_requests() as requested,
        Progress(plan.n_tokens, "tok", "pretrain", initial=step * plan.tokens_per_step) as bar,
        early_attention(model, penalised) as seen,
    ):
        for rows in order:
            tokens = torch.from_numpy(train[rows]).to(model.device, torch.long)
            rate = learning_rate(options.optim, step, plan.n_steps)
            loss = _step(model, optimizer, tokens, rate, plan.dtype, options.early_attention_penalty, seen)
            step += 1
            clock.tokens += plan.tokens_per_step
            fields: dict[str, str | float] = {}
            evaluating = step == plan.n_steps or step % options.eval_every == 0
            if evaluating or step % options.log_every == 0:
                _check_finite(loss, step, options, work)
                line = {"step": step, "tokens": step * plan.tokens_per_step, "loss": loss.item(), "held_out_loss": None}
                line |= {"lr": rate, "tokens_per_s": clock.rate()}
                if evaluating:
                    line["held_out_loss"] = evaluate(model, held_out)
                work.log(line)
                fields = _fields(line, seen)
            bar.update(plan.tokens_per_step, **fields)
            if evaluating:
                losses = f"loss {line['loss']:.4f}, held-out loss {line['held_out_loss']:.4f} nats a token"
                logger.info("step %s of %s: %s", f"{step:,}", f"{plan.n_steps:,}", losses)
                if step < plan.n_steps:
                    show()
            stopping = requested()  # asked once: what is stopped has been saved
            saving = stopping or step == plan.n_steps or step % options.checkpoint_every == 0
            if saving:
                _check_finite(loss, step, options, work)
                work.save(step, model, optimizer)
            if evaluating or saving:
                clock.restart()
            if stopping:
                logger.info("stopped at step %d of %d; the same command goes on", step, plan.n_steps)
                leave(stopping)
    return work.lines[-1]


def _step(
    model: Any,
    optimizer: torch.optim.Optimizer,
    tokens: Tensor,
    rate: float,
    dtype: torch.dtype,
    penalty: float,
    seen: list[Tensor],
) -> Tensor:
    """One step of the optimiser. -> next-token loss of the batch before it, []"""
    for group in optimizer.param_groups:
        group["lr"] = rate
    with torch.autocast(tokens.device.type, torch.bfloat16, enabled=dtype is torch.bfloat16):
        logits = model(tokens, use_cache=False).logits
    loss = next_token_loss(logits, tokens)
    (loss + penalty * seen[-1] if penalty > 0 else loss).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.detach()


@contextmanager
def early_attention(model: Any, watch: bool = True) -> Iterator[list[Tensor]]:
    """While open, the list holds the mean layer-0 attention to keys between position 0 and the query, of the newest
    forward pass. The model must use eager attention. Without `watch` the list stays empty."""
    seen: list[Tensor] = []

    def note(module: nn.Module, inputs: Any, output: tuple[Tensor, Tensor]) -> None:
        weights = output[1].float()  # [batch, head, query, key]
        seen[:] = [weights.tril(-1)[..., 1:].sum(-1).mean()]

    handle = model.transformer.h[0].attn.register_forward_hook(note) if watch else None
    try:
        yield seen
    finally:
        if handle is not None:
            handle.remove()


def build_optimizer(model: nn.Module, options: LmOptions) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices and embeddings only."""
    groups = [
        {"params": [p for p in model.parameters() if p.dim() >= 2], "weight_decay": options.weight_decay},
        {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    optim = options.optim
    return torch.optim.AdamW(groups, lr=optim.lr, betas=(optim.beta1, optim.beta2), fused=True)


def batches(n: int, per_step: int, n_steps: int, seed: int) -> Iterator[np.ndarray]:
    """Row numbers of each step: every context once an epoch; what is left over at its end waits for the next epoch."""
    generator = np.random.default_rng(seed)
    queue = np.empty(0, dtype=np.int64)
    for _ in range(n_steps):
        while len(queue) < per_step:
            queue = np.concatenate([queue, generator.permutation(n)])
        yield queue[:per_step]
        queue = queue[per_step:]


def _check_finite(loss: Tensor, step: int, options: LmOptions, work: Work) -> None:
    if not math.isfinite(loss.item()):
        why = f"the loss is no longer finite at step {step}"
        raise UserError(f"{why}; lower lm.optim.lr={options.optim.lr} and remove {work.directory} to begin again")


def _fields(line: Json, seen: list[Tensor]) -> dict[str, str | float]:
    fields: dict[str, str | float] = {"loss": f"{line['loss']:.3f}"}
    if seen:
        fields["early"] = f"{seen[-1].item():.3f}"
    if line["held_out_loss"] is not None:
        fields["held-out"] = f"{line['held_out_loss']:.3f}"
    return fields


class _Clock:
    """Training speed between two lines of the metrics, held-out losses and samples left out."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        self.start, self.tokens = time.perf_counter(), 0

    def rate(self) -> float:
        """Tokens a second since the last call."""
        rate = self.tokens / (time.perf_counter() - self.start)
        self.restart()
        return rate
