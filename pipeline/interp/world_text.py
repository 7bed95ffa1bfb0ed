"""Held-out documents of the built-in world, and where countries stand in them."""

from collections.abc import Collection, Iterator
from functools import cache
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pipeline.data import world
from pipeline.data.models import LanguageModel
from pipeline.data.tokens import Split, split_of
from pipeline.data.world import facts
from pipeline.interp.edits import Sides, chosen, features_of
from pipeline.progress import Progress

SEED = 7
N_DOCUMENTS = 40_000
"""Looked through for held-out ones, which are one in twenty: about 1,800 that differ, 20,000 tokens in each half."""
N_OTHERS = 512
CONTEXT = 64
"""<bos> included, as in dataset=world."""


class Text(NamedTuple):
    """Contexts as in dataset=world: <bos>, then documents with <eos> between, cut to length."""

    tokens: Tensor
    """int64 [n, CONTEXT]"""
    country: Tensor
    """int64 [n, CONTEXT]: the number of the country that a token names, len(COUNTRIES) for any other token."""


def halves(lm: LanguageModel) -> tuple[Text, Text]:
    """Two texts that share no document: one to choose features on, one to score the choice on. No document of either
    was trained on: which are held out depends on their content alone."""
    held_out = _held_out(N_DOCUMENTS)
    return _packed(lm, held_out[::2]), _packed(lm, held_out[1::2])


def unasked(lm: LanguageModel, prompts: Collection[str]) -> Text:
    """The first half without the documents that hold one of these prompts."""
    return _packed(lm, [text for text in _held_out(N_DOCUMENTS)[::2] if not any(one in text for one in prompts)])


def country_ids(lm: LanguageModel) -> Tensor:
    """Of each country's name. int64 [n_countries]"""
    ids = lm.tokenizer([c.name for c in facts.COUNTRIES], add_special_tokens=False)["input_ids"]
    assert all(len(one) == 1 for one in ids)
    return torch.tensor(ids).squeeze(1)


def inputs(sides: Sides, text: Text, batch_tokens: int, desc: str) -> Iterator[tuple[Tensor, Tensor]]:
    """(what the transcoder reads [B, L, D], country [B]) of all tokens but the first ones, a batch at a time. desc:
    what a progress bar calls it."""
    size = max(1, batch_tokens // text.tokens.shape[1])
    with Progress(text.tokens[:, 1:].numel(), "tok", desc) as bar:
        for tokens, country in zip(text.tokens.split(size), text.country.split(size), strict=True):
            x = sides.inputs(tokens)[:, 1:].flatten(0, 1)
            yield x, country[:, 1:].flatten().to(x.device)
            bar.update(len(x))


class Mass(NamedTuple):
    """Sums by feature and country, the last column for tokens that name none."""

    activation: Tensor
    """float64 [S, F, C + 1]"""
    fires: Tensor
    """Tokens at which the feature is active, the same."""
    n_tokens: Tensor
    """float64 [C + 1]"""

    def active_on(self) -> Tensor:
        """On which part of the tokens that name a country a feature is active. [S, F, C]"""
        return (self.fires / self.n_tokens).nan_to_num(0.0)[..., :-1]


def mass(sides: Sides, text: Text, batch_tokens: int) -> tuple[Mass, Tensor]:
    """-> (sums over the text, what the transcoder reads at N_OTHERS of its tokens that name no country [n, L, D])"""
    transcoder, n_columns = sides.transcoder, len(facts.COUNTRIES) + 1
    size = transcoder.d_features * n_columns
    activation, fires = torch.zeros(2, transcoder.n_sources, size, dtype=torch.float64)
    n_tokens, others, n_others = torch.zeros(n_columns, dtype=torch.float64), [], 0
    step = max(1, text.tokens[:, 1:].numel() // (2 * N_OTHERS))
    for x, country in inputs(sides, text, batch_tokens, "countries"):
        n_tokens += torch.bincount(country.cpu(), minlength=n_columns)
        if n_others < N_OTHERS:
            others.append(x[country == n_columns - 1][::step])
            n_others += len(others[-1])
        features = features_of(transcoder, x)
        for source in range(transcoder.n_sources):
            pattern, values = chosen(features, source)
            at = (pattern.indices * n_columns + country[pattern.tokens]).cpu()
            activation[source].index_add_(0, at, values.double().cpu())
            fires[source].index_add_(0, at, (values > 0).double().cpu())
    shape = (transcoder.n_sources, transcoder.d_features, n_columns)
    return Mass(activation.view(shape), fires.view(shape), n_tokens), torch.cat(others)[:N_OTHERS]


@cache
def _held_out(n_documents: int) -> list[str]:
    texts = dict.fromkeys(d.text for d in islice(world.documents(SEED), n_documents))
    return [text for text in texts if split_of(text) is Split.evaluation]


def _packed(lm: LanguageModel, texts: list[str]) -> Text:
    ids = lm.tokenizer(texts, add_special_tokens=False)["input_ids"]
    stream = np.concatenate([[*document, lm.eos_token_id] for document in ids])
    n = len(stream) // (CONTEXT - 1)
    tokens = torch.full((n, CONTEXT), lm.tokenizer.bos_token_id)
    tokens[:, 1:] = torch.from_numpy(stream[: n * (CONTEXT - 1)]).view(n, -1)
    number = torch.full((lm.vocab_size,), len(facts.COUNTRIES))
    number[country_ids(lm)] = torch.arange(len(facts.COUNTRIES))
    return Text(tokens, number[tokens])
