"""What is true in the built-in world, held against a transcoder: tasks, country swaps, purity of features."""

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.arch.base import Transcoder
from pipeline.core.metrics import Tree
from pipeline.data.models import LanguageModel
from pipeline.data.world import encode_task, swap_pairs, tasks
from pipeline.dist import pieces
from pipeline.dist.pieces import ALONE
from pipeline.dist.wire import Group
from pipeline.interp import country_swap, purity, world_text
from pipeline.interp.edits import Sides
from pipeline.interp.evaluation import Logits
from pipeline.interp.replacement import basis, no_basis
from pipeline.progress import Progress


@torch.inference_mode()
def measure(lm: LanguageModel, transcoder: Transcoder, batch_tokens: int, resamples: int = 0) -> tuple[Tree, Tree]:
    """`country_swap` (None where MLP outputs are not what is reconstructed) and `purity`, and their intervals; each
    file has the definitions. `lm` is the model of the built-in world, the transcoder in its units and with fixed
    thresholds."""
    sides = Sides(lm, transcoder)
    here, there = world_text.halves(lm)
    mass, _ = world_text.mass(sides, here, batch_tokens)
    values: Tree = {"purity": purity.score(sides, purity.choose(mass), there, batch_tokens)}
    if basis(transcoder) is None:
        return {"country_swap": None, "no_country_swap": no_basis(transcoder.options), **values}, {}
    # No prompt that is scored is among the text on which the features to swap are chosen.
    text = world_text.unasked(lm, {pair.source for pair in swap_pairs()})
    mass, others = world_text.mass(sides, text, batch_tokens)
    swap, ci95 = country_swap.measure(sides, country_swap.tell_apart(mass), others, resamples)
    return {"country_swap": swap, **values}, {"country_swap": ci95} if ci95 else {}


def world_tasks(
    lm: LanguageModel, rules: Mapping[str, Logits], batch_tokens: int, group: Group = ALONE
) -> dict[str, Any]:
    """Accuracy on each task of the built-in world, of the model itself and of the replacement under each rule. Prompts
    are divided over the ranks. rules: contexts int64 [n, T] -> logits of their last position [n, 1, V]"""
    runs: dict[str, Logits] = {"original": partial(lm.logits, last=True), **rules}
    found = tasks()
    encoded = [encode_task(task, lm.tokenizer, lm.tokenizer.bos_token_id) for task in found]
    prompts = [
        torch.from_numpy(row[: 1 + n]) for tokens, last, _ in encoded for row, n in zip(tokens, last, strict=True)
    ]
    answers = torch.from_numpy(np.concatenate([answer for *_, answer in encoded]))
    right = {name: torch.zeros(len(prompts), dtype=torch.float64) for name in runs}
    own = list(_by_length(prompts, batch_tokens))[group.rank :: group.size]
    with Progress(sum(map(len, own)), "prompt", "tasks") as bar:
        for numbers in own:
            tokens = torch.stack([prompts[i] for i in numbers])
            for name, logits in runs.items():
                right[name][numbers] = (logits(tokens)[:, -1].argmax(-1).cpu() == answers[numbers]).double()
            bar.update(len(numbers))
    for of_run in right.values():
        pieces.added(of_run, group, "tasks")
    sizes = [len(task.prompts) for task in found]
    by_task = zip(found, *(values.split(sizes) for values in right.values()), strict=True)
    sets = {
        f"{task.name}/{task.split}": {
            "n": len(task.prompts),
            **{name: float(values.mean()) for name, values in zip(runs, of_task, strict=True)},
        }
        for task, *of_task in by_task
    }
    mean = {name: sum(s[name] for s in sets.values()) / len(sets) for name in runs}
    return {"mean": mean, "sets": sets}


def _by_length(prompts: list[Tensor], batch_tokens: int) -> Iterator[list[int]]:
    """Numbers of prompts that are equally long, some at a time."""
    of_length: dict[int, list[int]] = {}
    for number, prompt in enumerate(prompts):
        of_length.setdefault(len(prompt), []).append(number)
    for length, numbers in sorted(of_length.items()):
        size = max(1, batch_tokens // length)
        yield from (numbers[start : start + size] for start in range(0, len(numbers), size))
