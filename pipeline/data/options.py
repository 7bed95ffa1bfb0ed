"""What the user may say about models, text and the cache. Free of torch, so that the command line starts at once."""

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any


class Dtype(StrEnum):
    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"


class Attention(StrEnum):
    auto = "auto"
    eager = "eager"
    sdpa = "sdpa"
    flash_attention_2 = "flash_attention_2"
    flex_attention = "flex_attention"


class DatasetKind(StrEnum):
    world = "world"
    text = "text"
    jsonl = "jsonl"
    parquet = "parquet"
    hub = "hub"
    mixture = "mixture"


class SplitBy(StrEnum):
    line = "line"
    paragraph = "paragraph"
    document = "document"


class Content(StrEnum):
    text = "text"
    chat = "chat"
    tokens = "tokens"


class Bos(StrEnum):
    auto = "auto"
    eos = "eos"
    none = "none"


class Separator(StrEnum):
    eos = "eos"
    none = "none"


Codec = StrEnum(
    "Codec",
    {"raw": "raw", "int8": "int8", "blosc-lz4-bitshuffle": "blosc-lz4-bitshuffle", "pcodec": "pcodec"},
)
"""How rows are stored (`data/codecs.py`). Hydra names the members of an enum, so they are called what they are."""


class Targets(StrEnum):
    stored = "stored"
    recompute = "recompute"


class Write(StrEnum):
    auto = "auto"
    scatter = "scatter"
    spill = "spill"


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

    layers: list[int] | None = None
    """[first, stop]: read and replace only these layers, counted from 0, `stop` left out ([8,16] is 8 to 15). The
    layers above are not run. Null: all."""

    attention: Attention = Attention.auto
    """Attention kernel: auto is what transformers takes for the architecture (fused where it can be). flash_attention_2
    needs its package."""

    device: str = "auto"
    """auto (CUDA where there is one, else the CPU), cpu, cuda, cuda:N or mps."""

    device_map: str | None = None
    """Spread a model that is too big for one device (accelerate): auto, balanced or sequential. Null: one device."""

    max_memory: dict[str, str] = field(default_factory=dict)
    """What the device map may use: {"0": 20GiB, "1": 20GiB, cpu: 60GiB}."""

    offload_dir: str | None = None
    """Where the device map puts the weights that fit no memory."""

    default_dataset: str = "world"
    """The dataset that goes with this model when `dataset=` is not given."""


@dataclass
class FilterOptions:
    """Which documents are left out, before they are split into training and held-out ones."""

    min_characters: int | None = None
    """Shorter documents are left out; null leaves out none. Of a chat: the characters of all its messages."""

    max_characters: int | None = None
    """Longer documents are left out; null leaves out none."""

    keep: str | None = None
    """A regular expression (Python's `re.search`): documents without a match are left out."""

    drop: str | None = None
    """A regular expression (Python's `re.search`): documents with a match are left out."""

    where: dict[str, Any] = field(default_factory=dict)
    """Column -> the value that it must have: records with another one are left out. Not for text files."""


@dataclass(kw_only=True)
class SourceOptions:
    """Where documents come from: what a data set and a member of a mixture have in common."""

    path: str | None = None
    """File, folder or glob for the kinds that read files, the data set's name for hub; null for the others."""

    subset: str | None = None
    """Of a hub data set: its configuration, such as sample-10BT. Null for its default one."""

    split: str = "train"
    """Of a hub data set: which of its splits."""

    revision: str | None = None
    """Of a hub data set: branch, tag or commit. Null is main. Resolved to a commit when the text is read."""

    content: Content = Content.text
    """What a document is in its record: text, chat (messages, laid out by the tokenizer's own template) or tokens (ids
    of the model's own tokenizer). Text files hold text."""

    column: str | None = None
    """Where the content is in a record; null is `text`, `messages` or `input_ids` by content."""

    split_by: SplitBy | None = None
    """What one document is in a text: line, paragraph or the whole of it. Null is paragraph in a text file and the
    whole text of a record elsewhere. Documents, not tokens, are split into training and held-out text."""

    filter: FilterOptions = field(default_factory=FilterOptions)


@dataclass(kw_only=True)
class MemberOptions(SourceOptions):
    """A member of a mixture."""

    kind: DatasetKind
    """As in a data set, but for world and mixture."""

    weight: float = 1.0
    """Its share of the training tokens is this over the sum of all weights."""


@dataclass
class DatasetOptions(SourceOptions):
    name: str
    """Short name: the second part of the cache directory's name."""

    kind: DatasetKind
    """How documents are read: world (generated), text, jsonl, parquet (local files), hub, or mixture (of others)."""

    n_tokens: str
    """Training rows: a count with an optional unit (400k, 10M, 1.5B), or `all` for everything a finite text holds."""

    context: int = 64
    """Tokens in a context, the beginning-of-text token included."""

    held_out: int | None = None
    """Contexts held out for calibration, and as many again for evaluation; they come on top of n_tokens. Null: as many
    full ones as the held-out documents give, at most 256 each."""

    seed: int = 0
    """Seed of generated text and of the order in which rows are stored."""

    bos: Bos = Bos.auto
    """What stands at position 0 of every context: auto is the tokenizer's beginning-of-text token, or nothing where it
    has none; eos is the end-of-text token, for models without the other; none is nothing, text from position 0 on."""

    separator: Separator = Separator.eos
    """What stands between documents: the end-of-text token, or nothing (none), for rows that were packed before."""

    skip_tokens: str = "0"
    """Training rows that are left out at the start, a count as n_tokens is, rounded up to whole contexts: what an
    earlier cache of that n_tokens holds. Held-out contexts are the same with and without."""

    sources: dict[str, MemberOptions] = field(default_factory=dict)
    """Of a mixture: its members by name. Null options of theirs mean what they mean in a data set."""


@dataclass
class CacheOptions:
    dir: str = "cache"
    """Where caches live: one directory for each (model, dataset, codec) request, named by its content. A folder, or an
    address in an object store (s3://bucket/prefix, gs://, az://; docs/remote.md)."""

    path: str | None = None
    """Train on this very cache: its directory, or the beginning of its name or key as for `clt cache info`. Null: the
    one of the model and the dataset that are named, or the newest."""

    codec: Codec = Codec.raw
    """How rows are stored: raw is bfloat16 bits, memory-mapped; int8 is half of that; blosc-lz4-bitshuffle and pcodec
    lose nothing and need room for raw while they are extracted."""

    targets: Targets = Targets.stored
    """Whether the training rows hold mlp_out: stored, or recompute for half the disk. With recompute the trainer
    computes mlp_out from resid_mid by the base model's own MLPs, which it loads."""

    shard_mb: str = "auto"
    """Size of a shard file in MB (2^20 bytes). auto is 32, doubled while there would be more than 16,384 shards."""

    write: Write = Write.auto
    """How rows get into random order: scatter writes them to their places through memory maps; spill appends them to
    files, which are sorted at the end; auto takes spill where maps do not work well (network file systems)."""

    read: Read = Read.auto
    """How the trainer reads shards: mmap gathers from a memory map, readinto reads a whole shard into a reused
    buffer first; auto takes mmap when the cache fits the free memory."""

    shards_ahead: int = 1
    """Shards that are being read, or wait, while the trainer takes the rows of one. No effect on the result."""

    local_dir: str | None = None
    """Folder of this machine for files of remote caches, and for a cache that is extracted to a remote place. Null:
    clt under $XDG_CACHE_HOME or ~/.cache. Not used by a cache.dir that is a folder."""

    local_gb: float = 50.0
    """Most GB (10^9 bytes) of files of remote caches that are kept in local_dir; those that were not used for longest
    go first. A cache that is being extracted comes on top."""


@dataclass
class ExtractOptions:
    batch_tokens: int = 8192
    """Tokens in a forward pass of the base model. No effect on the result."""

    part: str | None = None
    """I/N, from 0/N to N-1/N: make only this part, while other processes make the others; the one that ends last
    finishes the cache. Null: everything, or under torchrun the part of the rank."""
