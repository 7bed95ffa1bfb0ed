"""The held-out loss and what it is held against."""

import math

import numpy as np
import pytest
import torch

from pipeline.data.tokens import Packed
from pipeline.train import lm_measure
from tests.train.tiny_lm import contexts, tiny_model


def test_the_loss_is_the_mean_negative_log_probability_of_the_next_token():
    torch.manual_seed(0)
    logits, tokens = torch.randn(3, 5, 7), torch.randint(7, (3, 5))
    slow = [-logits[n, t].log_softmax(-1)[tokens[n, t + 1]].item() for n in range(3) for t in range(4)]
    assert lm_measure.next_token_loss(logits, tokens).item() == pytest.approx(np.mean(slow), rel=1e-6)


def test_the_held_out_loss_weighs_every_context_alike():
    model = tiny_model()
    rows = contexts(lm_measure.EVAL_BATCH + 5)
    one_by_one = [lm_measure.evaluate(model, rows[i : i + 1]) for i in range(len(rows))]
    assert lm_measure.evaluate(model, rows) == pytest.approx(np.mean(one_by_one), rel=1e-5)


def test_the_unigram_entropy_counts_training_tokens_but_padding_and_first_positions(monkeypatch):
    monkeypatch.setattr(lm_measure, "COUNTED", 2)
    train = np.array([[0, 2, 2, 3], [0, 2, 4, 2], [0, 2, 1, 1]], dtype=np.int32)  # the last two are padding
    held_out = np.array([[0, 2, 5, 3]], dtype=np.int32)
    n = {2: 5, 3: 1, 5: 0}  # of 7 tokens
    expected = -np.mean([math.log((n[w] + 1) / (7 + 6)) for w in (2, 5, 3)])
    assert lm_measure.unigram_entropy(Packed(train, 7), held_out, 6) == pytest.approx(expected)
