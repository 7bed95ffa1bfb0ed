"""How good is a finished transcoder? Held-out text only, the model's units, sums in float64 (`core/metrics.py`).

Two rules are measured: the fixed thresholds, which graphs and exports use (the headline), and, where it is another
one, the rule of training (`exact`). A rule that looks at the batch has its L0 and FVU measured on shuffled batches of
training size and cannot replace anything live.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pipeline.arch.base import Transcoder
from pipeline.core.metrics import Divergence, Firing, Reconstruction
from pipeline.core.sparse import Sparse
from pipeline.data.models import LanguageModel
from pipeline.data.world import encode_task, tasks
from pipeline.interp.replacement import NOTES, Basis, ReplacementModel, TeacherForced, ablated_logits
from pipeline.progress import Progress

Logits = Callable[[Tensor], Tensor]


class HeldOut(NamedTuple):
    """Held-out text with its activations."""

    contexts: np.ndarray
    """int32 [n_contexts, T]"""
    n_rows: int
    """Tokens at positions >= 1 that are no padding, in context order."""
    x: Tensor
    """[n_rows, L, D] at the transcoder's site, in the model's units"""
    y: Tensor
    """[n_rows, L, D], what it reconstructs"""


@torch.no_grad()
def features_and_reconstruction(model: Transcoder, held_out: HeldOut, batches: Iterator[Tensor]) -> dict[str, Any]:
    """L0, firing density, dead features, FVU and explained variance. `batches` are row numbers."""
    firing = Firing(model.n_sources, model.d_features)
    reconstruction = Reconstruction(*model.dims)
    device = model.b_enc.device
    for rows in batches:
        out = model(held_out.x[rows].to(device))
        firing.update(out.features.dense() if isinstance(out.features, Sparse) else out.features)
        reconstruction.update(out.y_hat, held_out.y[rows])
    return {
        "l0": firing.l0(),
        "dead_fraction": firing.dead_fraction(),
        "fvu": reconstruction.fvu(),
        "explained_variance": reconstruction.explained_variance(),
        "density_histogram": firing.density_histogram(),
    }


def replacements(
    lm: LanguageModel, models: dict[str, ReplacementModel | TeacherForced], y_mean: Tensor
) -> dict[str, Logits]:
    """What takes the MLPs' place, by name: the transcoders, and zero and mean ablation as baselines."""
    return {
        **{name: model.logits for name, model in models.items()},
        "zero_ablation": partial(ablated_logits, lm, torch.zeros_like(y_mean)),
        "mean_ablation": partial(ablated_logits, lm, y_mean),
    }


def divergences(
    lm: LanguageModel, replaced: dict[str, Logits], contexts: np.ndarray, n_rows: int, batch_tokens: int
) -> dict[str, Divergence]:
    """KL, top-1 agreement and delta CE of each replacement on the contexts. Position 0 and padding are not scored."""
    results = {name: Divergence() for name in replaced}
    tokens = torch.from_numpy(contexts.astype(np.int64))
    valid = valid_positions(tokens.shape[0], tokens.shape[1], n_rows)
    size = max(1, batch_tokens // tokens.shape[1])
    with Progress(n_rows, "tok", "replace") as bar:
        for start in range(0, tokens.shape[0], size):
            block, scored = tokens[start : start + size], valid[start : start + size]
            # The next token is known, and a row, except behind the last row of a context.
            has_next = scored & torch.cat([scored[:, 1:], torch.zeros_like(scored[:, :1])], dim=1)
            following = block.roll(-1, dims=1)
            original = lm.logits(block)
            for name, logits in replaced.items():
                results[name].update(original, logits(block), scored, following, has_next)
            bar.update(int(scored.sum()))
    return results


def replacement_metrics(results: dict[str, Divergence], name: str, basis: Basis) -> dict[str, float | str]:
    """The `replacement` group of metrics.json for one of the transcoders, the baselines beside it."""
    ours = results[name]
    flat: dict[str, float | str] = {"basis": str(basis)}
    if basis in NOTES:
        flat["note"] = NOTES[basis]
    flat |= {"kl": ours.kl, "top1": ours.top1, "ce_original": ours.ce_original, "delta_ce": ours.delta_ce}
    for baseline in ("zero_ablation", "mean_ablation"):
        flat[f"kl_{baseline}"] = results[baseline].kl
        flat[f"top1_{baseline}"] = results[baseline].top1
        flat[f"delta_ce_{baseline}"] = results[baseline].delta_ce
        flat[f"kl_recovered_{baseline}"] = 1 - ours.kl / results[baseline].kl
    return flat


def world_tasks(lm: LanguageModel, replaced: dict[str, Logits]) -> dict[str, Any]:
    """Accuracy on each task of the built-in world, of the model itself and of each replacement."""
    runs: dict[str, Logits] = {"original": lm.logits, **replaced}
    sets = {}
    for task in tasks():
        tokens, last, answer = map(torch.from_numpy, encode_task(task, lm.tokenizer, lm.tokenizer.bos_token_id))
        rows = torch.arange(tokens.shape[0])
        sets[f"{task.name}/{task.split}"] = {
            "n": tokens.shape[0],
            **{
                name: float((logits(tokens).cpu()[rows, last].argmax(-1) == answer).double().mean())
                for name, logits in runs.items()
            },
        }
    mean = {name: sum(s[name] for s in sets.values()) / len(sets) for name in runs}
    return {"mean": mean, "sets": sets}


def valid_positions(n_contexts: int, context: int, n_rows: int) -> Tensor:
    """Which positions are rows: all but position 0, up to the last row. bool [n_contexts, T]"""
    row = torch.arange(n_contexts)[:, None] * (context - 1) + torch.arange(context)[None] - 1
    valid = row < n_rows
    valid[:, 0] = False
    return valid
