"""The distribution: every part is in the wheel, and the wheel works far from the checkout."""

import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import pipeline

ROOT = Path(__file__).resolve().parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_every_folder_of_python_files_is_a_listed_package() -> None:
    folders = {path.parent.relative_to(ROOT) for path in (ROOT / "pipeline").rglob("*.py")}
    assert set(PYPROJECT["tool"]["setuptools"]["packages"]) == {".".join(folder.parts) for folder in folders} | {
        "pipeline.conf"
    }
    assert all((ROOT / folder / "__init__.py").is_file() for folder in folders)


def test_every_dependency_is_pinned_to_one_version() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.!]+", line) for line in lines)  # no address, no +cpu
    pinned = {line.partition("==")[0].lower().replace("_", "-") for line in lines}
    project = PYPROJECT["project"]
    wanted = project["dependencies"] + [name for extra in project["optional-dependencies"].values() for name in extra]
    assert {re.split(r"[<>=\[]", name)[0].lower() for name in wanted} <= pinned


def test_importing_the_package_does_not_import_torch() -> None:
    code = "import sys, pipeline; assert 'torch' not in sys.modules; print(pipeline.__version__)"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == pipeline.__version__


def test_a_missing_attribute_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'lod'"):
        pipeline.lod  # noqa: B018


def test_load_is_the_one_that_reads_runs() -> None:
    from pipeline.train.finished import load

    assert pipeline.load is load


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, so that no build folder is left in the checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    names = ["pipeline", "conf", "pyproject.toml", "README.md", "LICENSE"]
    subprocess.run(["cp", "-r", *[str(ROOT / name) for name in names], str(source)], check=True)
    build = [
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--wheel-dir",
        str(folder),
        str(source),
    ]
    subprocess.run([sys.executable, *build], check=True)
    [path] = folder.glob("*.whl")
    return path


@pytest.mark.slow
def test_the_wheel_holds_everything(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        inside = set(archive.namelist())
    source = {path.relative_to(ROOT).as_posix() for path in (ROOT / "pipeline").rglob("*") if path.is_file()}
    yaml = {"pipeline/" + path.relative_to(ROOT).as_posix() for path in (ROOT / "conf").rglob("*.yaml")}
    assert {name for name in source if "__pycache__" not in name} | yaml <= inside
    assert any(name.endswith("model.safetensors") for name in inside)
    assert not any(name.startswith(("tests/", "conf/", "cache/")) for name in inside)
    assert f"clt_pipeline-{pipeline.__version__}" in wheel.name


@pytest.mark.slow
def test_the_wheel_works_outside_the_checkout(wheel: Path, tmp_path: Path) -> None:
    site, empty = tmp_path / "site", tmp_path / "empty"
    empty.mkdir()
    install = ["-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site), str(wheel)]
    subprocess.run([sys.executable, *install], check=True)
    env = {**os.environ, "PYTHONPATH": str(site)}

    def clt(*words: str) -> str:
        command = [sys.executable, str(site / "bin" / "clt"), *words]
        return subprocess.run(command, cwd=empty, env=env, capture_output=True, text=True, check=True).stdout

    assert "k: 16" in clt("train", "+experiment=topk", "--cfg", "job")
    assert str(site / "pipeline" / "conf") in clt("train", "--info", "searchpath")
    code = (
        "from pipeline.config import compose; from pipeline.data import models;"
        "import pipeline; print(pipeline.__file__);"
        "print(models.load(compose('extract').model).n_layers)"
    )
    loaded = subprocess.run(
        [sys.executable, "-c", code], cwd=empty, env=env, capture_output=True, text=True, check=True
    )
    assert loaded.stdout.split() == [str(site / "pipeline" / "__init__.py"), "4"]
    assert list(empty.iterdir()) == []
