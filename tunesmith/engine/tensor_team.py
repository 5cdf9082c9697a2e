"""The processes that serve one model together: started, spoken to, watched, and ended together.

    this process                            process 1, 2 ...  (python -m tunesmith.engine.tensor_worker)
    start       socket pair, log     --->   imports torch, says hello
    load        "start": what, where --->   takes its device, says here; joins the group, loads its part, says loaded
    serve       "runner", "pass" ... --->   follows                    (tensors go through the group)
    close       "stop"               --->   leaves

A process that ends before it was told to is noticed at once: it is named with the end of its log, the others are ended,
and whatever waits for it here gets an error. The others end by themselves when this process does: their socket closes,
and the kernel ends those that can't notice.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from tunesmith.engine.team_folder import TeamFolder
from tunesmith.engine.tensor_messages import Message, Reader, send
from tunesmith.errors import ParallelError

START_S = 300.0
STOP_S = 10.0
WAIT_S = 5.0
"""How much later than its connections a process's end may be noticed."""
_LOG_TAIL = 2000
_log = logging.getLogger(__name__)


@dataclass(eq=False)
class _Worker:
    rank: int
    process: subprocess.Popen[bytes]
    connection: socket.socket
    log: IO[bytes]
    replies: queue.SimpleQueue[Message | None] = field(default_factory=queue.SimpleQueue)

    def tail(self) -> str:
        """The end of what it said."""
        self.log.flush()
        size = os.fstat(self.log.fileno()).st_size
        said = os.pread(self.log.fileno(), _LOG_TAIL, max(0, size - _LOG_TAIL))
        return said.decode("utf-8", "replace").strip()


class TensorTeam:
    """The other processes of a model that `size` processes share; this one is the first.

    command: what starts one, beside the number of its socket, its rank, and the process that it is to end with, 0 for
        none; threads: of torch, in each.
    """

    def __init__(self, size: int, *, command: list[str] | None = None, threads: int | None = None) -> None:
        self.size = size
        self.failure: str | None = None
        self._on_failure: Callable[[], None] | None = None
        self._is_closing = False
        self._lock = threading.Lock()
        self.folder = TeamFolder()
        command = command or [sys.executable, "-m", "tunesmith.engine.tensor_worker"]
        self.workers = [self._launch(rank, command, threads) for rank in range(1, size)]
        self._threads = [threading.Thread(target=self._listen, args=(w,), daemon=True) for w in self.workers]
        for thread in self._threads:
            thread.start()

    @property
    def meeting(self) -> str:
        """Where the processes of the group meet."""
        return f"file://{self.folder.name}/meeting"

    def _launch(self, rank: int, command: list[str], threads: int | None) -> _Worker:
        mine, theirs = socket.socketpair()
        log = (Path(self.folder.name) / f"rank-{rank}.log").open("w+b")
        environment = dict(os.environ)
        # The kernel's "parent" is the thread that started a process: only the first lives as long as this process.
        parent = os.getpid() if threading.current_thread() is threading.main_thread() else 0
        if threads is not None:
            environment["OMP_NUM_THREADS"] = str(threads)
        with theirs:
            process = subprocess.Popen(
                [*command, str(theirs.fileno()), str(rank), str(parent)],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,  # an interruption from the keyboard is this process's to handle
            )
        return _Worker(rank, process, mine, log)

    def _listen(self, worker: _Worker) -> None:
        """In a thread: what a worker says; its end is a failure unless it was told to end."""
        reader, reason = Reader(worker.connection), None
        with contextlib.suppress(OSError):
            while (message := reader.next()) is not None:
                if message["kind"] == "failed":
                    reason = message["reason"]
                    break
                worker.replies.put(message)
        worker.replies.put(None)
        if not self._is_closing:
            self._fail(worker, reason)

    def _fail(self, worker: _Worker, reason: str | None) -> None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            worker.process.wait(timeout=2)
        with self._lock:
            if self.failure is not None or self._is_closing:
                return
            code = worker.process.poll()
            how = f"failed: {reason}" if reason else f"ended (exit code {code})"
            said = "" if reason else f". It said last: {worker.tail() or 'nothing'}"
            self.failure = f"process {worker.rank} of the {self.size} that share the model {how}{said}"
            call = self._on_failure
        _log.error("%s", self.failure)
        self._end(wait_s=0)  # first: the call may wait for this process's own work to break off
        if call is not None:
            call()

    def when_failed(self, call: Callable[[], None]) -> None:
        """Called once when a process has ended, perhaps in another thread: so that nothing waits for it any longer."""
        with self._lock:
            self._on_failure = call
            has_failed = self.failure is not None
        if has_failed:
            call()

    def check(self) -> None:
        """Raises ParallelError where a process has failed."""
        if self.failure is not None:
            raise ParallelError(f"{self.failure}; start the engine again")

    def tell(self, message: Message) -> None:
        """Give a message to all other processes. Raises ParallelError."""
        self.check()
        try:
            for worker in self.workers:
                send(worker.connection, message)
        except OSError as error:
            self._wait_for_failure()
            self.check()
            raise ParallelError(f"a process that shares the model can't be reached: {error}") from None

    def give_up(self, reason: str) -> None:
        """Work in which all take part was broken off here: the others are ended, unless one of them was the cause."""
        self._wait_for_failure()
        with self._lock:
            if self.failure is not None or self._is_closing:
                return
            self.failure = f"the {self.size} processes that share the model are out of step ({reason})"
        self._end(wait_s=0)

    def hear(self, kind: str, timeout_s: float = START_S) -> list[Message]:
        """A message of this kind from each. Raises ParallelError where one fails, or says nothing."""
        found = []
        for worker in self.workers:
            try:
                message = worker.replies.get(timeout=timeout_s)
            except queue.Empty:
                self._end(wait_s=0)
                raise ParallelError(
                    f"process {worker.rank} of {self.size} has not said {kind!r} within {timeout_s:.0f} s; it said "
                    f"last: {worker.tail() or 'nothing'}"
                ) from None
            if message is None or message["kind"] != kind:
                self._wait_for_failure()
                self.check()
                raise ParallelError(f"process {worker.rank} said {message}, not {kind!r}")
            found.append(message)
        return found

    def _wait_for_failure(self) -> None:
        """A thread that listens knows why, a moment later."""
        deadline = time.monotonic() + WAIT_S
        while self.failure is None and time.monotonic() < deadline:
            time.sleep(0.01)

    def close(self) -> None:
        """Tell the others to end; those that do not are killed. Closing twice does nothing."""
        with self._lock:
            if self._is_closing:
                return
            self._is_closing = True
        for worker in self.workers:
            with contextlib.suppress(OSError):
                send(worker.connection, {"kind": "stop"})
        self._end(wait_s=STOP_S)
        for worker in self.workers:
            with contextlib.suppress(OSError):
                worker.connection.shutdown(socket.SHUT_RDWR)
            worker.connection.close()
            worker.log.close()
        self.folder.cleanup()

    def _end(self, wait_s: float) -> None:
        for worker in self.workers:
            with contextlib.suppress(subprocess.TimeoutExpired):
                worker.process.wait(timeout=wait_s or 0.01)
            if worker.process.poll() is None:
                worker.process.kill()
                worker.process.wait()
