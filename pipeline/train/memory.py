"""The most memory that a run has taken, for timings.jsonl."""

import contextlib
import resource
import sys
from pathlib import Path

import torch

STATUS = Path("/proc/self/status")


class Peak:
    """Since it was made. On a GPU what tensors took of it; else what the process had in memory, its libraries and what
    it holds of the cache included. Of runs that share a process it is that of all of them."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        elif STATUS.exists():
            with contextlib.suppress(OSError):  # where a system forbids it, the process's whole life counts
                Path("/proc/self/clear_refs").write_text("5")

    def mb(self) -> float:
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device) / 1e6
        if not STATUS.exists():
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6
        fields = dict(line.split(":", 1) for line in STATUS.read_text().splitlines())
        return int(fields["VmHWM"].split()[0]) * 1024 / 1e6
