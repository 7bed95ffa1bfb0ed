"""What is scored, and that how it is batched does not matter."""

from typing import cast

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.data.models import LanguageModel
from pipeline.interp.evaluation import divergences, valid_positions

V = 11


class Lookup:
    """A language model whose logits are a table of the token."""

    def __init__(self, seed: int) -> None:
        self.table = torch.randn(V, V, generator=torch.Generator().manual_seed(seed))

    def logits(self, tokens: Tensor) -> Tensor:
        return self.table[tokens]


def test_position_0_and_padding_are_not_scored() -> None:
    valid = valid_positions(3, 5, n_rows=10)
    assert valid.tolist() == [
        [False, True, True, True, True],
        [False, True, True, True, True],
        [False, True, True, False, False],
    ]


@pytest.mark.parametrize("batch_tokens", [1, 13, 1000])
def test_divergences_are_sums_over_scored_tokens_whatever_the_batches(batch_tokens: int) -> None:
    n, context, n_rows = 5, 6, 23
    contexts = np.random.default_rng(0).integers(0, V, (n, context), dtype=np.int32)
    original, replaced = Lookup(0), Lookup(1)
    model = cast(LanguageModel, original)
    found = divergences(model, {"other": replaced.logits}, contexts, n_rows, batch_tokens)["other"]
    kl, same, rise, n_next = 0.0, 0, 0.0, 0
    for row in range(n_rows):
        c, position = row // (context - 1), 1 + row % (context - 1)
        p = original.table[contexts[c, position]].double().softmax(-1)
        q = replaced.table[contexts[c, position]].double().softmax(-1)
        kl += float((p * (p / q).log()).sum())
        same += int(p.argmax() == q.argmax())
        if position + 1 < context and row + 1 < n_rows:
            following = contexts[c, position + 1]
            rise += float((p[following] / q[following]).log())
            n_next += 1
    assert found.n == n_rows
    assert found.kl == pytest.approx(kl / n_rows, rel=1e-12)
    assert found.top1 == same / n_rows
    assert found.n_next == n_next
    assert found.delta_ce == pytest.approx(rise / n_next, rel=1e-12)
