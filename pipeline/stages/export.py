"""`clt export`: a finished run -> files that other tools load, folded, in the model's own units.

clt export run=runs/demo to=circuit-tracer
clt export run=runs/demo to=huggingface path=demo-on-the-hub export.licence=mit

The directory appears when it is complete. `export.json` in it says what it was made of, so that the same export again
costs nothing and a directory of something else is left alone.
"""

import hashlib
import json
import logging
import shlex
from pathlib import Path
from types import ModuleType
from typing import Any

import pipeline
from pipeline.data.layout import gb
from pipeline.errors import UserError
from pipeline.files import atomic_directory, remove_empty
from pipeline.interp.exchange import export_circuit_tracer, export_huggingface, export_saelens, export_weights
from pipeline.interp.exchange.export_options import Format
from pipeline.interp.exchange.export_weights import Source
from pipeline.plain import to_plain
from pipeline.stages.export_options import ExportConfig
from pipeline.train import artifact
from pipeline.train import run as runs

logger = logging.getLogger(__name__)

ABOUT = "export.json"

FORMATS: dict[str, ModuleType] = {
    "circuit-tracer": export_circuit_tracer,
    "saelens": export_saelens,
    "huggingface": export_huggingface,
}
"""`check(source)` and `write(source, folder, options)` of each."""


def run(cfg: ExportConfig) -> Path:
    """Write the directory, or find that it is there. -> it"""
    if cfg.to is None:
        raise UserError(f"what for? add to={', to='.join(FORMATS)}")
    source = Source(runs.chosen(cfg.run))
    form = FORMATS[cfg.to]
    form.check(source)
    target = Path(cfg.path) if cfg.path else source.run / "export" / cfg.to
    about = _about(cfg, source)
    if _is_there(target, about):
        logger.info("already there, nothing to do\n%s", _said(cfg.to, source, target, cfg.export.model_name))
        return target
    made = [parent for parent in target.parents if not parent.exists()]
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with atomic_directory(target) as aside:
            form.write(source, aside, cfg.export)
            sizes = {str(file.relative_to(aside)): file.stat().st_size for file in sorted(aside.rglob("*.safetensors"))}
            (aside / ABOUT).write_text(json.dumps({**about, "bytes": sizes}, indent=2) + "\n")
    finally:
        remove_empty(made)
    logger.info(_said(cfg.to, source, target, cfg.export.model_name))
    return target


def _about(cfg: ExportConfig, source: Source) -> dict[str, Any]:
    """What decides the content of the directory."""
    assert cfg.to is not None
    weights = artifact.weights_sha256(source.folder)
    card = export_huggingface.metrics(source) if cfg.to == "huggingface" else None
    measured = None if card is None else hashlib.sha256(json.dumps(card).encode()).hexdigest()
    return {
        "format": cfg.to.value,
        "generator": f"clt-pipeline {pipeline.__version__}",
        "run": source.run.name,
        "weights_sha256": weights,
        "config_sha256": hashlib.sha256((source.folder / "config.json").read_bytes()).hexdigest(),
        "metrics_sha256": measured,
        "export": to_plain(cfg.export),
    }


def _is_there(target: Path, about: dict[str, Any]) -> bool:
    """Whether the directory holds this very export. UserError when it holds anything else."""
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return False
    file = target / ABOUT
    found = json.loads(file.read_text()) if file.is_file() else {}
    sizes = found.pop("bytes", {})
    if not found:
        raise UserError(f"{target} exists and is no export (it has no {ABOUT}); choose another path=")
    differ = [name for name in about if found.get(name) != about[name]]
    if differ:
        raise UserError(
            f"{target} holds another export (other {', '.join(differ)}); choose another path=, or remove it first"
        )
    changed = [
        name for name, n in sizes.items() if not (target / name).is_file() or (target / name).stat().st_size != n
    ]
    if changed:
        raise UserError(f"{target}: {changed[0]} is missing or was changed; remove the directory and export again")
    return True


def _said(to: Format, source: Source, target: Path, given: str | None) -> str:
    """Paths, sizes, and the next command."""
    weights = sorted(target.rglob("*.safetensors"))
    total = sum(file.stat().st_size for file in weights)
    files = f"{len(weights)} files of weights" if len(weights) > 1 else "a file of weights"
    place = shlex.quote(str(target))
    lines = [f"{target}   {files}, {gb(total)}"]
    if to == "circuit-tracer":
        lines += [f"{export_circuit_tracer.kind(source)}, {source.input_hook} -> {export_weights.OUTPUT_HOOK}"]
        name = export_weights.model_name(source, given)
        if Path(name).is_dir():
            lines += [f"next: docs/export.md, on how circuit-tracer takes a model that is a directory, {name}"]
        else:
            attribute = f"circuit-tracer attribute -m {shlex.quote(name)} -t {shlex.quote(str(target.absolute()))}"
            lines += [f'next: {attribute} -p "..." --slug test --graph_file_dir "$PWD/graphs"']
    elif to == "saelens":
        example = target / f"layer_{source.first_layer}"
        lines += [f"next: python -c 'from sae_lens import SAE; print(SAE.load_from_disk(\"{example}\"))'"]
    else:
        lines += [
            f"read {target / 'README.md'} before you show it to anyone",
            f"next: clt eval run={place}, or hf upload OWNER/NAME {place}",
        ]
    return "\n".join(lines)
