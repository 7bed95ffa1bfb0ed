"""What a language model's held-out loss is, and what to hold against it. Nats a token throughout."""

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.data.tokens import Packed

if TYPE_CHECKING:
    from numpy.typing import NDArray

EVAL_BATCH = 64
"""Contexts of a forward pass. No effect on the result beyond rounding."""
COUNTED = 4096
"""Contexts counted at a time, which bounds the memory."""


def next_token_loss(logits: Tensor, tokens: Tensor) -> Tensor:
    """Mean cross-entropy of tokens[:, 1:], in nats.  [n, T, V], [n, T] -> []"""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten())


@torch.no_grad()
def evaluate(model: Any, contexts: "NDArray[np.int32]") -> float:
    """Mean next-token loss of a Hugging Face model on contexts [n, T] in float32, in nats. Ends in training mode."""
    model.eval()
    total = 0.0
    for rows in np.array_split(contexts, -(-len(contexts) // EVAL_BATCH)):
        tokens = torch.from_numpy(rows).to(model.device, torch.long)
        total += next_token_loss(model(tokens, use_cache=False).logits, tokens).item() * len(rows)
    model.train()
    return total / len(contexts)


def unigram_entropy(train: Packed, held_out: "NDArray[np.int32]", n_words: int) -> float:
    """Cross-entropy of the held-out tokens under the frequencies of the training tokens: what a model reaches that
    knows how common each token is and nothing else.

        mean over held-out tokens w of -log((count(w) + 1) / (n_train + n_words))

    The first position of a context counts on neither side, since nothing predicts it.
    """
    counts = np.ones(n_words)
    for start in range(0, len(train.contexts), COUNTED):
        counts += np.bincount(train.contexts[start : start + COUNTED, 1:].ravel(), minlength=n_words)
    padding = train.contexts[:, 1:].size - train.n_rows
    if padding:
        counts -= np.bincount(train.contexts[-1, -padding:], minlength=n_words)
    return float(-np.log(counts / counts.sum())[held_out[:, 1:]].mean())


def bits_per_byte(loss: float, contexts: "NDArray[np.int32]", tokenizer: Any) -> float | None:
    """A held-out loss (nats a token) as bits a byte of the text, which does not depend on the tokenizer: end-of-text
    tokens cost bits and hold no bytes. None where the tokens hold no text.  contexts [n, T]"""
    predicted = contexts[:, 1:].ravel()
    text = tokenizer.decode(predicted.tolist(), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    n_bytes = len(text.encode("utf-8", "surrogatepass"))
    return loss * len(predicted) / (n_bytes * float(np.log(2))) if n_bytes else None
