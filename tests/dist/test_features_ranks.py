"""`clt features` on several ranks: the files of one process, whoever makes them and wherever they are stopped."""

import itertools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from pyarrow import parquet

from pipeline.config import compose
from pipeline.dist import pieces
from pipeline.errors import UserError
from pipeline.interp import opening
from pipeline.interp.dashboards import feature_writer, features
from pipeline.interp.dashboards.feature_records import Records
from pipeline.stages import features as stage
from pipeline.train import artifact
from tests.dist import processes

ROOT = Path(__file__).parents[2]
WORDS = ["run=runs/batchtopk", "features.sample=50", "features.top=3", "features.quantiles=2", "features.before=4"]
WORDS += ["features.after=2", "features.batch_tokens=100", "features.related=3"]


def described(words: list[str]) -> str:
    return str(stage.run(compose("features", [*WORDS, *words])))


def files(directory: Path | str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(directory).iterdir()}


@pytest.fixture
def loaded(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One language model, loaded before ranks are forked."""
    lm = opening.base_model(artifact.read("runs/batchtopk"), "cpu")
    monkeypatch.setattr(opening, "base_model", lambda trained, device: lm)


@pytest.mark.parametrize(
    "words",
    [
        ["features.packed=true"],
        ["features.n=31", "features.choose=most_active", "features.split=training", "features.n_tokens=400"],
    ],
)
def test_ranks_make_the_files_of_one_process(loaded: None, words: list[str]) -> None:
    alone = files(described([*words, "to=alone"]))
    assert processes.run(3, described, [*words, "to=three"]) == 3 * ["three"]
    assert files("three") == alone
    assert not list(Path().glob(".*.making"))


@pytest.mark.slow
def test_row_groups_do_not_tell_how_features_were_divided(loaded: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feature_writer, "RECORDS_AT_ONCE", 20)
    alone = files(described(["to=alone"]))
    monkeypatch.setattr(features, "bytes_of", lambda options: 1 << 15)  # 32 features of 1 MB
    assert files(described(["to=groups", "features.memory_mb=1"])) == alone
    assert files(processes.run(2, described, ["to=ranks"])[0]) == alone
    tables = [parquet.ParquetFile(f"ranks/{name}") for name in feature_writer.TABLES]
    assert [table.num_row_groups for table in tables] == [5, 5]  # 99 features
    ids = [tables[1].read_row_group(group).select(["layer", "feature"]).to_pylist() for group in range(5)]
    numbers = [33 * row["layer"] + row["feature"] for rows in ids for row in rows]
    assert numbers == sorted(numbers)
    assert {number // 20 for number in numbers[: len(ids[0])]} == {0}


def test_row_groups_of_features_that_never_fire_are_empty(loaded: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """As one process writes them: a group of contexts for each group of features."""
    monkeypatch.setattr(feature_writer, "RECORDS_AT_ONCE", 1)
    described(["to=alone", "features.n_tokens=1"])
    table = parquet.ParquetFile("alone/contexts.parquet")
    sizes = [table.metadata.row_group(group).num_rows for group in range(table.num_row_groups)]
    n_active = np.array(parquet.read_table("alone/features.parquet").column("n_active"))
    assert [size > 0 for size in sizes] == (n_active > 0).tolist()
    assert 0 < (n_active > 0).sum() < 99


def stopped(words: list[str], after: int) -> None:
    """A rank that is stopped when it has written so many times."""
    write, left = feature_writer.Making.write, [after]

    def written(making: feature_writer.Making, *args: object) -> None:
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        write(making, *args)  # type: ignore[arg-type]

    feature_writer.Making.write = written  # type: ignore[method-assign]
    try:
        described(words)
    except (KeyboardInterrupt, RuntimeError):
        return
    raise AssertionError("nothing was stopped")


@pytest.mark.slow
def test_another_number_of_ranks_goes_on_where_some_were_stopped(loaded: None, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = files(described(["to=alone"]))
    monkeypatch.setattr(features, "bytes_of", lambda options: 1 << 16)  # 16 features of 1 MB
    words = ["to=again", "features.memory_mb=1"]
    for n, after in ((3, 1), (1, 1), (2, 1)):
        before = set(Path().glob(".again.making/*.done"))
        with pytest.raises(AssertionError, match="rank"):
            processes.run(n, stops, words, after)
        done = set(Path().glob(".again.making/*.done"))
        assert before < done
        assert not Path("again").exists()
    spans = sorted(tuple(map(int, file.stem.split("-"))) for file in done)
    assert all(stop <= start for (_, stop), (start, _) in itertools.pairwise(spans))
    assert sum(stop - start for start, stop in spans) < 99
    written: list[range] = []
    write = feature_writer.Making.write

    def noted(making: feature_writer.Making, some: range, records: Records) -> None:
        written.append(some)
        write(making, some, records)

    monkeypatch.setattr(feature_writer.Making, "write", noted)
    assert files(described(words)) == alone
    assert sum(map(len, written)) == 99 - sum(stop - start for start, stop in spans)


def stops(words: list[str], after: int) -> None:
    stopped(words, after)
    raise AssertionError("stopped")


def test_a_second_command_is_refused_while_any_rank_is_at_work(finished: Path) -> None:
    processes.run(2, locked)


def locked() -> None:
    with pieces.ranks() as group:
        with feature_writer.Making(Path("made"), {"a": 1}, group):
            group.barrier()
            with pytest.raises(UserError, match="made"):
                feature_writer.Making(Path("made"), {"a": 1}).__enter__()
            group.barrier()
        group.barrier()
        if group.rank == 0:
            with feature_writer.Making(Path("made"), {"a": 1}) as making:
                assert making.left(7, 3) == [range(3), range(3, 6), range(6, 7)]
        group.barrier()


def test_lists_are_the_first_ranks_business(finished: Path) -> None:
    described(["features.n=4"])
    found = processes.run(2, described, ["search=e", "to=list.json"])
    assert found == ["list.json", "None"]


@pytest.mark.slow
def test_torchrun_describes_features_and_the_first_rank_speaks(finished: Path) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "pipeline", "features", *WORDS]
    alone = files(described([]))
    shutil.rmtree("runs/batchtopk/features")
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr.count("2 passes for each of 2 groups by 2 ranks") == 1
    assert files("runs/batchtopk/features") == alone
