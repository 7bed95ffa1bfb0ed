"""Train cross-layer transcoders from cached activations, and explain prompts with them.

    >>> import pipeline
    >>> clt = pipeline.load("runs/demo")

Importing the package imports nothing heavy: `load` brings in torch when it is first asked for.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.train.artifact import load

__all__ = ["__version__", "load"]

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name == "load":
        from pipeline.train.artifact import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
