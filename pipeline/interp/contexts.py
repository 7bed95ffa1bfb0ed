"""eval/contexts.npz: the sums of each evaluation context, from which intervals are drawn and runs compared in pairs.

    n_tokens [C], n_next [C]    scored positions of a context, and those whose next token is scored too
    context_hash uint64 [C]     of its tokens: only the same contexts are compared
    threshold/<name>            `Firing.sums` and `Reconstruction.sums` (core/metrics.py), `Divergence.sums`
    exact/<name>                (core/metrics_predictions.py), whose docstrings give names and shapes: [C], [C, L], ...
    zero_ablation/<name>, mean_ablation/<name>      `Divergence.sums` of the baselines

Rules and names are absent where there was nothing to measure.
"""

import hashlib
import io
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pipeline.core import bootstrap
from pipeline.core.metrics import Sums, Tree, as_plain, fit_numbers
from pipeline.core.metrics_predictions import replacement_numbers
from pipeline.errors import UserError
from pipeline.files import write_aside

NAME = "contexts.npz"
BASELINES = ("zero_ablation", "mean_ablation")

SHARED = ("n_tokens", "n_next")
"""The same under every rule, so stored once."""


class Contexts(NamedTuple):
    """What an evaluation summed by context."""

    context_hash: np.ndarray
    """uint64 [C]"""
    sums: dict[str, dict[str, Tensor]]
    """By rule (threshold, exact) or baseline, then by name: float64 [C, ...]."""


def hashes(contexts: np.ndarray, n_tokens: np.ndarray) -> np.ndarray:
    """One of each context's tokens, without the padding. contexts int32 [C, T], n_tokens [C] -> uint64 [C]"""
    texts = [row[: 1 + int(n)].astype("<i4").tobytes() for row, n in zip(contexts, n_tokens, strict=True)]
    digests = [hashlib.sha256(text).digest()[:8] for text in texts]
    return np.frombuffer(b"".join(digests), dtype="<u8")


def write(file: Path, contexts: Contexts) -> None:
    """The file at once."""
    shared: dict[str, Tensor] = {}
    arrays: dict[str, np.ndarray] = {"context_hash": contexts.context_hash}
    for rule, sums in contexts.sums.items():
        shared |= {name: sums[name] for name in SHARED if name in sums}
        arrays |= {f"{rule}/{name}": values.numpy() for name, values in sums.items() if name not in SHARED}
    buffer = io.BytesIO()
    np.savez(buffer, **arrays, **{name: values.numpy() for name, values in shared.items()})  # type: ignore[arg-type]
    write_aside(file, buffer.getvalue())


def read(file: Path) -> Contexts:
    """What `write` wrote. UserError where there is none: runs measured by earlier versions have no such file."""
    if not file.exists():
        raise UserError(f"{file} does not exist; measure the run again with clt eval run={file.parent.parent}")
    with np.load(file, allow_pickle=False) as arrays:
        found = {name: arrays[name] for name in arrays.files}
    shared = {name: torch.from_numpy(found[name]) for name in SHARED if name in found}
    sums: dict[str, dict[str, Tensor]] = {}
    for name, values in found.items():
        rule, _, key = name.partition("/")
        if key:
            sums.setdefault(rule, dict(shared))[key] = torch.from_numpy(values)
    return Contexts(found["context_hash"], sums)


def numbers(sums: dict[str, dict[str, Tensor]], rule: str) -> Tree:
    """Every ratio of sums of a rule, in the groups of metrics.json: `replacement` is None where nothing was replaced.
    The sums may have leading axes, as resampled ones have; leaves are tensors."""
    own = sums[rule]
    baselines: dict[str, Sums] = {name: sums[name] for name in BASELINES if name in sums}
    replaced = replacement_numbers(own, baselines) if "kl_sum" in own else None
    return {**fit_numbers(own), "replacement": replaced}


def totals(sums: dict[str, dict[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
    """Of all contexts together, [...] each."""
    return {rule: {name: values.sum(dim=0) for name, values in own.items()} for rule, own in sums.items()}


def resample(sums: dict[str, dict[str, Tensor]], resamples: int, seed: int = 0) -> dict[str, dict[str, Tensor]]:
    """`bootstrap.resample` of all rules and baselines with the same draws."""
    flat = {f"{rule}/{name}": values for rule, own in sums.items() for name, values in own.items()}
    found: dict[str, dict[str, Tensor]] = {}
    for path, values in bootstrap.resample(flat, resamples, seed).items():
        rule, _, name = path.partition("/")
        found.setdefault(rule, {})[name] = values
    return found


def intervals(drawn: Tree) -> Tree:
    """`numbers` of resampled sums -> the same tree with [low, high] in place of each number."""
    nested = {key: intervals(value) if isinstance(value, dict) else value for key, value in drawn.items()}
    return as_plain(
        {key: bootstrap.interval(value) if isinstance(value, Tensor) else value for key, value in nested.items()}
    )


def paired(first: Contexts, second: Contexts, rule: str = "threshold", resamples: int = bootstrap.RESAMPLES) -> Tree:
    """second - first, on the contexts that both have: {"n_contexts", "difference": the tree of `numbers`, "ci95": the
    same tree}. A number that one of them does not have, or has in another shape, is left out. UserError where they
    share fewer than two contexts, or were measured under rules of which one has none."""
    here, there = _shared(first.context_hash, second.context_hash)
    if len(here) < 2:
        raise UserError(
            f"the evaluations share {len(here)} contexts, and a paired comparison needs 2; "
            "measure both runs on the same text"
        )
    if rule not in first.sums or rule not in second.sums:
        raise UserError(f"only one of the runs was measured under the rule {rule}; compare rule=threshold")
    sides = [
        {name: {key: values[rows] for key, values in own.items()} for name, own in contexts.sums.items()}
        for contexts, rows in ((first, here), (second, there))
    ]
    drawn = [resample(side, resamples) for side in sides]  # the same seed and number of contexts: the same draws
    return {
        "n_contexts": len(here),
        "difference": as_plain(_minus(*(numbers(totals(side), rule) for side in sides))),
        "ci95": intervals(_minus(*(numbers(side, rule) for side in drawn))),
    }


def _minus(first: Tree, second: Tree) -> Tree:
    found: dict[str, Any] = {}
    for key, value in first.items():
        other = second.get(key)
        if isinstance(value, dict) and isinstance(other, dict):
            found[key] = _minus(value, other)
        elif isinstance(value, Tensor) and isinstance(other, Tensor) and value.shape == other.shape:
            found[key] = other - value
    return found


def _shared(first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the same contexts in both. A context that occurs twice is paired once for each that the other has too."""
    rows: dict[int, list[int]] = {}
    for row, key in reversed(list(enumerate(second.tolist()))):
        rows.setdefault(key, []).append(row)
    pairs = [(row, rows[key].pop()) for row, key in enumerate(first.tolist()) if rows.get(key)]
    here, there = zip(*pairs, strict=True) if pairs else ((), ())
    return np.array(here, dtype=np.int64), np.array(there, dtype=np.int64)
