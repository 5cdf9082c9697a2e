"""One runner's process, seen from outside: when it said what, the most memory it held, and how it ended."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import IO, Any

import psutil

from tunesmith.hardware import ask_nvml, nvml_devices

LOG_TAIL_CHARACTERS = 4000
SAMPLE_S = 0.25


@dataclass
class Heard:
    """What a runner said and how it ended.

    at_s: seconds from the start of the command to the first event of each name. resident_peak_bytes: of the process
    and all that it started, sampled; device_used_peak_bytes: of all GPUs together, whoever used them.
    """

    status: str = "failed"
    reason: str | None = None
    events: list[dict[str, Any]] = field(default_factory=list)
    at_s: dict[str, float] = field(default_factory=dict)
    resident_peak_bytes: int | None = None
    device_used_peak_bytes: int | None = None
    wall_s: float = 0.0
    log_tail: str = ""

    def event(self, name: str) -> dict[str, Any]:
        """The first event of a name, or nothing of one."""
        return next((event for event in self.events if event["event"] == name), {})


def run_runner(
    command: Sequence[str], job: Mapping[str, Any], *, environment: Mapping[str, str], timeout_s: float
) -> Heard:
    """Run one engine's process on a job. Never raises for what it does: a crash or silence is a status and a reason."""
    heard, began = Heard(), time.monotonic()
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log:
        try:
            process = subprocess.Popen(
                list(command),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                encoding="utf-8",
                errors="replace",
                env={**os.environ, **environment},
                start_new_session=True,
            )
        except OSError as error:
            heard.status, heard.reason = "missing", f"{command[0]} can't be started: {error.strerror}"
            return heard
        try:
            timed_out = _listen(process, json.dumps(job), heard, began, timeout_s)
        finally:
            _end(process)
        heard.wall_s = time.monotonic() - began
        log.seek(0)
        heard.log_tail = log.read()[-LOG_TAIL_CHARACTERS:]
    _judge(heard, process.returncode, timeout_s if timed_out else None)
    return heard


def _listen(process: subprocess.Popen[str], job: str, heard: Heard, began: float, timeout_s: float) -> bool:
    """Take every line with its time until the process is silent for good. Returns: whether its time was over."""
    lines: queue.Queue[tuple[float, str] | None] = queue.Queue()
    threading.Thread(target=_read, args=(process.stdout, lines), daemon=True).start()
    threading.Thread(target=_write, args=(process.stdin, job), daemon=True).start()
    while True:
        with contextlib.suppress(queue.Empty):
            said = lines.get(timeout=SAMPLE_S)
            if said is None:
                return False
            _note(heard, said[1], said[0] - began)
        _sample(process.pid, heard)
        if time.monotonic() - began > timeout_s:
            return True


def _read(stream: IO[str] | None, lines: queue.Queue[tuple[float, str] | None]) -> None:
    assert stream is not None
    with contextlib.suppress(ValueError):
        for line in stream:
            lines.put((time.monotonic(), line))
    lines.put(None)


def _write(stream: IO[str] | None, job: str) -> None:
    assert stream is not None
    with contextlib.suppress(BrokenPipeError, ValueError), stream:
        stream.write(job)


def _note(heard: Heard, line: str, at_s: float) -> None:
    with contextlib.suppress(json.JSONDecodeError):
        event = json.loads(line)
        if isinstance(event, dict) and isinstance(event.get("event"), str):
            heard.events.append(event)
            heard.at_s.setdefault(event["event"], at_s)


def _sample(pid: int, heard: Heard) -> None:
    resident = 0
    with contextlib.suppress(psutil.Error):
        parent = psutil.Process(pid)
        for process in (parent, *parent.children(recursive=True)):
            with contextlib.suppress(psutil.Error):
                resident += process.memory_info().rss
    heard.resident_peak_bytes = max(heard.resident_peak_bytes or 0, resident) or None
    used = [memory.used for handle in nvml_devices() if (memory := ask_nvml("nvmlDeviceGetMemoryInfo", handle))]
    if used:
        heard.device_used_peak_bytes = max(heard.device_used_peak_bytes or 0, int(sum(used)))


def _end(process: subprocess.Popen[str]) -> None:
    """End the process and what it started: they share a group that has no one else in it."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(5 if process.stdout is None or process.poll() is not None else 0.5)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    if process.stdout is not None:
        process.stdout.close()


def _judge(heard: Heard, code: int, timed_out_s: float | None) -> None:
    last = heard.events[-1] if heard.events else {"event": None}
    if last["event"] == "done":
        heard.status, heard.reason = "ok", None
    elif last["event"] == "failed":
        heard.status, heard.reason = str(last["status"]), str(last["reason"])
    elif timed_out_s is not None:
        heard.status, heard.reason = "timeout", f"stopped after {timed_out_s:g} s"
    elif code < 0:
        name = signal.Signals(-code).name
        hint = ": most likely the system's out-of-memory killer" if name == "SIGKILL" else ""
        heard.status, heard.reason = "killed", f"the process was killed by {name}{hint}"
    else:
        lines = heard.log_tail.strip().splitlines()
        heard.reason = f"the process exited with code {code}: {lines[-1][:300] if lines else 'no message'}"
