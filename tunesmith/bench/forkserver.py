"""A process that imports torch once and forks a fresh child for every cell.

It imports, and does nothing else: no parallel operation, no device, no thread of its own, so that a child finds
OpenMP and CUDA as if it had just been started. It is its own program (`python -m tunesmith.bench.forkserver`), because
the process that asks for cells may have run anything before.

    request, one JSON line on stdin:   {"job": [...], "log": path, "timeout_s": number}
    answer, one JSON line on stdout:   {"exit": code or null, "signal": number or null, "timed_out": bool}

`job` is [module, function, argument ...]; the child calls the function with the arguments, all of which are strings.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn

# torch's optimisers import torch._dynamo when the first one is made, which takes longer than a small cell.
PRELOAD = ("torch", "torch._dynamo", "tunesmith.train.session", "tunesmith.bench.cell", "tunesmith.rundir.environment")
_NVML_CHECK = "PYTORCH_NVML_BASED_CUDA_CHECK"
POLL_S = 0.01
_child = 0


def main() -> None:
    """Import, say that we are ready, then serve until stdin closes."""
    _preload(sys.argv[1:] or PRELOAD)
    # Libraries may hold idle threads of their own from import; the children run none of them.
    warnings.filterwarnings("ignore", category=DeprecationWarning, message=".*fork.*")
    signal.signal(signal.SIGTERM, _stop)
    parent = os.getppid()
    _say({"ready": True})
    for line in sys.stdin:
        request = json.loads(line)
        _say(_run(request["job"], Path(request["log"]), float(request["timeout_s"]), parent))


def _preload(modules: Iterable[str]) -> None:
    """Import, with torch asking NVML whether there is a GPU: asking the driver would spoil CUDA for the children."""
    os.environ[_NVML_CHECK] = "1"
    for module in modules:
        importlib.import_module(module)
    del os.environ[_NVML_CHECK]


def _say(message: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


def _stop(*_: object) -> NoReturn:
    """Take the child along: nobody would wait for it."""
    _kill(_child)
    os._exit(128 + signal.SIGTERM)


def _kill(pid: int) -> None:
    if pid:
        try:
            os.killpg(pid, signal.SIGKILL)
        except ProcessLookupError:
            return


def _run(job: list[str], log: Path, timeout_s: float, parent: int) -> dict[str, Any]:
    global _child
    _child = os.fork()
    if not _child:
        _be_child(job, log)
    with contextlib.suppress(OSError):
        # Here too: who is killed before its first line runs has a group to be killed with.
        os.setpgid(_child, _child)
    deadline = time.monotonic() + timeout_s
    timed_out = False
    while True:
        pid, status = os.waitpid(_child, os.WNOHANG)
        if pid:
            break
        if os.getppid() != parent:
            _stop()
        if time.monotonic() > deadline and not timed_out:
            timed_out = True
            _kill(_child)
        time.sleep(POLL_S)
    _child = 0
    signalled = os.WIFSIGNALED(status)
    return {
        "exit": None if signalled else os.WEXITSTATUS(status),
        "signal": os.WTERMSIG(status) if signalled else None,
        "timed_out": timed_out,
    }


def _be_child(job: list[str], log: Path) -> NoReturn:
    """Run the job in a process group of its own, with its output in the log."""
    code = 1
    try:
        os.setpgid(0, 0)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        _redirect(log)
        module, function, *arguments = job
        getattr(importlib.import_module(module), function)(*arguments)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _redirect(log: Path) -> None:
    sink = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(sink, 1)
    os.dup2(sink, 2)
    if isinstance(sys.stdout, io.TextIOWrapper):  # a file's lines would come after all that went to stderr
        sys.stdout.reconfigure(line_buffering=True)


if __name__ == "__main__":
    main()
