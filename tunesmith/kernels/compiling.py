"""Compiling kernels in the background, from the moment it is known what will run until they are needed.

The work is done by another program (`compiling_worker`), because Triton compiles with Python's lock held and the
program that waits is importing, reading data and loading weights at that time. This module imports nothing that takes
long.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import hashlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import IO, Any, cast

import tunesmith
from tunesmith.hardware import usable_cores
from tunesmith.units import format_seconds

# Longer than any chip's kernels take; after that they are compiled where they are launched.
PATIENCE_S = 60.0
# Of what a worker that failed wrote to stderr, which is shown.
LAST_LINES = 5
_DRIVER = Path("/proc/driver/nvidia")
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


class Compiling:
    """A worker under way. errors: the file that its stderr goes to."""

    def __init__(self, process: subprocess.Popen[str], errors: IO[str] | None = None) -> None:
        self._process = process
        self._errors = errors
        atexit.register(self.stop)

    def wait(self, patience_s: float = PATIENCE_S) -> str | None:
        """A line on what was compiled, once it is done, or the last lines of a worker that failed. Never raises.

        None where there is nothing to say, or it takes too long.
        """
        began = time.perf_counter()
        try:
            answer, _ = self._process.communicate(timeout=patience_s)
            if self._process.returncode != 0:
                return self._failure()
            done = json.loads(answer)
        except (subprocess.TimeoutExpired, ValueError, OSError):
            self.stop()
            return None
        if not done.get("kernels"):
            return None
        waited = format_seconds(time.perf_counter() - began)
        took, processes = format_seconds(done["duration_s"]), done["processes"]
        return f"kernels: {done['kernels']} compiled ahead in {took} by {processes} processes, waited for {waited}"

    def _failure(self) -> str:
        lines = [f"kernels: not compiled ahead, exit code {self._process.returncode}; they are compiled when launched"]
        if self._errors is not None:
            self._errors.seek(0)
            lines += [f"  {line.rstrip()}" for line in self._errors if line.strip()][-LAST_LINES:]
        return "\n".join(lines)

    def stop(self) -> None:
        """End the worker and what it has started, if it has not ended."""
        if self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError):  # no session of its own
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.kill()
            self._process.wait()


def start_worker(module: str, request: Mapping[str, Any], marker: Path) -> Compiling | None:
    """Start `python -m module`, a program of `compiling_worker.serve`; None where it can't be.

    marker: the file that it makes once everything is compiled (`marker_of`).
    """
    with contextlib.ExitStack() as undo:
        try:
            # A file, because nobody reads a pipe while the program that waits begins.
            errors = undo.enter_context(tempfile.TemporaryFile("w+", errors="replace"))
            process = subprocess.Popen(
                [sys.executable, "-m", module],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env={**os.environ, **dict.fromkeys(_THREADS, "1")},
                start_new_session=True,  # Ctrl-C is the program's that waits, which then ends this one
            )
        except OSError:  # no memory, no place for files
            return None
        undo.pop_all()
    with contextlib.suppress(OSError), cast(IO[str], process.stdin) as pipe:  # one that has failed says so at the end
        pipe.write(json.dumps({**request, "marker": str(marker)}))
    process.stdin = None
    return Compiling(process, cast(IO[str], errors))


def can_compile(device: str) -> bool:
    """Whether a device of this name (auto, cpu, cuda, cuda:N) may be an NVIDIA GPU, and Triton compiles here.

    Not on one core: a worker's own imports would only be added to what the program that waits has to do.
    """
    if not device.startswith(("auto", "cuda")) or usable_cores() == 1:
        return False
    if os.environ.get("TRITON_INTERPRET") == "1" or importlib.util.find_spec("triton") is None:
        return False
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


def marker_of(content: Any) -> Path:
    """The file that says that everything of this content is in Triton's cache. It lies in there, to go with it."""
    digest = hashlib.sha256(json.dumps([content, _versions()], sort_keys=True, default=str).encode()).hexdigest()
    return triton_cache() / f"tunesmith-{digest}"


def triton_cache() -> Path:
    """Where Triton keeps what it has compiled."""
    named = os.environ.get("TRITON_CACHE_DIR")
    return Path(named) if named else Path(os.environ.get("TRITON_HOME", Path.home())) / ".triton" / "cache"


def _versions() -> list[Any]:
    """Of what decides which kernels there are: the packages, our own files, the GPUs, and which of them are visible.

    A cache in a home that machines share may hold the kernels of another machine's GPU.
    """
    root = Path(tunesmith.__file__).parent
    files = [(p.name, p.stat().st_mtime_ns) for p in sorted(root.rglob("*.py"))]
    packages = [metadata.version(name) for name in ("torch", "triton")]
    return [packages, files, _cards(), os.environ.get("CUDA_VISIBLE_DEVICES")]


def _cards() -> list[str]:
    """What NVIDIA's driver tells of each GPU in a file, without being started; nothing where it does not."""
    found: list[str] = []
    with contextlib.suppress(OSError):
        for card in sorted(_DRIVER.glob("gpus/*/information")):
            lines = card.read_text(encoding="utf-8", errors="replace").splitlines()
            found += [line.split(":", 1)[1].strip() for line in lines if line.startswith("Model:")]
    return found
