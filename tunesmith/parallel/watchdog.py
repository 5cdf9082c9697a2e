"""A thread in every rank that tells how far its rank is, hears who hangs, and ends its process when one does.

The ranks report to a store of their own, which rank 0 holds; its thread judges (`hang.py` says what counts as a hang).
The rank that hangs writes its own stack: its thread runs while its main thread does not. One that is stopped altogether
(SIGSTOP, a lost machine) is named by the others, and rank 0 by its store falling silent. Whoever it is, every rank
writes its stacks to `hang-rank-N.txt`, says one line and ends with exit code 1: nobody is left waiting, and what
started the processes may start them again.

The main thread's part is `Progress`: a few additions a step. What counts collectives is torch.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunesmith.errors import ParallelError
from tunesmith.parallel.flight import is_recording, write_flight
from tunesmith.parallel.hang import NAMED_AT, SILENT_PATIENCE, Judge, Verdict
from tunesmith.parallel.mesh import CPU_TIMEOUT_S, GPU_TIMEOUT_S, Mesh
from tunesmith.parallel.progress import Progress, Report, stack_of
from tunesmith.parallel.told import ON_HANG
from tunesmith.recipe.parallel import ParallelSection

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.distributed_c10d import Store

_LOOKS = 20
_ANSWER_S, _STORE_S = 2.0, 5.0
_VERDICT = "verdict"
_MEETING = timedelta(seconds=60)


@dataclass(frozen=True)
class Limits:
    """limit_s: how long a rank may hold others up; is_exact: the recipe says so; look_s: between two reports."""

    limit_s: float
    is_exact: bool

    @property
    def look_s(self) -> float:
        """Seconds between two looks."""
        return min(1.0, self.limit_s / _LOOKS)


def limits_of(settings: ParallelSection, device_type: str) -> Limits | None:
    """The limits of a run; None where the recipe wants none."""
    if settings.timeout_s == 0:
        return None
    default = GPU_TIMEOUT_S if device_type == "cuda" else CPU_TIMEOUT_S
    return Limits(settings.timeout_s or default, settings.timeout_s is not None)


@contextmanager
def watched(
    mesh: Mesh,
    settings: ParallelSection,
    folder: Path | None = None,
    *,
    uneven: Sequence[ProcessGroup] = (),
    on_hang: Callable[[str], None] | None = None,
) -> Iterator[Progress]:
    """While this is open, a rank that hangs is named and all end. All ranks open it together; yields what to advance.

    Args:
        folder: where stacks are written (the run directory's logs); None: only the line is printed.
        uneven: groups whose members rightly make different numbers of calls: a pipeline's.
        on_hang: told the line before this process ends, besides ON_HANG.
    """
    names = frozenset(group.group_name for group in uneven)
    progress = Progress(uneven=names)
    limits = limits_of(settings, mesh.device.type)
    if mesh.world_size == 1 or limits is None:
        yield progress
        return
    told = [*ON_HANG, *([] if on_hang is None else [on_hang])]
    watchdog = _Watchdog(mesh, progress, limits, folder, told)
    try:
        yield progress
    finally:
        watchdog.close()


class _Watchdog:
    def __init__(
        self,
        mesh: Mesh,
        progress: Progress,
        limits: Limits,
        folder: Path | None,
        told: Sequence[Callable[[str], None]],
    ) -> None:
        self.rank, self.size, self.progress, self.limits = mesh.rank, mesh.world_size, progress, limits
        self.folder, self.told = folder, told
        self.judge = Judge(limits.limit_s, limits.is_exact)
        self.store = _meet(self.rank, self.size)
        self._report()  # before any step: who never says anything is not judged
        self._all_met()
        self.answered_at = time.monotonic()
        self._closed = threading.Event()
        self._threads = [threading.Thread(target=self._talk, name="tunesmith-watchdog", daemon=True)]
        if self.rank != 0:
            self._threads.append(threading.Thread(target=self._guard, name="tunesmith-guard", daemon=True))
        for thread in self._threads:
            thread.start()

    def _all_met(self) -> None:
        """Rank 0 goes on when all have reported: if it failed at once, the store would end while they are on the way.

        Raises: ParallelError.
        """
        if self.rank != 0:
            self.store.set(_met(self.rank), "")
            return
        try:
            self.store.wait([_met(rank) for rank in range(1, self.size)], _MEETING)
        except RuntimeError as error:
            raise ParallelError(f"not every process has met rank 0: {error}") from None

    def close(self) -> None:
        """This rank needs nobody any more. Rank 0, which holds the store, waits a moment for the others to say so."""
        self.progress.finished = True
        self._closed.set()
        for thread in self._threads:
            thread.join(timeout=_STORE_S)
        if self.rank == 0:
            self._wait_for(lambda: all(r.finished for r in self._reports(range(1, self.size)).values()), _ANSWER_S)

    def _talk(self) -> None:
        """Report, look, obey, until this rank is finished or the store is gone with rank 0."""
        try:
            while True:
                last = self._closed.wait(self.limits.look_s)
                verdict = self._exchange()
                self.answered_at = time.monotonic()
                if last:
                    return
                if verdict is not None:
                    self._end(verdict)
        except (RuntimeError, ValueError) as error:
            self._store_lost(error)

    def _exchange(self) -> Verdict | None:
        """Report, judge (rank 0 all; the others rank 0, if it is silent), and hear what was decided."""
        self._report()
        known = range(self.size) if self.rank == 0 else (0, self.rank)
        found = self.judge.look(self._reports(known), time.monotonic())
        if found is not None and (self.rank == 0 or 0 in found.silent):
            self.store.compare_set(_VERDICT, "", json.dumps(vars(found)))
        said = self.store.get(_VERDICT).decode()
        return Verdict.from_data(json.loads(said)) if said else None

    def _report(self) -> None:
        self.store.set(_key(self.rank), json.dumps(self.progress.report().as_data()))

    def _reports(self, ranks: Sequence[int] | range) -> dict[int, Report]:
        texts = self.store.multi_get([_key(rank) for rank in ranks])
        return {rank: Report(**json.loads(text)) for rank, text in zip(ranks, texts, strict=True) if text}

    def _end(self, verdict: Verdict) -> None:
        """Say where this rank is if it hangs, wait for those that do to say it, and end."""
        line, _ = stack_of(self.progress.thread)
        self._write_stacks(verdict)
        stacks: dict[int, str] = {self.rank: line} if self.rank in verdict.ranks else {}
        with contextlib.suppress(RuntimeError):
            self.store.set(f"stack{self.rank}", line)
            expected = [rank for rank in verdict.ranks if rank not in verdict.silent and rank not in stacks]
            self._wait_for(lambda: self._collect(expected, stacks), _ANSWER_S)
            self.store.add("heard", 1)
            if self.rank == 0 or self.rank in verdict.ranks:  # the others' calls break when this process is gone
                listeners = self.size - len(verdict.silent)
                self._wait_for(lambda: self.store.add("heard", 0) >= listeners, _ANSWER_S)
        self._leave(verdict.line(stacks))

    def _collect(self, expected: Sequence[int], stacks: dict[int, str]) -> bool:
        for rank in expected:
            if rank not in stacks and self.store.check([f"stack{rank}"]):
                stacks[rank] = self.store.get(f"stack{rank}").decode()
        return len(stacks) >= len(expected)

    def _guard(self) -> None:
        """Rank 0 is judged by its store: what is stopped does not answer."""
        while not self._closed.wait(self.limits.look_s):
            silent_s = time.monotonic() - self.answered_at
            allowed_s = NAMED_AT * self.limits.limit_s * (SILENT_PATIENCE if self.progress.patience else 1.0)
            if silent_s >= allowed_s and self._threads[0].is_alive():
                verdict = Verdict((0,), (0,), (self.rank,), self.progress.at, silent_s)
                self._write_stacks(verdict)
                self._leave(verdict.line({}))

    def _store_lost(self, error: Exception) -> None:
        """Rank 0 is gone. What this rank waits for will not come: give its own error a moment to be raised."""
        if self._closed.wait(self.limits.limit_s / 2):
            return
        self._leave(f"rank 0 has ended while rank {self.rank} was in {self.progress.at}")

    def _write_stacks(self, verdict: Verdict) -> None:
        if self.folder is None:
            return
        with contextlib.suppress(OSError):
            self.folder.mkdir(parents=True, exist_ok=True)
            with (self.folder / f"hang-rank-{self.rank}.txt").open("w", encoding="utf-8") as file:
                file.write(f"{verdict.line({})}\n\nrank {self.rank}, main thread (innermost call last):\n")
                file.write(stack_of(self.progress.thread)[1] + "\nall threads (innermost call first):\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
            write_flight(self.folder, self.rank)

    def _leave(self, line: str) -> None:
        if self.folder is not None:
            line += f"; stacks of all ranks: {self.folder}/hang-rank-*.txt"
            line += f", their last collectives: {self.folder}/flight-*.json" if is_recording() else ""
        for tell in self.told:
            with contextlib.suppress(Exception):
                tell(line)
        os.write(2, f"tunesmith: error: {line}\n".encode())
        with contextlib.suppress(Exception):
            sys.stdout.flush()
        os._exit(1)

    def _wait_for(self, ready: Callable[[], bool], limit_s: float) -> None:
        until = time.monotonic() + limit_s
        with contextlib.suppress(RuntimeError):
            while not ready() and time.monotonic() < until:
                time.sleep(0.05)


def _key(rank: int) -> str:
    return f"rank{rank}"


def _met(rank: int) -> str:
    return f"met{rank}"


def _meet(rank: int, size: int) -> Store:
    """The watchdogs' own store, apart from torch's: a call that waits there must not keep a report waiting.

    Raises: ParallelError.
    """
    import torch.distributed as dist
    from torch._C._distributed_c10d import TCPStore

    host = os.environ.get("MASTER_ADDR", "127.0.0.1")
    store: Any = None
    if rank == 0:
        store = TCPStore(host, 0, None, True, _MEETING, wait_for_workers=False)
        store.multi_set([_VERDICT, *map(_key, range(size))], ["", *[""] * size])
    place: list[Any] = [None if store is None else store.port]
    dist.broadcast_object_list(place, src=0)
    try:
        return store or TCPStore(host, place[0], None, False, _MEETING, wait_for_workers=False)
    except RuntimeError as error:
        raise ParallelError(f"rank {rank} can't reach rank 0 at {host}:{place[0]}: {error}") from None
