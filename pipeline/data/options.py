"""What the user may say about models, text and the cache. Free of torch, so that the command line starts at once."""

from dataclasses import dataclass
from enum import StrEnum


class Dtype(StrEnum):
    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"


class DatasetKind(StrEnum):
    world = "world"
    text = "text"


class SplitBy(StrEnum):
    line = "line"
    paragraph = "paragraph"
    document = "document"


class Codec(StrEnum):
    raw = "raw"


class Read(StrEnum):
    auto = "auto"
    mmap = "mmap"
    readinto = "readinto"


@dataclass
class ModelOptions:
    name: str
    """Short name: the first part of the cache directory's name."""

    path: str
    """A Hugging Face directory, a hub name, or `builtin:world` for the model that ships with the package."""

    revision: str | None = None
    """Branch, tag or commit on the hub. Resolved to a commit when the cache is made. Null for local directories."""

    dtype: Dtype = Dtype.auto
    """Arithmetic of the base model: auto is bfloat16 on a GPU and float32 on a CPU."""

    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""

    default_dataset: str = "world"
    """The dataset that goes with this model when `dataset=` is not given."""


@dataclass
class DatasetOptions:
    name: str
    """Short name: the second part of the cache directory's name."""

    kind: DatasetKind
    """How documents are read: world (generated), text (local files)."""

    n_tokens: str
    """Training rows: a count with an optional unit (400k, 10M, 1.5B), or `all` for everything a finite text holds."""

    path: str | None = None
    """File, folder (every *.txt below it) or glob for the kinds that read files; null for the others."""

    split_by: SplitBy | None = None
    """What one document is in a text file: line, paragraph (null) or the whole document. Documents, not tokens, are
    split into training and held-out text. Null for the kinds that read no files."""

    context: int = 64
    """Tokens in a context, the beginning-of-text token included."""

    held_out: int | None = None
    """Contexts held out for calibration, and as many again for evaluation; they come on top of n_tokens. Null: as many
    full ones as the held-out documents give, at most 256 each."""

    seed: int = 0
    """Seed of generated text and of the order in which rows are stored."""


@dataclass
class CacheOptions:
    dir: str = "cache"
    """Where caches live: one directory for each (model, dataset, codec) request, named by its content."""

    codec: Codec = Codec.raw
    """How rows are stored: raw is bfloat16 bits, memory-mapped."""

    shard_mb: str = "auto"
    """Size of a shard file in MB (2^20 bytes). auto is 32, doubled while there would be more than 16,384 shards."""

    read: Read = Read.auto
    """How the trainer reads shards: mmap gathers from a memory map, readinto reads a whole shard into a reused
    buffer first; auto takes mmap when the cache fits the free memory."""


@dataclass
class ExtractOptions:
    batch_tokens: int = 8192
    """Tokens in a forward pass of the base model. No effect on the result."""
