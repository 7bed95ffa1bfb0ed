"""Measured features as records (the JSON of `feature_files.py`) and as rows of two tables.

features.parquet    a row a feature: layer, feature, label, counts, quantiles, logits, norms, related features
contexts.parquet    a row an example: layer, feature, part, activation, tokens with their activations
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.arch.base import Transcoder
from pipeline.data.models import LanguageModel
from pipeline.interp.dashboards import feature_activity, feature_labels, feature_weights
from pipeline.interp.dashboards.feature_activity import Activity, Together
from pipeline.interp.dashboards.feature_examples import part_name
from pipeline.interp.dashboards.feature_files import Record
from pipeline.interp.dashboards.feature_options import FeatureOptions
from pipeline.interp.dashboards.feature_text import FeatureText, Words
from pipeline.interp.dashboards.feature_weights import Named
from pipeline.interp.dashboards.features import Chosen, Measured

if TYPE_CHECKING:
    import pyarrow as pa  # type: ignore[import-untyped]


class Weights(NamedTuple):
    """Of n features, from the weights and from joint activity."""

    norms: NDArray[np.float32]
    """[n, L]"""
    top: Named | None
    bottom: Named | None
    alike: Named | None
    together: Together | None


@torch.inference_mode()
def weights(
    lm: LanguageModel, transcoder: Transcoder, chosen: Chosen, active: Activity | None, options: FeatureOptions
) -> Weights:
    """None where an architecture, or the options, have none."""
    norms, tops, bottoms, near = [], [], [], []
    all_norms = transcoder.decoder_norms() if transcoder.directions and options.related else None
    for source in range(transcoder.n_sources):
        _, ids = chosen.of(source)
        if not len(ids) or not transcoder.directions:
            continue
        ids = ids.to(transcoder.b_dec.device)
        norms.append(feature_weights.norms_by_target(transcoder, source, ids))
        if options.logits and feature_weights.has_logits(transcoder):
            top, bottom = feature_weights.logits(lm, transcoder, source, ids, options.logits)
            tops.append(top)
            bottoms.append(bottom)
        if all_norms is not None:
            near.append(feature_weights.alike(transcoder, source, ids, all_norms, options.related))
    empty = torch.zeros(len(chosen.source), transcoder.dims.n_layers)
    met = None
    if active is not None:
        met = feature_activity.together(active, chosen.identity(transcoder.d_features), options.related)
    return Weights((torch.cat(norms) if norms else empty).numpy(), _joined(tops), _joined(bottoms), _joined(near), met)


def _joined(parts: list[Named]) -> Named | None:
    return Named(*(torch.cat(both) for both in zip(*parts, strict=True))) if parts else None


class Records:
    """The records of measured features, one at a time."""

    def __init__(
        self, name: str, text: FeatureText, words: Words, chosen: Chosen, measured: Measured, weights: Weights,
        d_features: int, options: FeatureOptions,
    ) -> None:  # fmt: skip
        """name: of the transcoder, which stands in every record."""
        self._name, self._text, self._words, self._chosen = name, text, words, chosen
        self._measured, self._weights, self._d_features, self._options = measured, weights, d_features, options
        self._starts = np.searchsorted(measured.examples.feature, np.arange(len(chosen.source) + 1))
        self._values = rounded(measured.windows.values)
        self._quantiles = rounded(np.nan_to_num(measured.quantile_values))

    def __iter__(self) -> Iterator[Record]:
        return (self.of(i) for i in range(len(self._chosen.source)))

    def of(self, i: int) -> Record:
        """Of the i-th feature."""
        sums, found = self._measured.sums, self._weights
        count = int(sums.count[i])
        parts = self._examples(i)
        top_tokens = feature_labels.top_tokens(parts[0]["examples"])
        low, high = rounded(np.array([sums.lowest[i], sums.highest[i]])).tolist() if count else (0.0, 0.0)
        return {
            "transcoder_id": self._name,
            "index": int(self._chosen.feature[i]),
            "layer": int(self._chosen.source[i]),
            "label": feature_labels.label(top_tokens),
            "examples_quantiles": [part for part in parts if part["examples"]],
            "top_logits": self._texts(found.top, i),
            "bottom_logits": self._texts(found.bottom, i),
            "act_min": low,
            "act_max": high,
            "quantile_values": self._quantiles[i].tolist() if count else [],
            "histogram": self._measured.windows.histogram[i].tolist() if count else [],
            "activation_frequency": count / self._text.n_rows,
            "n_active": count,
            "act_mean": float(f"{sums.total[i] / count:.5g}") if count else 0.0,
            "top_tokens": top_tokens,
            "top_logit_values": _numbers(found.top, i),
            "bottom_logit_values": _numbers(found.bottom, i),
            "decoder_norms": rounded(found.norms[i]).tolist(),
            "related": {"decoder": self._alike(i), "active": self._together(i)},
        }

    def _examples(self, i: int) -> list[Record]:
        windows, examples = self._measured.windows, self._measured.examples
        names = [part_name(part, self._options.quantiles) for part in range(self._options.quantiles + 1)]
        parts: list[Record] = [{"quantile_name": name, "examples": []} for name in names]
        for e in range(self._starts[i], self._starts[i + 1]):
            start, stop = int(windows.start[e]), int(windows.stop[e])
            tokens = self._text.contexts[windows.context[e], start:stop]
            parts[examples.part[e]]["examples"].append({
                "tokens": self._words.of(tokens),
                "tokens_acts_list": [value or 0 for value in self._values[e, : stop - start].tolist()],
                "train_token_ind": int(windows.peak[e]),
                "is_repeated_datapoint": bool(examples.repeated[e]),
                "context": int(windows.context[e]),
            })  # fmt: skip
        return parts

    def _texts(self, named: Named | None, i: int) -> list[str]:
        return [] if named is None else [self._words(token) for token in named.ids[i].tolist()]

    def _alike(self, i: int) -> list[list[float]]:
        near = self._weights.alike
        if near is None:
            return []
        values = rounded(near.value[i].numpy()).tolist()
        return [[*divmod(n, self._d_features), value] for n, value in zip(near.ids[i].tolist(), values, strict=True)]

    def _together(self, i: int) -> list[list[float]]:
        met = self._weights.together
        if met is None:
            return []
        rows = zip(met.ids[i], met.score[i], met.tokens[i], strict=True)
        return [[*divmod(n, self._d_features), float(f"{score:.5g}"), tokens] for n, score, tokens in rows]


def rounded(values: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
    """To five digits, so that files are small. Any shape."""
    exact = values.astype(np.float64)
    size = np.floor(np.log10(np.abs(exact), out=np.zeros_like(exact), where=exact != 0))
    scale = 10.0 ** np.abs(4 - size)
    return np.where(size <= 4, np.rint(exact * scale) / scale, np.rint(exact / scale) * scale)


def _numbers(named: Named | None, i: int) -> list[float]:
    return [] if named is None else rounded(named.value[i].numpy()).tolist()


def schemas() -> "tuple[pa.Schema, pa.Schema]":
    """Of features.parquet and contexts.parquet."""
    import pyarrow as pa

    texts, numbers, near = pa.list_(pa.string()), pa.list_(pa.float32()), pa.int32()
    decoder = pa.list_(pa.struct([("layer", near), ("feature", near), ("cosine", pa.float32())]))
    active = pa.list_(pa.struct([("layer", near), ("feature", near), ("score", pa.float32()), ("tokens", pa.int64())]))
    tokens = pa.list_(pa.struct([("text", pa.string()), ("share", pa.float32())]))
    features = pa.schema([
        ("layer", pa.int32()), ("feature", pa.int32()), ("label", pa.string()), ("n_active", pa.int64()),
        ("activation_frequency", pa.float64()), ("act_min", pa.float32()), ("act_max", pa.float32()),
        ("act_mean", pa.float32()), ("quantile_values", numbers), ("histogram", pa.list_(pa.int64())),
        ("top_tokens", tokens), ("top_logits", texts), ("top_logit_values", numbers), ("bottom_logits", texts),
        ("bottom_logit_values", numbers), ("decoder_norms", numbers), ("related_decoder", decoder),
        ("related_active", active),
    ])  # fmt: skip
    contexts = pa.schema([
        ("layer", pa.int32()), ("feature", pa.int32()), ("quantile_name", pa.string()), ("rank", pa.int32()),
        ("context", pa.int64()), ("activation", pa.float32()), ("peak", pa.int32()), ("tokens", texts),
        ("activations", numbers), ("repeated", pa.bool_()),
    ])  # fmt: skip
    return features, contexts


def feature_row(record: Record) -> Record:
    """Of features.parquet."""
    related = record["related"]
    return record | {
        "feature": record["index"],
        "top_tokens": [{"text": text, "share": share} for text, share in record["top_tokens"]],
        "related_decoder": [dict(zip(("layer", "feature", "cosine"), one, strict=True)) for one in related["decoder"]],
        "related_active": [
            dict(zip(("layer", "feature", "score", "tokens"), one, strict=True)) for one in related["active"]
        ],
    }


def context_rows(record: Record) -> Iterator[Record]:
    """Of contexts.parquet."""
    for part in record["examples_quantiles"]:
        for rank, example in enumerate(part["examples"]):
            peak = example["train_token_ind"]
            yield {
                "layer": record["layer"],
                "feature": record["index"],
                "quantile_name": part["quantile_name"],
                "rank": rank,
                "context": example["context"],
                "activation": example["tokens_acts_list"][peak],
                "peak": peak,
                "tokens": example["tokens"],
                "activations": example["tokens_acts_list"],
                "repeated": example["is_repeated_datapoint"],
            }
