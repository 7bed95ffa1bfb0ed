"""What is true in the built-in world, held against a transcoder: tasks, country swaps, purity of features."""

from typing import Any

import torch

from pipeline.arch.base import Transcoder
from pipeline.core.metrics import Tree
from pipeline.data.models import LanguageModel
from pipeline.data.world import encode_task, swap_pairs, tasks
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


def world_tasks(lm: LanguageModel, rules: dict[str, Logits]) -> dict[str, Any]:
    """Accuracy on each task of the built-in world, of the model itself and of the replacement under each rule."""
    runs: dict[str, Logits] = {"original": lm.logits, **rules}
    found = tasks()
    sets = {}
    with Progress(sum(len(task.prompts) for task in found), "prompt", "tasks") as bar:
        for task in found:
            tokens, last, answer = map(torch.from_numpy, encode_task(task, lm.tokenizer, lm.tokenizer.bos_token_id))
            rows = torch.arange(tokens.shape[0])
            sets[f"{task.name}/{task.split}"] = {
                "n": tokens.shape[0],
                **{
                    name: float((logits(tokens).cpu()[rows, last].argmax(-1) == answer).double().mean())
                    for name, logits in runs.items()
                },
            }
            bar.update(tokens.shape[0])
    mean = {name: sum(s[name] for s in sets.values()) / len(sets) for name in runs}
    return {"mean": mean, "sets": sets}
