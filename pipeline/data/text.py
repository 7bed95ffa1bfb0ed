"""Local files: which ones a path names, what identifies them, and where the line is that cannot be read.

A path is a file, a folder (every file below it with the ending of its kind) or a glob (`books/**/*.md`,
`dump/*.txt.gz`). Files are read in the order of their names; compressed ones are opened as the `datasets` library opens
them.
"""

import glob
import hashlib
import os
from collections.abc import Callable
from pathlib import Path

from pipeline.data.options import DatasetKind
from pipeline.errors import UserError

COMPRESSED = (".gz", ".bz2", ".xz", ".zst", ".lz4", ".zip")

ENDINGS: dict[DatasetKind, list[tuple[str, ...]]] = {
    DatasetKind.text: [("*.txt",)],
    DatasetKind.jsonl: [("*.jsonl", *(f"*.jsonl{end}" for end in COMPRESSED)), ("*.json",)],
    DatasetKind.parquet: [("*.parquet",)],
}
"""What is read below a folder: the first of these sets of names that anything there has."""


def files_of(path: str, kind: DatasetKind, key: str = "dataset.path") -> list[Path]:
    """The files that `path` names, sorted. Raises UserError, which begins with `key`, when there is none or when all
    are empty."""
    root = Path(path).expanduser()
    if root.is_dir():
        found = [[file for end in ends for file in root.rglob(end) if file.is_file()] for ends in ENDINGS[kind]]
        files = sorted(next((files for files in found if files), []))
        if not files:
            wanted = " or ".join(ends[0] for ends in ENDINGS[kind])
            raise UserError(f"{key}={path}: no {wanted} below this folder; name other files by a glob, '{path}/*.x'")
    elif root.is_file():
        files = [root]
    else:
        files = sorted(Path(name) for name in glob.glob(str(root), recursive=True) if Path(name).is_file())
        if not files:
            raise UserError(f"{key}={path}: no such file, folder or glob; give the path of a file")
    if not any(file.stat().st_size for file in files):
        raise UserError(f"{key}={path}: the text is empty; give a file that holds text")
    return files


def hash_files(files: list[Path]) -> str:
    """sha256 over the names, relative to their deepest common directory, and the bytes of files, in sorted order."""
    base = os.path.commonpath([file.resolve().parent for file in files])
    total = hashlib.sha256()
    for name, file in sorted((os.path.relpath(file.resolve(), base), file) for file in files):
        with file.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        total.update(f"{digest}  {name}\n".encode())
    return total.hexdigest()


def not_utf8(files: list[Path]) -> str:
    """What to tell the user. The library does not say which file it was reading, so look for it."""
    for file in files:
        done = 0
        try:
            with file.open("rb") as stream:
                for line in stream if file.suffix not in COMPRESSED else ():
                    line.decode()
                    done += len(line)
        except UnicodeDecodeError as error:
            fix = f"iconv -f latin1 -t utf-8 {file.name} > fixed{file.suffix}"
            return f"{file} is not UTF-8 (byte {done + error.start}); convert it, for instance: {fix}"
    return f"a compressed file in {files[0].parent} is not UTF-8 inside; unpack and convert it"


def find_line(files: list[Path], is_wrong: Callable[[str], bool]) -> str:
    """ "FILE line N" for the first line of which `is_wrong` holds, or the folder where it is in a compressed file."""
    for file in files:
        if file.suffix not in COMPRESSED:
            with file.open(encoding="utf-8", errors="replace") as stream:
                for n, line in enumerate(stream, 1):
                    if is_wrong(line):
                        return f"{file} line {n}"
    return f"a compressed file in {files[0].parent}"
