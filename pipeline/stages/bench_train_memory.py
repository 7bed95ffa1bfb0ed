"""Peak memory of a step above weights and moments, each side in a process of its own, so that peaks do not mix.

On Linux VmHWM of /proc/self/status (what the process had in memory at most), elsewhere ru_maxrss, on CUDA the most that
torch had allocated. Taken off: what the process had before it built the model, and 12 bytes a parameter. What is
left are gradients, activations and the batch.
"""

import ctypes
import gc
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import torch

from pipeline.plain import from_plain, to_plain
from pipeline.stages import bench_train_kernels as kernels
from pipeline.stages import bench_train_sides as sides
from pipeline.stages.bench_options import BenchTrainConfig
from pipeline.stages.bench_train_dense import Dense
from pipeline.stages.bench_train_shapes import FLOAT, Shape

STATUS = Path("/proc/self/status")
N_STEPS = 2


def peak(cfg: BenchTrainConfig, shape: Shape, device: torch.device, threads: int, side: str) -> int:
    """Bytes above weights and moments. side: dense, or a setting of train.kernels."""
    about = {"cfg": to_plain(cfg), "shape": shape._asdict(), "device": str(device), "threads": threads, "side": side}
    root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "pipeline.stages.bench_train_memory", json.dumps(about)]
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": path}, stdout=subprocess.PIPE, text=True, check=True
    )
    return int(done.stdout.split()[-1])


def _peak(cfg: BenchTrainConfig, shape: Shape, device: str, threads: int, side: str) -> int:
    torch.set_num_threads(threads)
    place = torch.device(device)
    _warm_up(place)
    before = _now(place)
    with kernels.use(kernels.PORTABLE if side == "dense" else side, place):
        model = sides.transcoder(shape, cfg.activation, cfg.bench.l0, place)
        data = sides.batches(shape)
        trainer = sides.trainer(model, cfg.loss, shape)
        n_parameters = model.n_parameters
        step: sides.Step = sides.Ours(trainer, data)
        if side == "dense":
            reference = Dense(model.state_dict(), cfg.activation, cfg.loss)
            step = sides.Reference(reference, trainer.objective, trainer.inputs, data)
            del model, trainer
        gc.collect()
        _give_back()
        step()  # the moments are made here, beside everything else
        _forget_peak(place)
        for _ in range(N_STEPS):
            step()
    return _peak_bytes(place) - before - 3 * FLOAT * n_parameters


def _warm_up(device: torch.device) -> None:
    """What torch allocates for itself when it is first used."""
    weight = torch.nn.Parameter(torch.randn(64, 64, device=device))
    optimizer = torch.optim.Adam([weight], fused=True)
    (torch.randn(64, 64, device=device) @ weight).square().sum().backward()
    optimizer.step()


def _now(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else _own("VmRSS")


def _peak_bytes(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _own("VmHWM")


def _forget_peak(device: torch.device) -> None:
    """So that building the model does not count."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif STATUS.exists():
        Path("/proc/self/clear_refs").write_text("5")


def _give_back() -> None:
    """What was freed since the start, to the system: otherwise it would count for the step."""
    if sys.platform == "linux" and hasattr(library := ctypes.CDLL(None), "malloc_trim"):
        library.malloc_trim(0)


def _own(field: str) -> int:
    if not STATUS.exists():
        # Not what it is now but what it was at most, which is as much here: little has happened before.
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    fields = dict(line.split(":", 1) for line in STATUS.read_text().splitlines())
    return int(fields[field].split()[0]) * 1024


if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    config = from_plain(BenchTrainConfig, asked["cfg"])
    found = _peak(config, Shape(**asked["shape"]), asked["device"], asked["threads"], asked["side"])
    sys.stdout.write(f"{found}\n")
