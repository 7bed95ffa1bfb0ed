"""Transcoders on the Hugging Face hub, fetched into the hub's own cache."""

import re
from pathlib import Path
from urllib.parse import parse_qs, urlparse

import yaml

from pipeline.errors import UserError


def fetched(path: str, revision: str | None) -> Path:
    """The directory that a path means: itself, or the snapshot of owner/name, or of a folder in it (owner/name/folder).
    UserError where there is neither."""
    local = Path(path).expanduser()
    if local.is_dir():
        if revision is not None:
            raise UserError(f"read.revision is for names on the hub, path={path} is a directory; leave it out")
        return local
    match = re.fullmatch(r"([\w.-]+/[\w.-]+)/*(.*)", path)
    if local.exists() or match is None or path.startswith((".", "/", "~")):
        raise UserError(
            f"path={path} is no directory; give one that circuit-tracer or SAELens reads, or a name on the hub"
        )
    repository, folder = match[1], match[2].strip("/")
    inside = f"{folder}/" if folder else ""
    names = ("config.yaml", "W_enc_*.safetensors", "W_dec_*.safetensors", "layer_*.safetensors")
    more = ("*/cfg.json", "*/sae_weights.safetensors")
    snapshot = _snapshot(path, repository, revision, [inside + name for name in (*names, *more)])
    return _with_listed(snapshot / folder, path)


def _snapshot(path: str, repository: str, revision: str | None, wanted: list[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=wanted))
    except (OSError, ValueError, HfHubHTTPError) as error:
        why = f"is no directory here and the hub did not give it ({type(error).__name__})"
        fix = f"use a local directory, or run `hf download {repository}` where there is a network"
        raise UserError(f"path={path} {why}; {fix}") from error


def _with_listed(folder: Path, path: str) -> Path:
    """A set's files may lie in other repositories, listed as hf://owner/name/file: they are fetched, and linked by
    layer in a folder of the hub's cache."""
    file = folder / "config.yaml"
    listed = (yaml.safe_load(file.read_text()) or {}).get("transcoders") if file.is_file() else None
    if not listed:
        return folder
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError

    place = folder / "layers"
    place.mkdir(exist_ok=True)
    for layer, address in enumerate(listed):
        parsed = urlparse(str(address))
        owner, (name, _, inside) = parsed.netloc, parsed.path.lstrip("/").partition("/")
        if parsed.scheme != "hf" or not inside.endswith(".safetensors"):
            raise UserError(
                f"path={path}: layer {layer} is listed as {address}, and only hf://owner/name/FILE.safetensors "
                "is read; "
                "convert it with circuit-tracer's save_transcoders_to_cache first"
            )
        revision = parse_qs(parsed.query).get("revision", [None])[0]
        try:
            there = hf_hub_download(f"{owner}/{name}", inside, revision=revision)
        except (OSError, ValueError, HfHubHTTPError) as error:
            raise UserError(
                f"path={path}: the hub did not give {address} ({type(error).__name__}); try again"
            ) from error
        link = place / f"layer_{layer}.safetensors"
        link.unlink(missing_ok=True)
        link.symlink_to(there)
    (place / "config.yaml").write_bytes(file.read_bytes())
    return place
