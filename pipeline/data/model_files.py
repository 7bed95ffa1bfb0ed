"""Where the files of a language model are, and what identifies them. Nothing here loads the model.

`model.path` is `builtin:world`, a directory in Hugging Face format, or a hub name, whose files are fetched into the
hub's own cache first: from there on every model is a directory.
"""

import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path

from pipeline.data.options import ModelOptions
from pipeline.data.text import hash_files
from pipeline.errors import UserError

BUILTIN = "builtin:world"


def source_identity(options: ModelOptions) -> dict[str, str]:
    """What identifies a model beyond its options, without loading it: the hash of the files of a local or built-in
    directory, so that changed weights make another cache. Empty for hub names: revisions identify those."""
    directory = local_directory(options)
    if directory is None:
        return {}
    check_files(options, directory)
    described = [file for end in ("*.json", "*.txt", "*.model") for file in directory.glob(end)]
    return {"sha256": hash_files([*described, *weight_files(directory)])}


def weight_files(directory: Path) -> list[Path]:
    """The files that transformers loads weights from: safetensors where there are any, else *.bin."""
    return sorted(directory.glob("model*.safetensors")) or sorted(directory.glob("pytorch_model*.bin"))


def weights_hash(directory: Path) -> str:
    """sha256 of the weights as they are stored: over the names, dtypes, shapes and bytes of all tensors of the
    *.safetensors files (so that sharding plays no part), or, where there are none, over names and bytes of the *.bin
    files."""
    lines = [line for file in weight_files(directory) for line in _tensor_lines(file)]
    return hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()


def local_directory(options: ModelOptions) -> Path | None:
    """The directory of a local or the built-in model; None for a hub name."""
    if options.path == BUILTIN:
        from pipeline.data import world

        return Path(world.MODEL_DIR)
    path = Path(options.path).expanduser()
    if path.is_dir():
        return path.resolve()
    if path.exists():
        raise UserError(f"model.path={options.path} is a file; give the directory that holds config.json")
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", options.path):
        raise UserError(f"model.path={options.path}: no such directory, and no hub name either; check the path")
    return None


def fetch(options: ModelOptions) -> tuple[Path, str | None]:
    """Directory and commit; downloads what is missing of a model on the hub."""
    directory = local_directory(options)
    if directory is not None:
        if options.revision is not None:
            raise UserError(f"model.revision is for hub names, model.path={options.path} is a directory; drop it")
        return directory, None
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RevisionNotFoundError

    wanted = ["*.json", "*.txt", "*.model", "model*.safetensors"]
    try:
        snapshot = snapshot_download(
            options.path, revision=options.revision, allow_patterns=wanted, ignore_patterns=["*/*"]
        )
        if not weight_files(Path(snapshot)):
            wanted = ["pytorch_model*.bin*"]
            snapshot_download(options.path, revision=Path(snapshot).name, allow_patterns=wanted)
    except GatedRepoError as error:
        why = "the hub gives this model to registered users only"
        fix = "accept its licence on its page there, then run `hf auth login`"
        raise UserError(f"model.path={options.path}: {why}; {fix}") from error
    except RevisionNotFoundError as error:
        raise UserError(f"model.revision={options.revision}: {options.path} has no such revision; check it") from error
    except (OSError, ValueError, HfHubHTTPError) as error:
        why = f"is no directory here and the hub did not give it ({type(error).__name__})"
        pin = f" --revision {options.revision}" if options.revision else ""
        fix = f"use a local directory, or run `hf download {options.path}{pin}` where there is a network"
        raise UserError(f"model.path={options.path} {why}; {fix}") from error
    return Path(snapshot), Path(snapshot).name


def check_files(options: ModelOptions, directory: Path) -> None:
    for what, found in (("config.json", (directory / "config.json").is_file()), ("weights", weight_files(directory))):
        if not found:
            fix = "give a directory in Hugging Face format (config.json, model.safetensors, tokenizer.json)"
            raise UserError(f"model.path={options.path}: no {what} in {directory}; {fix}")


def _tensor_lines(file: Path) -> Iterator[str]:
    """A line for each tensor of a file: digest, dtype, shape, name."""
    with file.open("rb") as stream:
        if file.suffix == ".bin":
            yield f"{hashlib.file_digest(stream, 'sha256').hexdigest()} {file.name}\n"
            return
        start = 8 + int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(start - 8))
        header.pop("__metadata__", None)
        for name, tensor in header.items():
            begin, end = tensor["data_offsets"]
            stream.seek(start + begin)
            digest = hashlib.sha256(stream.read(end - begin)).hexdigest()
            yield f"{digest} {tensor['dtype']} {tensor['shape']} {name}\n"
