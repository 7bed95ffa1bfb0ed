"""The compiled kernels: built once for each machine, compiler and source, and loaded with ctypes.

The library lies in the user's cache folder under a name that is a hash of all that it depends on. It is written aside
and renamed, so that two processes may build it at once.
"""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

from pipeline.errors import UserError

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).parent / "native" / "kernels.cpp"
# Not -ffast-math: sums keep their order, and a NaN stays one.
FLAGS = ("-O3", "-march=native", "-fopenmp", "-fno-math-errno", "-std=c++17", "-fPIC", "-shared")
SECONDS = 300.0
"""A compiler that takes longer than this hangs; it takes about three."""


@functools.cache
def library() -> ctypes.CDLL:
    """The library, built where it is not there yet. UserError when that cannot be."""
    file = built()
    try:
        return ctypes.CDLL(str(file))
    except OSError as error:
        raise UserError(f"{file} does not load ({error}); delete it, or use train.kernels=torch") from error


def built() -> Path:
    """The library's file, made where it is missing. UserError without a compiler, or one that fails."""
    compiler = find_compiler()
    target = folder() / f"kernels-{_key(compiler)}.so"
    if not target.exists():
        _compile(compiler, target)
    return target


def find_compiler() -> str:
    """$CXX, or g++ or clang++ or c++ where one is on the path. UserError for none."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++", "c++"]
    for name in names:
        found = shutil.which(name)
        if found:
            return found
    raise UserError(
        f"no C++ compiler ({', '.join(names)}) is on the PATH; install one (g++), or use train.kernels=torch"
    )


def folder() -> Path:
    """Where libraries are kept: $XDG_CACHE_HOME/clt/native or ~/.cache/clt/native."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "clt" / "native"


def _key(compiler: str) -> str:
    sources = [file.read_text() for file in sorted(SOURCE.parent.iterdir()) if file.suffix in (".cpp", ".h")]
    parts = [*sources, " ".join(FLAGS), compiler, _version(compiler), platform.machine(), _cpu()]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:24]


def _version(compiler: str) -> str:
    try:
        run = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True, timeout=SECONDS)
    except (OSError, subprocess.SubprocessError) as error:
        raise UserError(
            f"the compiler {compiler} does not start ({error}); mend it, or use train.kernels=torch"
        ) from error
    return run.stdout


def _cpu() -> str:
    """Which CPU -march=native means: a home folder may be shared by machines that differ."""
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return platform.processor()
    lines = info.read_text().split("\n\n")[0].splitlines()
    return "\n".join(line for line in lines if line.partition("\t")[0] in ("model", "model name", "flags", "Features"))


def _compile(compiler: str, target: Path) -> None:
    start = time.perf_counter()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix="building-") as aside:
            made = Path(aside) / target.name
            command = [compiler, *FLAGS, str(SOURCE), "-o", str(made)]
            run = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
            if run.returncode:
                said = next((line for line in run.stderr.splitlines() if "error" in line), run.stderr.strip()[:200])
                raise UserError(f"{compiler} could not compile {SOURCE} ({said}); mend it, or use train.kernels=torch")
            made.replace(target)
    except (OSError, subprocess.SubprocessError) as error:
        raise UserError(f"building {target} failed ({error}); mend that, or use train.kernels=torch") from error
    logger.info("compiled the kernels for this CPU in %.1f s: %s", time.perf_counter() - start, target)
