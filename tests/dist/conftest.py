"""The tiny cache and runs of the tests of stages, for ranks."""

from tests.stages.conftest import cached, finished, tiny_cache, trained_runs

__all__ = ["cached", "finished", "tiny_cache", "trained_runs"]
