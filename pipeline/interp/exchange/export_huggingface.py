"""A folder for the Hugging Face hub: README.md, the model card, beside the run's own config.json and weights, which
`pipeline.load(folder)` reads as it reads a run. Every architecture, since it is our own format.

The card says what was measured, from eval/metrics.json, and nothing else.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import jinja2
import yaml
from safetensors.torch import load_file

from pipeline.files import save_tensors
from pipeline.interp.exchange import export_weights
from pipeline.interp.exchange.export_options import ExportOptions, StoredDtype
from pipeline.interp.exchange.export_weights import DTYPES, Source
from pipeline.train import artifact

WIDE = {"threshold", "rank_norms", "y_mean", "y_scale", "b_enc", "b_dec"}
"""Tensors that stay float32."""

ROWS = [
    ("active features of a token, all layers (L0)", "l0.total", "{:.2f}"),
    ("fraction of variance unexplained (FVU)", "fvu.pooled", "{:.4f}"),
    ("explained variance", "explained_variance.pooled", "{:.4f}"),
    ("share of features never active", "dead_fraction.total", "{:.4f}"),
    ("KL(original, replacement), nats", "replacement.kl", "{:.4f}"),
    ("the same with MLPs ablated to zero", "replacement.kl_zero_ablation", "{:.4f}"),
    ("the same with MLPs ablated to their mean", "replacement.kl_mean_ablation", "{:.4f}"),
    ("increase of cross-entropy, nats", "replacement.delta_ce", "{:.4f}"),
    ("share of tokens with the same top prediction", "replacement.top1", "{:.4f}"),
]
"""What the card's table has: (label, path in metrics.json, format)."""


def check(source: Source) -> None:
    """Every finished run can be exported."""


def write(source: Source, folder: Path, options: ExportOptions) -> None:
    """Fill a directory."""
    for file in artifact.weight_files(source.folder):
        if options.dtype is StoredDtype.float32:
            shutil.copyfile(file, folder / file.name)
        elif file.suffix == ".safetensors":
            tensors = load_file(file)
            wide = {name for name in tensors if name.split(".")[0] in WIDE}
            dtype = DTYPES[options.dtype]
            save_tensors({name: t if name in wide else t.to(dtype) for name, t in tensors.items()}, folder / file.name)
        else:
            index = json.loads(file.read_text())
            for name, entry in index["files"][artifact.STEM].items():
                entry["dtype"] = entry["dtype"] if name.split(".")[0] in WIDE else options.dtype.value
            (folder / file.name).write_text(json.dumps(index) + "\n")
    kept = {key: value for key, value in source.config.items() if key != "cache"}
    cache = {key: value for key, value in source.config["cache"].items() if key != "path"}
    config = kept | {"cache": cache, "exported": export_weights.about(source, options.dtype)}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "README.md").write_text(card(source, options))


def metrics(source: Source) -> dict[str, Any] | None:
    """What `clt eval` measured on held-out text; None where it did not."""
    file = source.run / "eval" / "metrics.json"
    return json.loads(file.read_text()) if file.exists() else None


def card(source: Source, options: ExportOptions) -> str:
    """README.md: a YAML header, what it is, what was measured, how to load it."""
    measured = metrics(source)
    config, dataset = source.config, source.config["dataset"]
    base = config["model"]
    name = options.model_name or str(base["path"])
    header: dict[str, Any] = {
        "library_name": "clt-pipeline",
        "tags": ["transcoder", "interpretability", "sparse-coding"],
    }
    header |= {"license": options.licence} if options.licence else {}
    header |= {"base_model": name} if options.model_name or base["revision"] else {}  # a commit: it is of the hub
    header |= {"datasets": [dataset["path"]]} if dataset.get("kind") == "hub" else {}
    rows = _rows(measured) if measured else []
    folder = Path(__file__).parent
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder), undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        autoescape=False,  # Markdown
    )  # fmt: skip
    return environment.get_template("model_card.md.j2").render(
        header=yaml.safe_dump(header, sort_keys=False).strip(),
        title=source.run.name,
        source=source,
        arch=config["arch"],
        activation=config["activation"],
        base=base,
        base_name=name,
        dataset=dataset,
        licence=options.licence,
        measured=measured,
        rows=rows,
        train=config.get("train") or {},
        dtype=options.dtype.value,
    )


def _rows(measured: dict[str, Any]) -> list[tuple[str, str, str]]:
    """(label, value, 95 % interval) of what was measured."""
    rows = []
    for label, path, form in ROWS:
        value, bounds = _at(measured, path), _at(measured.get("ci95") or {}, path)
        if isinstance(value, int | float):
            interval = " to ".join(form.format(bound) for bound in bounds) if isinstance(bounds, list) else ""
            rows.append((label, form.format(value), interval))
    return rows


def _at(tree: dict[str, Any], path: str) -> Any:
    found: Any = tree
    for name in path.split("."):
        found = found.get(name) if isinstance(found, dict) else None
    return found
