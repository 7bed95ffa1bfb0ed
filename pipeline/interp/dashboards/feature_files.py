"""Feature files: what one feature is like, as circuit-tracer's and Neuronpedia's pages read it.

    {cantor}.json       one feature; cantor(l, f) = (l + f)(l + f + 1) / 2 + f of layer l and feature f
    index.json.gz       or all of them packed: by layer {filename, offsets [F + 1]} of layer_L.bin, whose records are
    layer_L.bin         the length, an unsigned 32-bit number, low byte first, and the JSON under zlib; no bytes where
                        there is no such feature

    {
      "transcoder_id": str, "index": int (the feature in its layer), "layer": int,
      "examples_quantiles": [{"quantile_name": str, "examples": [
          {"tokens": [str], "tokens_acts_list": [float], "train_token_ind": int (the token that it is shown for),
           "is_repeated_datapoint": bool, "context": int (of the text)}
      ]}],                                     "Top activations" first
      "top_logits": [str], "bottom_logits": [str], "act_min": float, "act_max": float,
      "quantile_values": [float] (percentiles 1 to 100 of the activations above 0),
      "histogram": [int] (counts over act_min to act_max), "activation_frequency": float (0 to 1)
    }

and keys that those pages pass over: `label` (the most activating tokens), `top_tokens` [[text, share]],
`top_logit_values`, `bottom_logit_values`, `decoder_norms` (by target layer, 0 where nothing is written),
`related` {"decoder": [[layer, feature, cosine]], "active": [[layer, feature, score, tokens]]}.
"""

import gzip
import json
import struct
import zlib
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.files import sync, write_aside

INDEX = "index.json.gz"
ABOUT = "about.json"
"""In the same directory: what was measured on what (`stages/features.py`)."""

Record = dict[str, Any]
"""The JSON of one feature."""


def cantor(layer: int, feature: int) -> int:
    """The one number that stands for both."""
    return (layer + feature) * (layer + feature + 1) // 2 + feature


def read(directory: Path, layer: int, feature: int) -> Record | None:
    """The feature file of a directory such as runs/NAME/features, None where it has none of this feature. Raises
    UserError for a file that holds something else."""
    file = directory / f"{cantor(layer, feature)}.json"
    data = file.read_bytes() if file.exists() else _packed(directory, layer, feature)
    if data is None:
        return None
    try:
        found = json.loads(data)
    except ValueError as error:
        raise UserError(f"{file} is no JSON ({error}); make the features again with clt features") from error
    if not isinstance(found, dict) or "examples_quantiles" not in found:
        raise UserError(f"{file} is no feature file; make the features again with clt features")
    return found


def label(directory: Path, layer: int, feature: int) -> str:
    """What a reader may call it: its most activating tokens; empty where nothing is known."""
    found = read(directory, layer, feature)
    return "" if found is None else str(found.get("label", ""))


def about(directory: Path) -> Record | None:
    """What `clt features` noted of a directory; None where it has written none."""
    file = directory / ABOUT
    return json.loads(file.read_text()) if file.exists() else None


def pack(directory: Path, n_features: int, n_layers: int) -> None:
    """Put the feature files into one file a layer with an index, and remove them; stopped on the way, it goes on."""
    ids = [(layer, feature) for layer in range(n_layers) for feature in range(n_features)]
    files = {pair: directory / f"{cantor(*pair)}.json" for pair in ids}
    if not (directory / INDEX).exists():
        index = [_layer_file(directory / f"layer_{layer}.bin", layer, n_features, files) for layer in range(n_layers)]
        sync(directory / entry["filename"] for entry in index)
        write_aside(directory / INDEX, gzip.compress(json.dumps(index).encode(), mtime=0))
    for file in files.values():
        file.unlink(missing_ok=True)


def _layer_file(to: Path, layer: int, n_features: int, files: dict[tuple[int, int], Path]) -> Record:
    """Write the records of a layer. -> its entry in the index"""
    offsets = [0]
    with to.open("wb") as out:
        for feature in range(n_features):
            file = files[layer, feature]
            if file.exists():
                record = zlib.compress(file.read_bytes(), 6)
                out.write(struct.pack("<I", len(record)) + record)
            offsets.append(out.tell())
    return {"filename": to.name, "offsets": offsets}


def _packed(directory: Path, layer: int, feature: int) -> bytes | None:
    file = directory / INDEX
    if not file.exists():
        return None
    index = json.loads(gzip.decompress(file.read_bytes()))
    layers = list(index.values()) if isinstance(index, dict) else index
    if layer >= len(layers) or feature + 1 >= len(layers[layer]["offsets"]):
        return None
    start, stop = layers[layer]["offsets"][feature : feature + 2]
    if start == stop:
        return None
    with (directory / layers[layer]["filename"]).open("rb") as records:
        records.seek(start)
        (length,) = struct.unpack("<I", records.read(4))
        return zlib.decompress(records.read(length))
