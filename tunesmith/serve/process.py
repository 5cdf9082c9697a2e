"""The engine's process: started with one end of a socket pair, ended by closing the other."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
from typing import Protocol


class EngineLink(Protocol):
    """A running engine process, or what stands for one."""

    socket: socket.socket

    def kill(self) -> None:
        """End it at once."""

    def exit_code(self, timeout_s: float) -> int | None:
        """Its exit code, or None while it runs after so many seconds. Blocks."""


class EngineProcess:
    """`python -m tunesmith.serve.worker FD`. It ends itself when the socket closes, so it never outlives its server."""

    def __init__(self) -> None:
        self.socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with theirs:
            command = [sys.executable, "-m", "tunesmith.serve.worker", str(theirs.fileno())]
            # Threads that wait for work in a loop take the cores that HTTP needs: on two busy cores, 35 tokens/s where
            # 186 are made without (libgomp, batch 1 of the embedded model). Read when torch is imported.
            environment = {"GOMP_SPINCOUNT": "0", **os.environ}
            self.process = subprocess.Popen(
                command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, env=environment
            )

    @property
    def pid(self) -> int:
        """The process id."""
        return self.process.pid

    def kill(self) -> None:
        """SIGKILL; a hung device call listens to nothing less."""
        self.process.kill()

    def exit_code(self, timeout_s: float) -> int | None:
        """Waits for its end."""
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return None


def end_process(link: EngineLink) -> int | None:
    """Wait for a process whose socket is closed; a moment later it is killed. Returns its exit code."""
    with contextlib.suppress(OSError):
        link.socket.close()
    code = link.exit_code(3.0)
    if code is None:
        link.kill()
        code = link.exit_code(10.0)
    return code


def exit_words(code: int | None) -> str:
    """How a process ended."""
    if code is None:
        return "it does not end"
    return f"killed by signal {-code}" if code < 0 else f"it exited with code {code}"
