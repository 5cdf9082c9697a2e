"""Our C++ for CPUs (cpu_step.cpp), compiled for this machine at first use and kept in the cache folder.

Asked for by TUNESMITH_CPU_STEP=1. Where there is no compiler, or it fails, there is no library: `load` says so once in
the log, and callers go without.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

SWITCH = "TUNESMITH_CPU_STEP"
_SOURCES = ("cpu_step.cpp", "cpu_pool.hpp", "cpu_products.hpp", "cpu_wide.hpp", "cpu_plain.hpp")
_FLAGS = ("-O3", "-march=native", "-std=c++17", "-ffp-contract=fast", "-shared", "-fPIC", "-pthread")
_LIMIT_S = 600.0
_log = logging.getLogger(__name__)


class BuildError(Exception):
    """The library can't be made here; the message says why."""


def find_compiler() -> str | None:
    """The C++ compiler: $CXX, or the first that there is."""
    names = [os.environ.get("CXX", ""), "c++", "g++", "clang++"]
    return next((path for name in names if name and (path := shutil.which(name))), None)


@cache
def load() -> ctypes.CDLL | None:
    """The library, built where it is not there yet; None where it is not asked for or can't be had."""
    if os.environ.get(SWITCH, "0") not in ("1", "on", "true"):
        return None
    try:
        library = ctypes.CDLL(str(build()))
    except (BuildError, OSError) as error:
        _log.warning("decoding steps on the CPU go through torch, which is slower: %s", error)
        return None
    library.tunesmith_decoder.restype = ctypes.c_void_p
    library.tunesmith_decoder.argtypes = [ctypes.c_void_p]
    library.tunesmith_forget.argtypes = [ctypes.c_void_p]
    library.tunesmith_step.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
    library.tunesmith_multiply.argtypes = [ctypes.c_void_p] * 4 + [ctypes.c_int64] * 2
    for name in ("forget", "step", "multiply"):
        getattr(library, f"tunesmith_{name}").restype = None
    return library


def build() -> Path:
    """The library's file. Raises: BuildError."""
    compiler = find_compiler()
    if os.name != "posix" or compiler is None:
        raise BuildError("no C++ compiler found (c++, g++ or clang++, or $CXX)")
    folder = Path(__file__).parent
    content = b"".join((folder / name).read_bytes() for name in _SOURCES)
    said = _run([compiler, "--version"]).encode()
    key = hashlib.sha256(b"\0".join((content, said, " ".join(_FLAGS).encode(), _processor()))).hexdigest()[:20]
    target = _cache_folder() / f"cpu_step-{key}.so"
    if target.exists():
        return target
    _log.info("compiling the CPU's decoding step with %s (once, some ten seconds)", compiler)
    # Processes that build at the same time put equal files in each other's place.
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, unfinished = tempfile.mkstemp(dir=target.parent, suffix=".so")
    except OSError as error:
        raise BuildError(f"{target.parent} can't be written: {error.strerror or error}") from error
    os.close(handle)
    try:
        _run([compiler, *_FLAGS, str(folder / _SOURCES[0]), "-o", unfinished])
        Path(unfinished).replace(target)
    finally:
        Path(unfinished).unlink(missing_ok=True)
    return target


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_LIMIT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{command[0]} can't be run: {error}") from error
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()[-1:]
        raise BuildError(f"{command[0]} ended with code {done.returncode}: {lines[0] if lines else 'it said nothing'}")
    return done.stdout


def _processor() -> bytes:
    """What -march=native looks at: a cache folder may be shared by machines."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return platform.processor().encode() + platform.machine().encode()
    first = text.split("\n\n", 1)[0].splitlines()
    names = ("flags", "Features", "model", "cpu family", "CPU part", "vendor_id", "CPU implementer")
    return "\n".join(line for line in first if line.split("\t")[0].strip(" :") in names).encode()


def _cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "tunesmith" / "kernels"
