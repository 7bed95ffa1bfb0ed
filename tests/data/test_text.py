"""Which files a path names."""

from pathlib import Path

import pytest

from pipeline.data.options import DatasetKind
from pipeline.data.text import files_of, find_line
from pipeline.errors import UserError


def names(path: Path, kind: DatasetKind) -> list[str]:
    return [file.name for file in files_of(str(path), kind)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("b.txt", "a.jsonl", "z.jsonl.gz", "infos.json", "deep/c.parquet", "deep/a.parquet", "d.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    return tmp_path


def test_a_folder_means_the_files_of_the_kind_below_it_in_order(folder: Path) -> None:
    assert names(folder, DatasetKind.text) == ["b.txt"]
    assert names(folder, DatasetKind.jsonl) == ["a.jsonl", "z.jsonl.gz"]
    assert names(folder, DatasetKind.parquet) == ["a.parquet", "c.parquet"]


def test_json_files_count_where_there_is_no_jsonl(folder: Path) -> None:
    (folder / "a.jsonl").unlink()
    (folder / "z.jsonl.gz").unlink()
    assert names(folder, DatasetKind.jsonl) == ["infos.json"]


def test_a_file_or_a_glob_may_have_any_ending(folder: Path) -> None:
    assert names(folder / "d.md", DatasetKind.jsonl) == ["d.md"]
    assert names(folder / "*.[mt][dx]*", DatasetKind.parquet) == ["b.txt", "d.md"]


def test_nothing_to_read_is_one_line_that_names_the_option(folder: Path) -> None:
    (folder / "empty").mkdir()
    with pytest.raises(
        UserError, match=r"^dataset.sources.a.path=.*empty: no \*\.jsonl or \*\.json below this folder; "
    ):
        files_of(str(folder / "empty"), DatasetKind.jsonl, "dataset.sources.a.path")
    with pytest.raises(UserError, match="no such file, folder or glob; "):
        files_of(str(folder / "no*"), DatasetKind.text)


def test_the_first_line_that_is_wrong_is_found_in_its_file(tmp_path: Path) -> None:
    files = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    files[0].write_text("good\n")
    files[1].write_text("good\nbad\nbad\n")
    assert find_line(files, lambda line: line.strip() == "bad") == f"{files[1]} line 2"
