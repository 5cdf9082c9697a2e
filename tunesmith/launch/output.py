"""A rank's output: all of it in a log of its own, and rank 0's on the screen too.

The log is appended to, so that it tells of every restart.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

_PR_SET_PDEATHSIG = 1


def log_path(logs: Path, rank: int) -> Path:
    """A rank's log."""
    return logs / f"rank-{rank}.log"


def send_to_log(logs: Path, rank: int) -> None:
    """From here on, what this process writes goes to its log; rank 0's to the screen too, by `tee`."""
    logs.mkdir(parents=True, exist_ok=True)
    path = log_path(logs, rank)
    attempt = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) + 1
    with path.open("a", encoding="utf-8") as log:
        log.write(f"--- {datetime.now(UTC).isoformat(timespec='seconds')} start {attempt}, process {os.getpid()}\n")
    _flush()
    if rank == 0:
        _split_to(path)
        return
    target = os.open(path, os.O_WRONLY | os.O_APPEND)
    os.dup2(target, 1)
    os.dup2(target, 2)
    os.close(target)


def _split_to(path: Path) -> None:
    """stdout and stderr each through a `tee` that outlives this process's sudden end; only the screen without one."""
    tee = shutil.which("tee")
    if tee is None:
        return
    for descriptor in (1, 2):
        child = subprocess.Popen(
            [tee, "-a", str(path)], stdin=subprocess.PIPE, stdout=descriptor, stderr=2, start_new_session=True
        )
        assert child.stdin is not None
        os.dup2(child.stdin.fileno(), descriptor)
        child.stdin.close()
        child.returncode = 0  # it ends with this process; nobody waits for it


def die_with_parent() -> None:
    """Have this process stopped politely when its launcher is gone, even by SIGKILL: nobody would restart it."""
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)


def _flush() -> None:
    sys.stdout.flush()
    sys.stderr.flush()
