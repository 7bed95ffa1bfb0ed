"""What an interpreter cannot see: that the compiler takes every kernel."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
KERNELS = ROOT / "pipeline" / "core" / "triton_kernels"


def launched() -> set[str]:
    """Every kernel of the source: a jitted function that asks for its place in the grid."""
    functions = [
        node
        for path in KERNELS.glob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef) and node.decorator_list
    ]
    return {node.name for node in functions if "program_id" in ast.dump(node)}


@pytest.mark.slow
def test_every_kernel_compiles_for_a_hopper_gpu_on_a_machine_without_one(tmp_path: Path) -> None:
    env = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    env.pop("TRITON_INTERPRET", None)
    program = Path(__file__).parent / "compile_all.py"
    done = subprocess.run([sys.executable, str(program)], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(launched()) == 10
    assert set(done.stdout.split()) == launched()
