"""The kernels run compiled where there is a CUDA device, and under Triton's interpreter on the CPU where there is none.

Triton looks at TRITON_INTERPRET when it and the kernels are first imported, and again at a first launch. It is set
then alone, so that other tests and the processes that they start know nothing of it.
"""

import importlib
import importlib.util

import pytest
import torch

INSTALLED = importlib.util.find_spec("triton") is not None
INTERPRETED = INSTALLED and not torch.cuda.is_available()
collect_ignore_glob = [] if INSTALLED else ["test_*.py"]

if INTERPRETED:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        importlib.import_module("pipeline.core.triton_kernels")


@pytest.fixture(autouse=True)
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    if INTERPRETED:
        monkeypatch.setenv("TRITON_INTERPRET", "1")


@pytest.fixture
def device() -> str:
    return "cpu" if INTERPRETED else "cuda"
