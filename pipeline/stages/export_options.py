"""The typed configuration of `clt export` and `clt import`."""

from dataclasses import dataclass

from pipeline.data.options import CacheOptions, DatasetOptions, ModelOptions
from pipeline.interp.exchange.export_options import ExportOptions, Format, ImportOptions


@dataclass
class ExportConfig:
    export: ExportOptions
    to: Format | None = None
    """circuit-tracer, saelens or huggingface."""

    run: str | None = None
    """Run directory, or the name of a run; null is the newest that holds a finished transcoder."""

    path: str | None = None
    """The new directory; null is runs/NAME/export/<format>."""


@dataclass
class ImportConfig:
    model: ModelOptions
    dataset: DatasetOptions
    cache: CacheOptions
    read: ImportOptions
    path: str | None = None
    """The directory to read, or a name on the Hugging Face hub (owner/name, owner/name/folder)."""

    name: str | None = None
    """The run is written to runs/<name>."""
