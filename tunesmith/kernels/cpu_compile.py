"""C++ beside this file, compiled for the machine at hand once and kept in the user's cache folder.

~/.cache/tunesmith/kernels/NAME-KEY.so (or below $XDG_CACHE_HOME). The key is of the sources, the compiler ($CXX), its
flags ($CXXFLAGS) and the processor's features, since a home directory may be shared by machines. Processes that want
the same library at the same time wait for the one that compiles it. Where that folder can't be written the library is
made for this process.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import logging
import os
import platform
import re
import secrets
import shlex
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

_FLAGS = ("-O3", "-march=native", "-std=c++17", "-ffp-contract=fast", "-shared", "-fPIC", "-pthread")
_LIMIT_S = 600.0
_ABANDONED_S = 3600.0
"""Age of an unfinished file whose compiler was killed: no other takes so long."""
_UNFINISHED = "tmp"
_LEAST_BYTES = 2**25
"""Free space below which a folder counts as full."""
_log = logging.getLogger(__name__)


class BuildError(Exception):
    """The library can't be made here; the message says why."""


def find_compiler() -> str | None:
    """The C++ compiler: $CXX, or the first that there is."""
    names = [os.environ.get("CXX", ""), "c++", "g++", "clang++"]
    return next((path for name in names if name and (path := shutil.which(name))), None)


def load_compiled(name: str) -> ctypes.CDLL:
    """The library of NAME.cpp of this folder. Raises: BuildError."""
    return compiled(Path(__file__).with_name(f"{name}.cpp"))


def compiled(source: Path) -> ctypes.CDLL:
    """The library of a file and those beside it that it includes. Raises: BuildError."""
    compiler = find_compiler()
    if os.name != "posix" or compiler is None:
        raise BuildError("no C++ compiler found (c++, g++ or clang++, or $CXX)")
    content = b"".join(path.read_bytes() for path in _with_includes(source))
    said = _run([compiler, "--version"]).encode()
    command = [compiler, *_FLAGS, *shlex.split(os.environ.get("CXXFLAGS", "")), str(source)]
    key = hashlib.sha256(b"\0".join((content, said, " ".join(command[1:-1]).encode(), _processor()))).hexdigest()[:20]
    target = cache_folder() / f"{source.stem}-{key}.so"
    with contextlib.suppress(OSError):  # not there yet, or damaged: compiled again
        return ctypes.CDLL(str(target))
    try:
        if lack := _lack(target.parent):
            _log.warning("compiling the CPU's kernels for this process alone (some ten seconds): %s", lack)
            return _load_once(command)
        with _alone(target):
            with contextlib.suppress(OSError):  # somebody else has made it meanwhile
                return ctypes.CDLL(str(target))
            _log.warning("compiling the CPU's kernels for this machine (once, some ten seconds): %s", target)
            _compile(command, target)
        return ctypes.CDLL(str(target))
    except OSError as error:
        raise BuildError(str(error)) from error


def cache_folder() -> Path:
    """Where libraries are kept."""
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not base.is_absolute():
        try:
            base = Path.home() / ".cache"
        except RuntimeError:  # a user whom the system does not know: nothing can be kept
            base = Path(os.devnull)
    return base / "tunesmith" / "kernels"


def _with_includes(source: Path) -> list[Path]:
    """The file, and those beside it that it includes, or that these do."""
    found = [source]
    for path in found:
        names = re.findall(r'^#include "(.+)"$', path.read_text(encoding="utf-8"), re.MULTILINE)
        found += [beside for name in names if (beside := path.with_name(name)) not in found]
    return found


def _lack(folder: Path) -> str | None:
    """Why nothing can be kept in this folder, or None."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
        free_bytes = shutil.disk_usage(folder).free
    except OSError as error:
        return f"{folder} can't be written ({error.strerror or error})"
    return f"{folder} has {free_bytes >> 20} MiB left" if free_bytes < _LEAST_BYTES else None


def _load_once(command: list[str]) -> ctypes.CDLL:
    """A library that nobody else finds: gone from the disk as soon as it is loaded."""
    with tempfile.TemporaryDirectory(prefix="tunesmith-kernels-") as folder:
        target = Path(folder) / "library.so"
        _run([*command, "-o", str(target)])
        return ctypes.CDLL(str(target))


def _compile(command: list[str], target: Path) -> None:
    """Write the target whole or not at all."""
    _sweep(target.parent)
    # Made by the compiler, and not by mkstemp: whoever may read the folder may read the library.
    unfinished = target.with_name(f"{_UNFINISHED}{secrets.token_hex(8)}.so")
    try:
        _run([*command, "-o", str(unfinished)])
        unfinished.replace(target)
    finally:
        unfinished.unlink(missing_ok=True)


def _sweep(folder: Path) -> None:
    """Remove what compilers that were killed have left."""
    for path in folder.glob(f"{_UNFINISHED}*.so"):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > _ABANDONED_S:
                path.unlink()


@contextlib.contextmanager
def _alone(target: Path) -> Iterator[None]:
    """Only one process at a time is in here; where files can't be locked several are, and make equal files."""
    import fcntl

    with target.with_suffix(".lock").open("w") as lock:
        with contextlib.suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


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
    """What -march=native looks at."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return platform.processor().encode() + platform.machine().encode()
    first = text.split("\n\n", 1)[0].splitlines()
    names = ("flags", "Features", "model", "cpu family", "CPU part", "vendor_id", "CPU implementer")
    return "\n".join(line for line in first if line.split("\t")[0].strip(" :") in names).encode()
