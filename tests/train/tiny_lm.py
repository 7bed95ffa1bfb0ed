"""A language model of a few thousand weights, and contexts with a pattern that it can learn."""

import numpy as np
import torch

from pipeline.data.options import Dtype
from pipeline.train import lm_loop, lm_run, pretrain
from pipeline.train.options import LmOptions
from pipeline.train.schedule import learning_rate

TINY = LmOptions(
    name="tiny", n_layers=2, d_model=12, n_heads=3, d_mlp=20, n_steps=12, batch_tokens=40, dtype=Dtype.float32
)
SETTINGS = {"lm": {"seed": 0}, "dataset": {"context": 10}, "source": {"dataset": {"sha256": "a"}}}


def contexts(n, context=10, seed=0):
    """<bos>, then each token the one before it plus one."""
    start = np.random.default_rng(seed).integers(3, 40, size=(n, 1))
    tokens = (start + np.arange(context)).astype(np.int32)
    tokens[:, 0] = 0
    return tokens


def tiny_model(options=TINY, seed=0):
    torch.manual_seed(seed)
    return pretrain.build(options, n_words=57, context=10, bos=0, eos=1)


def fit(options, train, held_out, to, show=lambda: None):
    """-> the trained model and the last line of its metrics"""
    work = lm_run.start(to, SETTINGS)
    plan = lm_loop.make_plan(options, len(train), train.shape[1], torch.float32)
    model = tiny_model(options, options.seed)
    try:
        return model, lm_loop.fit(options, plan, model, train, held_out, work, show)
    finally:
        work.release()


class Stop(Exception):
    """What ends a run in the middle."""


def stop_at(step, monkeypatch):
    """Training raises Stop when it has come to so many steps, those of later runs included. -> the steps taken"""
    taken = []

    def failing(*args):
        taken.append(args)
        if len(taken) == step:
            raise Stop
        return learning_rate(*args)

    monkeypatch.setattr(lm_loop, "learning_rate", failing)
    return taken


def weights(model):
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
