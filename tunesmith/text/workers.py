"""Tokenisation in several processes.

Workers are started as `python -m tunesmith.text.worker` and spoken to over pipes: nothing is forked from a process
that has threads or a GPU, and a caller's script needs no `if __name__ == "__main__"`. Results come in order.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from itertools import chain, islice
from queue import SimpleQueue
from typing import Any

from tunesmith.errors import TunesmithError

Job = tuple[Any, ...]


class _Worker:
    """One process that computes `function(*shared, *job)`."""

    def __init__(self, function: Callable[..., Any], shared: Job) -> None:
        environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
        environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tunesmith.text.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
        )
        self._send((function, shared))

    def __call__(self, job: Job) -> Any:
        self._send(job)
        assert self._process.stdout is not None
        try:
            ok, value = pickle.load(self._process.stdout)
        except (EOFError, pickle.UnpicklingError):
            code = self._process.wait()
            raise TunesmithError(
                f"a tokenisation process ended with code {code} (out of memory?); try fewer: --set data.workers=1"
            ) from None
        if not ok:
            raise value
        return value

    def _send(self, value: Any) -> None:
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # the answer will be an end of file, which is explained
            pickle.dump(value, self._process.stdin, protocol=pickle.HIGHEST_PROTOCOL)
            self._process.stdin.flush()

    def close(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with suppress(BrokenPipeError):
                    pipe.close()


def ordered_map(
    function: Callable[..., Any], shared: Job, jobs: Iterable[Job], *, workers: int, in_process: int
) -> Iterator[Any]:
    """`function(*shared, *job)` for every job, in order; the first `in_process` jobs without starting a process.

    Args: `function`: of a module, so that a worker can import it; a few jobs per worker are held at once.
    """
    iterator = iter(jobs)
    for job in islice(iterator, in_process if workers > 1 else None):
        yield function(*shared, *job)
    following = next(iterator, None)
    if following is not None:
        yield from _in_processes(function, shared, chain([following], iterator), workers)


def _in_processes(function: Callable[..., Any], shared: Job, jobs: Iterable[Job], workers: int) -> Iterator[Any]:
    processes = [_Worker(function, shared) for _ in range(workers)]
    idle: SimpleQueue[_Worker] = SimpleQueue()
    for process in processes:
        idle.put(process)

    def compute(job: Job) -> Any:
        worker = idle.get()
        try:
            return worker(job)
        finally:
            idle.put(worker)

    waiting: deque[Future[Any]] = deque()
    threads = ThreadPoolExecutor(workers)
    try:
        for job in jobs:
            waiting.append(threads.submit(compute, job))
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()
        for process in processes:
            process.close()
        threads.shutdown(wait=True, cancel_futures=True)


def available_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
