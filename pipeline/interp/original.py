"""What the base model itself does with a prompt, which a replacement is compared with."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from pipeline.arch.options import Site
from pipeline.core.normalize import MlpNorm
from pipeline.data.models import LanguageModel
from pipeline.errors import UserError

if TYPE_CHECKING:
    from transformers import DynamicCache

Prompt = str | Sequence[str] | Sequence[int] | Tensor
"""A text, texts of equally many tokens, the ids of one context, or contexts int64 [T] or [n, T]."""


class Original(NamedTuple):
    """The language model itself on some tokens."""

    logits: Tensor
    """[n, T, V]"""
    x: list[Tensor]
    """What the transcoder reads at each layer: L times [n, T, D], float32."""
    mlp_out: list[Tensor]
    """L times [n, T, D]"""


@torch.inference_mode()
def read_original(
    lm: LanguageModel, site: Site, norm: MlpNorm, tokens: Tensor, past: "DynamicCache | None" = None
) -> Original:
    """The model itself, with what a transcoder reads at each layer. tokens int64 [n, T]"""
    x: list[Tensor] = []
    mlp_out: list[Tensor] = []

    def collect(layer: int, resid: Tensor, own: Tensor) -> Tensor:
        x.append(read_site(site, norm, layer, resid, own))
        mlp_out.append(own)
        return own

    logits = lm.logits(tokens, collect, past)
    return Original(logits, x, mlp_out)


def read_site(site: Site, norm: MlpNorm, layer: int, resid: Tensor, own: Tensor) -> Tensor:
    """What the transcoder reads at a layer, [n, T, D], from the residual stream and the MLP's own output there."""
    if site == Site.mlp_out:
        return wide(own)
    return norm.layer(resid, layer) if site == Site.mlp_in else wide(resid)


def wide(values: Tensor) -> Tensor:
    """float32, and float64 as it is."""
    return values if values.dtype == torch.float64 else values.float()


def prompt_tokens(lm: LanguageModel, bos_token_id: int | None, prompt: Prompt) -> Tensor:
    """See `ReplacementModel.tokens`."""
    if isinstance(prompt, Tensor):
        tokens = prompt[None] if prompt.dim() == 1 else prompt
    else:
        tokens = torch.tensor(_ids(lm, bos_token_id, prompt), dtype=torch.int64)
    if tokens.dim() != 2 or tokens.dtype not in (torch.int64, torch.int32):
        raise UserError(f"tokens are {tokens.dtype} {list(tokens.shape)}; give whole numbers [T] or [n, T]")
    if tokens.numel() == 0:
        raise UserError("the prompt has no token, and no token begins a context of this run; give some text")
    if tokens.shape[1] > lm.n_context:
        raise UserError(
            f"the prompt has {tokens.shape[1]} tokens, model={lm.name} {lm.n_context} positions; shorten it"
        )
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= lm.vocab_size:
        wrong = low if low < 0 else high
        raise UserError(f"the model has no token {wrong}; ids go from 0 to {lm.vocab_size - 1}")
    return tokens.long()


def _ids(lm: LanguageModel, bos_token_id: int | None, prompt: str | Sequence[str] | Sequence[int]) -> list[list[int]]:
    if not isinstance(prompt, str) and all(isinstance(one, int) for one in prompt):
        return [[int(one) for one in prompt]]
    texts = [prompt] if isinstance(prompt, str) else [str(one) for one in prompt]
    begin = [] if bos_token_id is None else [bos_token_id]
    ids = [begin + list(one) for one in lm.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]]
    if len({len(one) for one in ids}) > 1:
        lengths = ", ".join(str(len(one)) for one in ids)
        raise UserError(f"the prompts have {lengths} tokens; run them one by one, or give equally long ones")
    return ids
