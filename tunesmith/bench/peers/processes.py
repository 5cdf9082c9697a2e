"""A runner's process, seen from outside: it gets a job, says lines, and is stopped when its time is over."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

LOG_TAIL_CHARACTERS = 4000


@dataclass(frozen=True)
class Said:
    """What a runner said and how it ended. `log_tail`: the end of its stderr."""

    status: str
    reason: str | None
    steps: tuple[dict[str, Any], ...]
    result: dict[str, Any]
    log_tail: str


def run_module(module: str, job: Mapping[str, Any], *, timeout_s: float, path: Path | None = None) -> Said:
    """Run `python -m module` on a job. Args: path: a folder of packages that come before the installed ones.

    Never raises for what the runner does: a crash, silence or noise on its stdout is a status and a reason.
    """
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            encoding="utf-8",
            env=_environment(path),
            start_new_session=True,
        )
        text, timed_out = _communicate(process, json.dumps(job), timeout_s)
        return _read(text, process.returncode, timeout_s if timed_out else None, _tail(log))


def _communicate(process: subprocess.Popen[str], job: str, timeout_s: float) -> tuple[str, bool]:
    """All that the process says, and whether it had to be stopped."""
    try:
        return process.communicate(job, timeout=timeout_s)[0], False
    except subprocess.TimeoutExpired:
        _kill(process)
        return process.communicate()[0], True
    except BaseException:
        _kill(process)
        process.communicate()
        raise


def _kill(process: subprocess.Popen[str]) -> None:
    """End the process and what it started: they share a group that has no one else in it."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _tail(log: IO[str]) -> str:
    log.seek(0)
    return log.read()[-LOG_TAIL_CHARACTERS:]


def _read(text: str, code: int, timed_out_s: float | None, log_tail: str) -> Said:
    events = [event for event in map(_event, text.splitlines()) if event is not None]
    steps = tuple({k: v for k, v in e.items() if k != "event"} for e in events if e["event"] == "step")
    last = events[-1] if events else {"event": None}
    rest = {key: value for key, value in last.items() if key != "event"}
    if last["event"] == "done":
        return Said("ok", None, steps, rest, log_tail)
    if last["event"] == "failed":
        return Said(str(last["status"]), str(last["reason"]), steps, {}, log_tail)
    status, reason = _silent_end(code, timed_out_s, log_tail)
    return Said(status, reason, steps, {}, log_tail)


def _event(line: str) -> dict[str, Any] | None:
    with contextlib.suppress(json.JSONDecodeError):
        event = json.loads(line)
        if isinstance(event, dict) and "event" in event:
            return event
    return None


def _silent_end(code: int, timed_out_s: float | None, log_tail: str) -> tuple[str, str]:
    """Why a process that said no last word ended."""
    if timed_out_s is not None:
        return "timeout", f"stopped after {timed_out_s:g} s (bench.timeout_s)"
    if code < 0:
        name = signal.Signals(-code).name
        hint = ": most likely the system's out-of-memory killer" if name == "SIGKILL" else ""
        return "killed", f"the process was killed by {name}{hint}"
    lines = log_tail.strip().splitlines()
    return "failed", f"the process exited with code {code}: {lines[-1][:300] if lines else 'no message'}"


def _environment(path: Path | None) -> dict[str, str]:
    """This process's environment; packages from `path` first, then tunesmith as it runs here. No Hub."""
    root = str(Path(__file__).resolve().parents[3])
    given = None if path is None else str(path.absolute())
    paths = [folder for folder in (given, root, os.environ.get("PYTHONPATH")) if folder]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
