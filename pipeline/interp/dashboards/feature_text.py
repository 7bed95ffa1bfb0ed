"""The tokens whose features are described, and what the transcoder reads at them: a block of contexts at a time.

Held-out activations come from the cache. Those of training tokens lie scattered over its shards, so that they are
computed again by the language model, and rounded as the cache rounds them.
"""

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.arch.options import Site
from pipeline.core.normalize import MlpNorm
from pipeline.data import tokens as counts
from pipeline.data.cache import Cache
from pipeline.data.layout import little, prefix
from pipeline.data.models import LanguageModel
from pipeline.data.tokens import Split
from pipeline.errors import UserError
from pipeline.interp.dashboards.feature_options import Text
from pipeline.train.artifact import Trained

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SPLITS = {Text.evaluation: Split.evaluation, Text.calibration: Split.calibration}


class Block(NamedTuple):
    """Contexts start to stop; row t is position 1 + t % (T - 1) of context start + t // (T - 1)."""

    number: int
    start: int
    stop: int
    n_rows: int
    """Fewer than (stop - start) (T - 1) where the last context is padded."""


class FeatureText:
    """Contexts int32 [n, T] and their rows, in order. One epoch of blocks costs one reading of the cache, or one
    forward pass of the language model."""

    def __init__(
        self, cache: Cache, trained: Trained, lm: LanguageModel, split: Text, n_tokens: str, batch_tokens: int
    ) -> None:
        """Raises UserError for a number of tokens that is none."""
        self._cache, self._lm, self.split = cache, lm, split
        self._site, self._norm = trained.site, cache.norm
        held_out = SPLITS.get(split)
        self._arrays = "" if held_out is None else prefix(held_out)
        contexts = cache.tokens if held_out is None else cache.held_out_tokens(held_out)
        n_rows = cache.n_rows if held_out is None else cache.specs[f"{self._arrays}resid_mid"].shape[0]
        length = contexts.shape[1] - 1
        if n_tokens != "all":
            n_rows = min(n_rows, -(-counts.count(n_tokens) // length) * length)
        self.n_rows: int = n_rows
        self.contexts: NDArray[np.int32] = contexts[: -(-n_rows // length)]
        self.length = length
        """Rows of a context, T - 1."""
        if batch_tokens < 1:
            raise UserError(f"features.batch_tokens={batch_tokens} computes nothing; give 1 or more")
        self._step = max(1, batch_tokens // length)

    @property
    def context(self) -> int:
        """T"""
        return self.length + 1

    def blocks(self) -> list[Block]:
        """All of them, which cover every context once."""
        found = []
        for number, start in enumerate(range(0, len(self.contexts), self._step)):
            stop = min(len(self.contexts), start + self._step)
            rows = min(self.n_rows, stop * self.length) - start * self.length
            found.append(Block(number, start, stop, rows))
        return found

    def read(self, block: Block) -> Tensor:
        """What the transcoder reads at the block's rows, in the model's units: float32 [n_rows, L, D] on the device of
        the language model."""
        if self._arrays:
            first = block.start * self.length
            resid_mid = self._rows("resid_mid", first, block.n_rows)
            mlp_out = self._rows("mlp_out", first, block.n_rows) if self._site == Site.mlp_out else resid_mid
        else:
            tokens = torch.from_numpy(self.contexts[block.start : block.stop].astype(np.int64))
            both = self._lm.collect(tokens, first=1)
            resid_mid, mlp_out = (site.flatten(0, 1)[: block.n_rows].bfloat16() for site in both)
        return site_of(self._site, self._norm, resid_mid.float(), mlp_out.float()).to(self._lm.device)

    def _rows(self, name: str, first: int, n: int) -> Tensor:
        """Rows of a held-out array, bfloat16 [n, L, D]; no more is read than they are."""
        name = self._arrays + name
        spec = self._cache.specs[name]
        out = np.empty((n, *spec.shape[1:]), little(spec.dtype))
        done = 0
        while done < n:
            chunk, start = divmod(first + done, spec.chunk_rows)
            some = min(n - done, spec.chunk_rows - start)
            self._cache.read_rows(name, chunk, start, out[done : done + some])
            done += some
        return torch.from_numpy(out).view(torch.bfloat16)


def site_of(site: Site, norm: MlpNorm, resid_mid: Tensor, mlp_out: Tensor) -> Tensor:
    """What a transcoder of that site reads. [B, L, D], [B, L, D] -> [B, L, D]"""
    if site == Site.mlp_out:
        return mlp_out
    return norm.to(str(resid_mid.device))(resid_mid) if site == Site.mlp_in else resid_mid


class Words:
    """The text of each token as it stands in running text: " Paris" where a word begins with a space."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        self._tokenizer = tokenizer
        # Tokenizers drop a space where a text begins, so each token is read behind another one.
        ids = tokenizer("a the .", add_special_tokens=False)["input_ids"]
        self._before = [next((i for i in ids if i != tokenizer.unk_token_id), tokenizer.eos_token_id)]
        self._start = tokenizer.decode(self._before)
        self._known: dict[int, str] = {}

    def __call__(self, token: int) -> str:
        if token not in self._known:
            whole = self._tokenizer.decode([*self._before, token])
            is_longer = whole.startswith(self._start)
            self._known[token] = whole[len(self._start) :] if is_longer else self._tokenizer.decode([token])
        return self._known[token]

    def of(self, tokens: NDArray[np.int32]) -> list[str]:
        """int32 [n] -> n texts"""
        return [self(token) for token in tokens.tolist()]


def active(x: tuple[Tensor, ...], source: int, encoder: Tensor, bias: Tensor, threshold: Tensor) -> Tensor:
    """Activations of chosen features of a source, whose rows these are: [B, n], 0 where a feature is not active."""
    pre_acts = torch.nn.functional.linear(x[source], encoder, bias)
    return torch.where((pre_acts > threshold) & (pre_acts > 0), pre_acts, 0.0)
