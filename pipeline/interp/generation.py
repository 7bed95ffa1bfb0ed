"""Continuations of a prompt by the original model and by the replacement, and how far apart the two are.

Both draw with the same random numbers: token = argmax(log p + g), g Gumbel noise [V] of its own at each place, which
is a draw from p. Where the two distributions are the same, so is the token; they part where the replacement differs,
not where the dice fell otherwise.

KL(P_original || P_replaced) in nats at a token is that of the two distributions that it was drawn from, without
temperature and cuts, given everything before it: of the replacement's continuation, and, teacher-forced, of the
original's.

The same for a model with features edited (`under`), at the prompt's positions or at every new token.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.core.metrics_predictions import Predictions
from pipeline.data.models import LanguageModel
from pipeline.errors import UserError
from pipeline.interp.options import GenerateOptions
from pipeline.interp.original import Prompt
from pipeline.interp.replacement import ReplacementModel
from pipeline.interp.steering.feature_edits import Compiled, Edit
from pipeline.interp.steering.intervene import Edited, unedited
from pipeline.interp.steering.intervene_options import InterveneOptions

Step = Callable[[Tensor], Tensor]
"""The tokens that come next, int64 [1, t] -> their logits [1, t, V]. It remembers what came before."""


class Continuation(NamedTuple):
    tokens: list[int]
    """The new ones, the end of text included where it was drawn."""
    logits: Tensor
    """[n, V], what each was drawn from."""
    ended: str
    """Why there are no more: end of text, n_tokens or context."""


class Side(NamedTuple):
    """A continuation and its divergence."""

    tokens: list[int]
    kl: list[float]
    """KL(P_original || P_replaced) in nats at each token."""
    ended: str


class Generated(NamedTuple):
    prompt: list[int]
    original: Side
    replacement: Side

    @property
    def n_same(self) -> int:
        """Tokens before the two part."""
        pairs = zip(self.original.tokens, self.replacement.tokens, strict=False)
        return next((i for i, (ours, theirs) in enumerate(pairs) if ours != theirs), _shorter(self))


@torch.inference_mode()
def generate(model: ReplacementModel, prompt: Prompt, options: GenerateOptions) -> Generated:
    """Both continuations of one prompt. Raises UserError for settings that mean nothing, and for a prompt that
    `ReplacementModel.tokens` refuses or that is several."""
    check(options)
    tokens = model.tokens(prompt)
    if tokens.shape[0] != 1:
        raise UserError(f"{tokens.shape[0]} prompts; continue one at a time")
    replaced = partial(replacement_steps, model, options)
    ours = continuation(replaced(), tokens, model.lm, options)
    theirs = continuation(original_steps(model.lm, options.kv_cache), tokens, model.lm, options)
    # What the other of the two says of each: all of it in one pass.
    of_ours = given(original_steps(model.lm, options.kv_cache), tokens, ours.tokens)
    of_theirs = given(replaced(), tokens, theirs.tokens)
    return Generated(
        tokens[0].tolist(),
        Side(theirs.tokens, token_kl(theirs.logits, of_theirs).tolist(), theirs.ended),
        Side(ours.tokens, token_kl(of_ours, ours.logits).tolist(), ours.ended),
    )


@torch.inference_mode()
def under(
    model: ReplacementModel, tokens: Tensor, edits: Sequence[Edit], options: InterveneOptions
) -> tuple[Side, Side]:
    """The continuations of one prompt [1, T] by a model as it is and with features edited, greedily: (before, after).
    Each one's KL(before || after) in nats is of the two at its own tokens."""
    drawn = GenerateOptions(n_tokens=options.n_tokens)
    plain, edited = (partial(edited_steps, model, some, tokens.shape[1], options) for some in ((), edits))
    before, after = (continuation(steps(), tokens, model.lm, drawn) for steps in (plain, edited))
    of_before, of_after = given(edited(), tokens, before.tokens), given(plain(), tokens, after.tokens)
    return (
        Side(before.tokens, token_kl(before.logits, of_before).tolist(), before.ended),
        Side(after.tokens, token_kl(of_after, after.logits).tolist(), after.ended),
    )


def check(options: GenerateOptions) -> None:
    """Raises UserError for settings that mean nothing, before anything is loaded."""
    if options.n_tokens < 1:
        raise UserError(f"generate.n_tokens={options.n_tokens}: there is nothing to generate; give 1 or more")
    if not options.temperature >= 0 or options.temperature == float("inf"):
        raise UserError(f"generate.temperature={options.temperature} is no temperature; give 0 (greedy) or more")
    if options.top_k is not None and options.top_k < 1:
        raise UserError(f"generate.top_k={options.top_k} leaves no token; give 1 or more, or null for all")
    if options.top_p is not None and not 0 < options.top_p <= 1:
        raise UserError(f"generate.top_p={options.top_p} is no probability; give one above 0 and at most 1")
    if options.temperature == 0 and (options.top_k or options.top_p):
        raise UserError("generate.top_k and top_p need a draw: add generate.temperature=1, or leave them out (greedy)")


def original_steps(lm: LanguageModel, kv_cache: bool) -> Step:
    """The original model, token by token."""
    return partial(lm.logits, past=lm.new_past()) if kv_cache else recomputing(lm.logits)


def replacement_steps(model: ReplacementModel, options: GenerateOptions) -> Step:
    """The replacement, token by token."""
    logits = partial(model.logits, layers=options.layers, keep_error=options.keep_error)
    return partial(logits, past=model.new_past()) if options.kv_cache else recomputing(logits)


def edited_steps(model: ReplacementModel, edits: Sequence[Edit], n_prompt: int, options: InterveneOptions) -> Step:
    """A model with features edited, token by token, from the first of the prompt's n_prompt on."""
    past = model.new_past()

    def follow(tokens: Tensor) -> Tensor:
        n_past = past.replaced.get_seq_length()
        before = unedited(model, tokens, options, past)
        compiled = Compiled([edits], n_prompt, n_past, tokens.shape[1], model.transcoder.d_features)
        return Edited(model, before, compiled, options, first=n_past == 0).logits(tokens, past.replaced)

    def again(tokens: Tensor) -> Tensor:
        length = tokens.shape[1]
        compiled = Compiled([edits], n_prompt, 0, length, model.transcoder.d_features)
        return Edited(model, unedited(model, tokens, options), compiled, options).logits(tokens)

    return follow if options.kv_cache else recomputing(again)


def recomputing(logits: Step) -> Step:
    """Steps of a model that remembers nothing: all tokens so far each time."""
    seen: list[Tensor] = []

    def step(tokens: Tensor) -> Tensor:
        seen.append(tokens)
        return logits(torch.cat(seen, dim=1))[:, -tokens.shape[1] :]

    return step


def continuation(step: Step, prompt: Tensor, lm: LanguageModel, options: GenerateOptions) -> Continuation:
    """Draw tokens, one after the other, until one of the reasons to stop. prompt int64 [1, T]"""
    draw = drawing(options)
    # The token that follows the last position needs none itself.
    room = lm.n_context - prompt.shape[1] + 1
    tokens: list[int] = []
    kept: list[Tensor] = []
    following = prompt
    for _ in range(min(options.n_tokens, room)):
        logits = step(following)[0, -1].float().cpu()
        kept.append(logits)
        tokens.append(draw(logits))
        if tokens[-1] in lm.end_tokens:
            return Continuation(tokens, torch.stack(kept), "end of text")
        following = torch.tensor([tokens[-1:]])
    return Continuation(tokens, torch.stack(kept), "n_tokens" if options.n_tokens <= room else "context")


def given(step: Step, prompt: Tensor, tokens: list[int]) -> Tensor:
    """The logits that a model gives before each of `tokens`, which follow the prompt [1, T]. -> [n, V]"""
    whole = torch.cat([prompt, torch.tensor([tokens[:-1]], dtype=torch.int64)], dim=1)
    return step(whole)[0, prompt.shape[1] - 1 :].float().cpu()


def drawing(options: GenerateOptions) -> Callable[[Tensor], int]:
    """logits [V] on the CPU -> a token, with random numbers of its own from `seed` on."""
    from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    if options.temperature == 0:
        return lambda logits: int(logits.argmax())
    warp = LogitsProcessorList([TemperatureLogitsWarper(float(options.temperature))])
    if options.top_k is not None:
        warp.append(TopKLogitsWarper(options.top_k))
    if options.top_p is not None:
        warp.append(TopPLogitsWarper(float(options.top_p)))
    generator = torch.Generator().manual_seed(options.seed)

    def draw(logits: Tensor) -> int:
        # One for each token of the vocabulary, whatever is cut: the same at the same place in both continuations.
        exponential = torch.empty(logits.shape, dtype=torch.float64).exponential_(generator=generator)
        warped = warp(torch.empty(1, 0, dtype=torch.int64), logits.double()[None])[0]
        return int((warped - exponential.log()).argmax())

    return draw


def token_kl(original: Tensor, replaced: Tensor) -> Tensor:
    """KL(P_original || P_replaced) in nats at each place. Logits [n, V], [n, V] -> float64 [n]"""
    everywhere = torch.ones(1, original.shape[0], dtype=torch.bool)
    unknown = torch.zeros_like(everywhere)
    return Predictions(original[None], everywhere, unknown.long(), unknown).against(replaced[None])["kl"][0]


def _shorter(generated: Generated) -> int:
    return min(len(generated.original.tokens), len(generated.replacement.tokens))
