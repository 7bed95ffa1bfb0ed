"""What the user may say about exports and imports. Free of torch, so that the command line starts at once."""

from dataclasses import dataclass
from enum import StrEnum

Format = StrEnum("Format", {"circuit-tracer": "circuit-tracer", "saelens": "saelens", "huggingface": "huggingface"})
"""Whose files are written. Hydra names the members of an enum, so they are called what they are."""


class StoredDtype(StrEnum):
    float32 = "float32"
    bfloat16 = "bfloat16"


@dataclass
class ExportOptions:
    dtype: StoredDtype = StoredDtype.float32
    """Of encoder, decoder and skip weights in the files. Biases and thresholds stay float32. With bfloat16 features
    near their thresholds come and go: what was measured on the run holds for float32."""

    model_name: str | None = None
    """The base model's name for those who load the files. Null: its hub name, or its directory."""

    licence: str | None = None
    """huggingface: the licence in the model card, by the hub's short name, such as mit. Null leaves a line to fill
    in."""


@dataclass
class ImportOptions:
    revision: str | None = None
    """Branch, tag or commit, where `path` is a name on the hub. Null is main."""

    contexts: int = 64
    """Held-out contexts of `dataset` that the mean output of each MLP is measured on, where there is no cache of this
    model and text yet."""
