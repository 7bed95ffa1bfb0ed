"""Local text: which files a path names, and the documents in them.

A path is a file, a folder (every `*.txt` below it) or a glob (`books/**/*.md`, `dump/*.txt.gz`). Files are read in the
order of their names; compressed ones are opened as the `datasets` library opens them.
"""

import glob
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

from pipeline.data.options import SplitBy
from pipeline.errors import UserError

COMPRESSED = (".gz", ".bz2", ".xz", ".zst", ".lz4", ".zip")


def text_files(path: str) -> list[Path]:
    """The files that `path` names, sorted. Raises UserError when there is none or when all are empty."""
    root = Path(path).expanduser()
    if root.is_dir():
        files = sorted(file for file in root.rglob("*.txt") if file.is_file())
        if not files:
            raise UserError(
                f"dataset.path={path}: no *.txt below this folder; name other files by a glob, '{path}/*.md'"
            )
    elif root.is_file():
        files = [root]
    else:
        files = sorted(file for file in _glob(root) if file.is_file())
        if not files:
            raise UserError(f"dataset.path={path}: no such file, folder or glob; give the path of a text file")
    if not any(file.stat().st_size for file in files):
        raise UserError(f"dataset.path={path}: the text is empty; give a file that holds text")
    return files


def read_text(files: list[Path], split_by: SplitBy) -> Iterator[str]:
    """Documents of text files, without the blank lines around them: lines, paragraphs (separated by empty lines) or
    whole files. Memory: one file for `document`, else some 10 MB. Raises UserError for what is not UTF-8."""
    from datasets import load_dataset

    # Escaped: the library reads every name as a pattern, and a pattern that matches nothing is no error there.
    names = [glob.escape(str(file.resolve())) for file in files]
    dataset = load_dataset("text", data_files=names, split="train", streaming=True, sample_by=split_by.value)
    assert dataset.num_shards == len(files), f"{len(files)} text files, the library sees {dataset.num_shards}"
    try:
        for batch in dataset.iter(batch_size=1000):
            for text in batch["text"]:
                yield text.strip("\n")
    except UnicodeDecodeError as error:
        raise UserError(_not_utf8(files)) from error


def _not_utf8(files: list[Path]) -> str:
    """The library does not say which file it was reading, so look for it."""
    for file in files:
        if file.suffix in COMPRESSED:
            continue
        done = 0
        try:
            with file.open("rb") as stream:
                for line in stream:
                    line.decode()
                    done += len(line)
        except UnicodeDecodeError as error:
            fix = f"iconv -f latin1 -t utf-8 {file.name} > fixed.txt"
            return f"{file} is not UTF-8 (byte {done + error.start}); convert it, for instance: {fix}"
    return f"a compressed file in {files[0].parent} is not UTF-8 inside; unpack and convert it"


def hash_files(files: list[Path]) -> str:
    """sha256 over the names, relative to their deepest common directory, and the bytes of files, in sorted order."""
    base = os.path.commonpath([file.resolve().parent for file in files])
    total = hashlib.sha256()
    for name, file in sorted((os.path.relpath(file.resolve(), base), file) for file in files):
        with file.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        total.update(f"{digest}  {name}\n".encode())
    return total.hexdigest()


def _glob(pattern: Path) -> list[Path]:
    return [Path(name) for name in glob.glob(str(pattern), recursive=True)]
