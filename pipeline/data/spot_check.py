"""Whether what was stored is what the model computes: a few contexts again, before a cache is called finished
(`spot_check`), and later of a finished one (`check_again`).

Each context runs alone, in a batch of another shape than the one that was stored, and its rows are looked up where a
reader will look for them. So a wrong order, a wrong position, a torn file or a model that is not deterministic shows.
Compared are, in norm over all rows of a layer:

    stored     resid_mid and mlp_out on disk against those computed again
    mlp_in     the norm applied to the stored resid_mid against what the MLP really reads
    kl         KL(original || with the stored outputs in place of the MLPs), nats a token

Where a codec is lossy, rows computed again go through it before they are compared: what differs then is what differs
without it, so the tolerance stays that of rounding, and swapped or zeroed rows differ by about 1 as before. mlp_in and
kl are compared with the model itself, and may differ by what the codec costs the rows computed again as well.

Training rows without mlp_out (cache.targets=recompute) take part with what is recomputed from their resid_mid. Whether
that is the model's own output is measured besides, from resid_mid of the same pass (`data/recompute.py`).
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.core.normalize import MlpNorm
from pipeline.data.cache import Cache
from pipeline.data.codecs import Int8
from pipeline.data.layout import STORED, little, prefix, stored
from pipeline.data.models import LanguageModel
from pipeline.data.plan import Plan
from pipeline.data.recompute import Comparison, Exactness
from pipeline.data.scales import prepare
from pipeline.data.shards import read_shard
from pipeline.data.shuffle import Permutation
from pipeline.data.tokens import Split
from pipeline.errors import UserError

N_CONTEXTS = 3
"""Of the training split; the evaluation split has one more."""

TOLERANCE = {torch.float32: 2**-7, torch.bfloat16: 2**-4}
"""Of a difference in norm. Rounding to bfloat16 is 2^-9; arithmetic in bfloat16 adds some of it in every layer. A row
that belongs to another token differs by about 1."""

MOST_KL = 0.05
"""Nats a token. Zeroed MLPs cost several."""


class Check(NamedTuple):
    """Largest differences over the layers and contexts that were compared."""

    n_rows: int
    resid_mid: float
    mlp_out: float
    mlp_in: float
    kl: float
    recomputed: Exactness | None = None
    """Of a cache whose targets are recomputed."""

    def __str__(self) -> str:
        more = "" if self.recomputed is None else f"; {self.recomputed}"
        return (
            f"{self.n_rows} rows computed again: resid_mid differs by {self.resid_mid:.1g} of its norm, "
            f"mlp_out by {self.mlp_out:.1g}, mlp_in by {self.mlp_in:.1g}; "
            f"the stored outputs in place of the MLPs cost {self.kl:.1g} nats (KL){more}"
        )


class Sample(NamedTuple):
    """A context and what is stored of it."""

    tokens: Tensor
    """int64 [1, T]"""
    stored: dict[str, Tensor]
    """resid_mid and, where it is stored, mlp_out, decoded, bfloat16 [n, L, D]: positions 1 to n."""
    codes: dict[str, Int8]
    """Those of a lossy codec."""


def spot_check(model: LanguageModel, plan: Plan) -> Check:
    """Of what has been written, before it is a cache. Raises UserError, with layer and site, when something differs by
    more than rounding."""
    codes = prepare(plan, None).by_name
    chosen = _spread(len(plan.packed[Split.train].contexts), N_CONTEXTS)
    places = [*((Split.train, context) for context in chosen), (Split.evaluation, 0)]
    samples = (_sample(plan, split, i, codes if split is Split.train else {}) for split, i in places)
    fix = f"the cache was not finished. Remove {plan.path} and extract again, with model.dtype=float32 if it stays so"
    recomputes = stored(plan.specs) != STORED
    return compare(model, plan.norm, samples, fix, recomputes)


def check_again(model: LanguageModel, cache: Cache, n_contexts: int) -> Check:
    """Of a finished cache: `n_contexts` training contexts, found and read as a trainer does it, and the first context
    of each held-out split. Raises UserError as `spot_check` does, and for a damaged chunk."""
    fix = f"this model did not make this cache, or the cache is damaged. Remove {cache.path} and extract again"
    return compare(model, cache.norm, _read(cache, n_contexts), fix, cache.stored != STORED)


def compare(
    model: LanguageModel, norm: MlpNorm, samples: Iterable[Sample], fix: str, recomputes: bool = False
) -> Check:
    """Computes the samples again. Raises UserError, with layer, site and fix, when something differs by more than
    rounding; recomputes: also when MLP outputs from resid_mid do."""
    norm = norm.to(str(model.device))
    mlps = model.mlps() if recomputes else None
    recomputed = Comparison(model.n_layers, model.d_model)
    n_rows, worst = 0, {"resid_mid": 0.0, "mlp_out": 0.0, "mlp_in": 0.0}
    kls: list[float] = []
    allowed: list[float] = []
    for tokens, on_disk, codes in samples:
        on_device = {name: rows.to(model.device) for name, rows in on_disk.items()}
        n = len(on_device["resid_mid"])
        exact = {name: sites[0, :n] for name, sites in zip(STORED, model.collect(tokens, first=1), strict=True)}
        again = {name: _coded(rows.bfloat16(), codes.get(name)) for name, rows in exact.items()}
        if mlps is not None:
            recomputed.add(mlps(again["resid_mid"]), exact["mlp_out"])
            recomputed.result().check(model)
            if "mlp_out" not in on_device:
                on_device["mlp_out"] = mlps(on_device["resid_mid"]).bfloat16()
        mlp_in = model.mlp_inputs(tokens)[0, 1 : n + 1]
        own = _relative(norm(again["resid_mid"]), mlp_in) if codes else torch.zeros(len(model.layers))
        again["mlp_in"] = mlp_in
        for name, seen in (on_device | {"mlp_in": norm(on_device["resid_mid"])}).items():
            errors = _relative(seen, again[name])
            worst[name] = max(worst[name], errors.max().item())
            beyond = errors - (own.to(errors) if name == "mlp_in" else 0)
            if not beyond.max() <= TOLERANCE[model.dtype]:  # not <=: NaN is a difference too
                layer = int(beyond.argmax())
                where = f"{name} of layer {model.layers[layer]}"
                how = f"differs by {errors[layer].item():.2g} of its norm from what is stored"
                raise UserError(f"{where}, computed again, {how}; {fix}")
        kls.append(_kl(model, tokens, on_device["mlp_out"]))
        allowed.append(MOST_KL + (_kl(model, tokens, again["mlp_out"]) if codes else 0))
        n_rows += n
    check = Check(n_rows, **worst, kl=float(np.mean(kls)), recomputed=recomputed.result() if mlps else None)
    if not check.kl <= np.mean(allowed):
        cost = f"costs {check.kl:.2g} nats"
        raise UserError(f"putting the stored MLP outputs back, computed again, {cost}; {fix}")
    return check


def _spread(n: int, n_chosen: int) -> list[int]:
    """Contexts of n, the last one (which may be padded) among them."""
    return sorted({round(i * (n - 1) / max(1, n_chosen - 1)) for i in range(n_chosen)})


def _int64(context: NDArray[np.int32]) -> Tensor:
    """[T] -> [1, T]"""
    return torch.from_numpy(context[None].astype(np.int64))


def _read(cache: Cache, n_contexts: int) -> Iterator[Sample]:
    width, order = cache.context - 1, Permutation(cache.n_rows, cache.attributes["seed"])
    codes = {name: code for name in cache.stored if (code := cache.code(name)) is not None}
    for context in _spread(len(cache.tokens), n_contexts):
        t = np.arange(context * width, min((context + 1) * width, cache.n_rows))
        yield Sample(_int64(cache.tokens[context]), _rows(cache, order.forward(t)), codes)
    for split in (Split.calibration, Split.evaluation):
        contexts, resid_mid, mlp_out = cache.held_out(split)
        yield Sample(_int64(contexts[0]), {"resid_mid": resid_mid[:width], "mlp_out": mlp_out[:width]}, {})


def _rows(cache: Cache, rows: NDArray[np.int64]) -> dict[str, Tensor]:
    """Training rows by their numbers, bfloat16 [n, L, D]."""
    found = {}
    for name in cache.stored:
        spec = cache.specs[name]
        values = torch.empty(len(rows), *spec.shape[1:], dtype=torch.bfloat16)
        for chunk in np.unique(rows // spec.chunk_rows):
            inside = rows // spec.chunk_rows == chunk
            values[inside] = cache.rows(name, int(chunk))[rows[inside] - chunk * spec.chunk_rows]
        found[name] = values
    return found


def _sample(plan: Plan, split: Split, context: int, codes: dict[str, Int8]) -> Sample:
    """A context and its rows as they are on disk."""
    packed = plan.packed[split]
    width = packed.contexts.shape[1] - 1
    t = np.arange(context * width, min((context + 1) * width, packed.n_rows))
    rows = Permutation(packed.n_rows, plan.about["seed"]).forward(t) if split is Split.train else t
    found = {}
    for name in stored(plan.specs, split):
        array = prefix(split) + name
        spec = plan.specs[array]
        values = np.empty((len(rows), *spec.shape[1:]), little(spec.dtype))
        for chunk in np.unique(rows // spec.chunk_rows):
            inside = rows // spec.chunk_rows == chunk
            values[inside] = read_shard(spec, spec.file(plan.path, array, int(chunk)))[
                rows[inside] - chunk * spec.chunk_rows
            ]
        bits = torch.from_numpy(values)
        code = codes.get(name)
        decoded = torch.empty(values.shape, dtype=torch.bfloat16)
        found[name] = bits.view(torch.bfloat16) if code is None else code.decode(bits, decoded)
    return Sample(_int64(packed.contexts[context]), found, codes)


def _coded(rows: Tensor, code: Int8 | None) -> Tensor:
    """bfloat16 [n, L, D], as they are read back from where they are stored."""
    return rows if code is None else code.to(rows.device).again(rows)


def _relative(seen: Tensor, expected: Tensor) -> Tensor:
    """[n, L, D], [n, L, D] -> [L]: norm of the difference over the norm."""
    difference = (seen.float() - expected.float()).square().sum(dim=(0, 2))
    return (difference / expected.float().square().sum(dim=(0, 2)).clamp(min=torch.finfo(torch.float32).tiny)).sqrt()


def _kl(model: LanguageModel, tokens: Tensor, mlp_out: Tensor) -> float:
    """KL(original || outputs replaced by the stored ones), mean over the rows. mlp_out [n, L, D]"""
    n = len(mlp_out)

    def put_back(layer: int, resid: Tensor, own: Tensor) -> Tensor:
        replaced = own.clone()
        replaced[0, 1 : n + 1] = mlp_out[:, layer].to(own)
        return replaced

    p, q = (
        logits[0, 1 : n + 1].float().log_softmax(-1)
        for logits in (model.logits(tokens), model.logits(tokens, put_back))
    )
    return (p.exp() * (p - q)).sum(-1).mean().item()
