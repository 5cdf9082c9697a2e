"""Jobs in fresh processes: the caller's side of the fork server."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from tunesmith.bench.schema import Status
from tunesmith.errors import TunesmithError


@dataclass(frozen=True)
class Outcome:
    """How a job's process ended."""

    exit: int | None
    signal: int | None
    timed_out: bool

    def verdict(self, timeout_s: float) -> tuple[Status, str] | None:
        """Why the process left no result of its own, as (status, reason); None where it ended well."""
        if self.timed_out:
            return "timeout", f"stopped after {timeout_s:g} s (bench.timeout_s)"
        if self.signal is not None:
            name = signal.Signals(self.signal).name
            hint = ": most likely the system's out-of-memory killer" if name == "SIGKILL" else ""
            return "killed", f"the process was killed by {name}{hint}"
        if self.exit:
            return "failed", f"the process exited with code {self.exit}; see its log"
        return None


class Worker:
    """A fork server and the way to it; a context manager.

    Args: `log`: where the server's own errors go; `preload`: modules it imports (none named: torch and tunesmith).
    """

    def __init__(self, log: Path, preload: Sequence[str] = ()) -> None:
        self.log = log
        self.preload = tuple(preload)
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Worker:
        with self.log.open("ab") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tunesmith.bench.forkserver", *self.preload],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=_environment(),
                start_new_session=True,
            )
        try:
            self._answer()
        except BaseException:
            self._end()
            raise
        return self

    def run(self, job: Sequence[str], log: Path, timeout_s: float) -> Outcome:
        """Run one job ([module, function, argument ...]) in a fresh process and wait for its end."""
        assert self._process is not None and self._process.stdin is not None
        request = {"job": list(job), "log": str(log.absolute()), "timeout_s": timeout_s}
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return Outcome(**self._answer())

    def _answer(self) -> dict[str, Any]:
        assert self._process is not None and self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            last = self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
            raise TunesmithError(
                f"the bench's worker could not run: {last[0] if last else 'no message'}; see {self.log}"
            )
        return dict(json.loads(line))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def _end(self) -> None:
        process, self._process = self._process, None
        assert process is not None
        process.terminate()
        with contextlib.suppress(BrokenPipeError):
            process.communicate(timeout=10)


def _environment() -> dict[str, str]:
    """This process's environment, with the path it found tunesmith on."""
    root = str(Path(__file__).resolve().parents[2])
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
