"""Who may import whom: read from the source, so that an arrow in the wrong direction fails by name.

    cli -> config -> stages -> web -> interp -> train -> data -> dist -> arch -> core

CONTRIBUTING.md gives the reason of each room.
"""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "pipeline"
MODULES = sorted(PACKAGE.rglob("*.py"))

ROOMS = ["core", "arch", "dist", "data", "train", "interp", "web", "stages", "config", "cli"]
"""From the bottom up: a room imports itself and what comes before it."""

BELOW_ALL = {"errors", "files", "plain", "progress", "ranks"}
ENTRANCES = {"__init__", "__main__"}
"""pipeline/__init__.py (which offers `load` lazily) and pipeline/__main__.py stand above all rooms."""

NEVER = {("data", "arch"): "a cache knows nothing of transcoders"}

TORCH_ONLY = {"core", "arch", "dist"}

ONLY_IN = {
    "hydra": "config/",
    "obstore": "data/remote.py",
    "omegaconf": "config/",
    "transformer_lens": "data/model_sites.py",
    "submitit": "stages/slurm.py",
    "triton": "core/triton_kernels/",
    "typer": "cli/",
    "zarr": "data/zarr_files.py",
}

HEAVY = {
    "datasets",
    "numpy",
    "obstore",
    "safetensors",
    "tokenizers",
    "torch",
    "transformer_lens",
    "transformers",
    "triton",
    "zarr",
}


def imports(path: Path, source: str | None = None) -> set[str]:
    """Every module that the file imports anywhere, inside functions too; `from a import b` gives a.b as well."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text() if source is None else source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; write the full name"
            assert node.module is not None
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def room(name: str) -> str:
    """pipeline.data.cache -> data; pipeline.errors -> errors; pipeline -> __init__."""
    return [*name.split("."), "__init__"][1]


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def outside(path: Path) -> set[str]:
    """Top-level names of imported packages that are neither ours nor Python's."""
    return {name.split(".")[0] for name in imports(path)} - set(sys.stdlib_module_names) - {"pipeline"}


def wrong_arrows(here: str, names: set[str]) -> list[str]:
    """The imports by a module of room `here` that point up."""
    wrong = []
    for name in sorted(name for name in names if name.split(".")[0] == "pipeline"):
        there = room(name)
        if there == here or there in BELOW_ALL or here in ENTRANCES or name in {"pipeline", "pipeline.__version__"}:
            continue
        if here in BELOW_ALL or there not in ROOMS:
            wrong.append(f"{name}: not a room that {here} may enter")
        elif ROOMS.index(there) > ROOMS.index(here):
            wrong.append(f"{name}: {there} lies above {here}")
        elif (here, there) in NEVER:
            wrong.append(f"{name}: {NEVER[here, there]}")
    return wrong


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path: Path) -> None:
    assert wrong_arrows(room_of(path), imports(path)) == []


def test_an_upward_arrow_is_seen() -> None:
    source = (
        "def f():\n    from pipeline.interp import graph\n    from pipeline import errors\n    import pipeline.arch"
    )
    names = imports(Path("x.py"), source)
    assert len(wrong_arrows("train", names)) == 2  # pipeline.interp and pipeline.interp.graph
    assert len(wrong_arrows("stages", names)) == 0
    assert wrong_arrows("data", {"pipeline.arch.clt"}) == ["pipeline.arch.clt: a cache knows nothing of transcoders"]


def test_every_folder_of_the_package_is_a_known_room() -> None:
    assert {room_of(path) for path in MODULES} <= {*ROOMS, *BELOW_ALL, *ENTRANCES}


@pytest.mark.parametrize("name", sorted(TORCH_ONLY))
def test_the_numerics_need_torch_alone(name: str) -> None:
    paths = [path for path in (PACKAGE / name).rglob("*.py") if path.parent.name != "triton_kernels"]
    assert {lib for path in paths for lib in outside(path)} <= {"torch"}


@pytest.mark.parametrize("library", sorted(ONLY_IN))
def test_a_library_with_one_door_is_imported_there_only(library: str) -> None:
    users = [str(path.relative_to(PACKAGE)) for path in MODULES if library in outside(path)]
    assert [user for user in users if not user.startswith(ONLY_IN[library])] == []


def test_training_on_a_cache_loads_no_language_model() -> None:
    """The exceptions make language models: that is their business."""
    for path in (PACKAGE / "train").rglob("*.py"):
        if path.name not in {"pretrain.py", "world_report.py"}:
            assert not imports(path) & {"pipeline.data.models", "pipeline.data.harvest"}, path
            assert not outside(path) & {"transformers", "transformer_lens"}, path


@pytest.mark.parametrize(
    "path", sorted(PACKAGE.rglob("*options.py")), ids=lambda path: f"{path.parent.name}/{path.stem}"
)
def test_typed_options_are_free_of_libraries(path: Path) -> None:
    assert outside(path) == set()
    ours = {name for name in imports(path) if name.startswith("pipeline")}
    assert all("options" in name for name in ours)


@pytest.mark.parametrize("module", ["pipeline", "pipeline.config", "pipeline.progress"])
def test_starting_up_imports_nothing_heavy(module: str) -> None:
    code = f"import sys, {module}; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not HEAVY & set(loaded.stdout.split())
