"""Train cross-layer transcoders from cached activations, and explain prompts with them.

    >>> import pipeline
    >>> clt = pipeline.load("runs/demo")
    >>> model = pipeline.replace("runs/demo")
    >>> model.run("The capital of France is").logits

Importing the package imports nothing heavy: `load` and `replace` bring in torch when they are first asked for.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.interp.opening import replace
    from pipeline.train.finished import load

__all__ = ["__version__", "load", "replace"]

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name == "load":
        from pipeline.train.finished import load

        return load
    if name == "replace":
        from pipeline.interp.opening import replace

        return replace
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
