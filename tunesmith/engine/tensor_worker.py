"""A process that holds a part of a model and follows the first: `-m tunesmith.engine.tensor_worker FD RANK PARENT`.

It ends with the first one, whatever it is doing then. Signals to all of a server's processes are not taken: what runs
is ended in order, by the first.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import queue
import signal
import socket
import sys
import threading
import traceback
from typing import NoReturn

from tunesmith.engine.tensor_messages import Message, Reader, send

_DEATH_SIGNAL = 1
"""PR_SET_PDEATHSIG of prctl(2)."""


class Inbox:
    """The first process's messages, read by a thread. When it is gone this process ends, whatever it waits for."""

    def __init__(self, connection: socket.socket) -> None:
        self._messages: queue.SimpleQueue[Message] = queue.SimpleQueue()
        threading.Thread(target=self._read, args=(Reader(connection),), daemon=True).start()

    def next(self) -> Message:
        """The next message; waits for it."""
        return self._messages.get()

    def _read(self, reader: Reader) -> None:
        with contextlib.suppress(OSError):
            while (message := reader.next()) is not None:
                self._messages.put(message)
                if message["kind"] == "stop":
                    return
        os._exit(1)


def end_with(parent: int) -> None:
    """Let the kernel kill this process when its parent ends, even one that stands still; for Linux. 0 is no process."""
    if parent and sys.platform == "linux":
        ctypes.CDLL(None).prctl(_DEATH_SIGNAL, signal.SIGKILL)
        if os.getppid() != parent:  # it ended before
            os._exit(1)


def main(descriptor: int, rank: int, parent: int = 0) -> NoReturn:
    """Follow until told to stop, and end the process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    end_with(parent)
    connection = socket.socket(fileno=descriptor)
    inbox = Inbox(connection)
    try:
        from tunesmith.engine.tensor_serving import follow

        send(connection, {"kind": "hello"})
        follow(rank, inbox.next, lambda kind: send(connection, {"kind": kind}))
    except BaseException as error:
        traceback.print_exc()
        with contextlib.suppress(OSError):
            send(connection, {"kind": "failed", "reason": f"{type(error).__name__}: {error}"})
        _leave(1)  # a collective that is under way would keep it
    _leave(0)  # as would a communicator of NCCL, while there are graphs with it


def _leave(code: int) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:4]))
