"""The kernels run compiled where there is a CUDA device, and under Triton's interpreter on the CPU where there is none.

Triton looks at TRITON_INTERPRET when it and the kernels are first imported, and again at a first launch. It is set
then alone, so that other tests and the processes that they start know nothing of it.
"""

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

INSTALLED = importlib.util.find_spec("triton") is not None
INTERPRETED = INSTALLED and not torch.cuda.is_available()
collect_ignore_glob = [] if INSTALLED else ["test_*.py"]

if INTERPRETED:
    assert "triton" not in sys.modules, "a test module or a conftest.py imports triton; let its tests import it"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        importlib.import_module("pipeline.core.triton_kernels")


def lightly(call: Callable[..., Any]) -> Callable[..., Any]:
    """The interpreter's call of one jitted function by another, without what it does anew each time: it exchanges
    every function of the language for the interpreted one, which takes nine tenths of these tests, and stays so."""
    seen = set()

    def lighter(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.fn in seen:
            return self.rewrite()(*args, **kwargs)
        seen.add(self.fn)
        return call(self, *args, **kwargs)

    return lighter


@pytest.fixture(scope="session", autouse=True)
def light_interpreter() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        if INTERPRETED:
            from triton.runtime.interpreter import InterpretedFunction

            patch.setattr(InterpretedFunction, "__call__", lightly(InterpretedFunction.__call__))
        yield


@pytest.fixture(autouse=True)
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    if INTERPRETED:
        monkeypatch.setenv("TRITON_INTERPRET", "1")


@pytest.fixture
def device() -> str:
    return "cpu" if INTERPRETED else "cuda"
