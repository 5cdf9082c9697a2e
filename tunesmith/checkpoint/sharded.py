"""One training state written by several processes: a file or more each, one index, one manifest; whole or absent.

    checkpoints/step-00000120/
      tensors-00000-of-00004.safetensors ...   what each process wrote (one process: tensors.safetensors)
      state.json                               step, facts, and the index: logical name -> pieces (file, key, slices)
      manifest.json                            bytes and SHA-256 of every file, and of itself

1. All agree on a plan (which process writes which box), once for as long as nothing about the shards changes.
2. Each writes its files into one hidden folder, and flushes them to the disk.
3. All tell each other that they have. The first process writes index and manifest, and renames the folder.
So a kill of any process at any moment leaves the states that were there, and never half a state under a good name.
What it leaves in the hidden folder is removed at the next save.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunesmith.checkpoint.agreement import PATIENCE, Agreement, Alone
from tunesmith.checkpoint.generations import drop_old, state_path
from tunesmith.checkpoint.manifest import SCHEMA_VERSION, STATE, write_manifest
from tunesmith.checkpoint.shards import FILE_BYTES, Box, Plan, PlannedFile, Shard, box_of, make_plan
from tunesmith.checkpoint.tensor_files import Bytes, FileSum, Slot, raw_bytes, write_file
from tunesmith.errors import CheckpointError
from tunesmith.rundir.io import (
    fsync_directory,
    jsonable,
    remove_leftovers,
    take_name,
    temporary_beside,
    write_text_atomic,
)

THREADS = 4
Source = Callable[[PlannedFile], Iterable[Bytes]]
"""The bytes of a file's tensors, in its order."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Ticket:
    """A save that has begun.

    number: counts the plans, so that buffers are made anew with them. neighbours: the processes of this machine.
    """

    step: int
    temporary: Path
    plan: Plan
    number: int
    neighbours: tuple[int, ...] = (0,)


def save_shards(
    checkpoints: Path,
    step: int,
    shards: Sequence[Shard],
    facts: Mapping[str, Any],
    *,
    keep: int,
    agreement: Agreement | None = None,
    file_bytes: int | None = FILE_BYTES,
) -> Path:
    """Write one state and wait for it. All processes call it; `facts` are the first one's. Returns its directory.

    Raises: OSError when a disk is full, in every process; CheckpointError; ParallelError when a process is gone. What
    was there before is untouched then.
    """
    writer = ShardedWriter(checkpoints, keep=keep, agreement=agreement, file_bytes=file_bytes)
    ticket = writer.begin(step, shards)
    return writer.finish(ticket, tensors_source(shards), facts)


def tensors_source(shards: Sequence[Shard]) -> Source:
    """The bytes straight from the shards: never more than one tensor of a file on the host."""
    return lambda file: (raw_bytes(shards[number].tensor) for number, _ in file.entries)


class ShardedWriter:
    """Writes the states of one run. Every process has one, and calls `begin` and `finish` in the same order."""

    def __init__(
        self,
        checkpoints: Path,
        *,
        keep: int,
        agreement: Agreement | None = None,
        file_bytes: int | None = FILE_BYTES,
        threads: int = THREADS,
    ) -> None:
        self.checkpoints = checkpoints
        self.agreement: Agreement = agreement or Alone()
        self._keep, self._file_bytes, self._threads = keep, file_bytes, threads
        self._boxes: list[Box] = []
        self._plan: Plan | None = None
        self._number = 0

    def begin(self, step: int, shards: Sequence[Shard]) -> Ticket:
        """Agree on what each process writes. Raises: CheckpointError, in all of them, for shards that don't fit."""
        boxes, problem = self._own_boxes(shards)
        is_new = self._plan is None or boxes != self._boxes
        temporary = temporary_beside(state_path(self.checkpoints, step)).name
        host = socket.gethostname()
        mine = {"step": step, "folder": temporary, "new": is_new, "host": host, "problem": problem}
        answers = self.agreement.gather(mine)
        for answer in answers:
            if answer["problem"] is not None:
                raise CheckpointError(answer["problem"])
            if answer["step"] != step:
                raise CheckpointError(f"processes save different steps: {sorted({a['step'] for a in answers})}")
        if any(answer["new"] for answer in answers):
            self._boxes, self._plan, self._number = boxes, self._make_plan(boxes), self._number + 1
        assert self._plan is not None
        neighbours = tuple(rank for rank, answer in enumerate(answers) if answer["host"] == host)
        return Ticket(step, self.checkpoints / answers[0]["folder"], self._plan, self._number, neighbours)

    def finish(self, ticket: Ticket, source: Source, facts: Mapping[str, Any]) -> Path:
        """Write this process's files, wait for the others', and make the state visible. In any thread.

        Raises: OSError, CheckpointError, ParallelError; in all processes when in one.
        """
        try:
            return self._finish(ticket, source, facts)
        except BaseException:
            if self.agreement.rank == 0:
                shutil.rmtree(ticket.temporary, ignore_errors=True)
            raise

    def _finish(self, ticket: Ticket, source: Source, facts: Mapping[str, Any]) -> Path:
        own: Exception | None = None
        files: dict[str, FileSum] = {}
        try:
            files = self._write_own(ticket, source)
        except Exception as error:
            own = error
        listed = {name: [file.num_bytes, file.sha256] for name, file in files.items()}
        answers = self.agreement.gather({"files": listed, "problem": _problem(own, self.agreement.rank)})
        _raise_first(answers, own, ticket)
        path = state_path(self.checkpoints, ticket.step)
        if self.agreement.rank == 0:
            sums = {name: FileSum(*entry) for answer in answers for name, entry in answer["files"].items()}
            try:
                self._commit(ticket, path, sums, facts)
            except Exception as error:
                own = error
        _raise_first(self.agreement.gather({"problem": _problem(own, self.agreement.rank)}), own, ticket)
        return path

    def _own_boxes(self, shards: Sequence[Shard]) -> tuple[list[Box], str | None]:
        try:
            return [box_of(shard) for shard in shards], None
        except CheckpointError as error:
            return [], str(error)

    def _make_plan(self, boxes: list[Box]) -> Plan:
        mine = [[box.name, box.dtype, box.global_shape, box.slices] for box in boxes]
        held = self.agreement.gather(mine)
        return make_plan([[_box(*entry) for entry in entries] for entries in held], self._file_bytes)

    def _write_own(self, ticket: Ticket, source: Source) -> dict[str, FileSum]:
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        if self.agreement.rank == 0:
            self._remove_leftovers(ticket)
        ticket.temporary.mkdir(exist_ok=True)
        files = ticket.plan.files_of(self.agreement.rank)
        if len(files) < 2 or self._threads < 2:
            return {file.name: self._write_file(ticket, file, source) for file in files}
        with ThreadPoolExecutor(min(self._threads, len(files)), thread_name_prefix="checkpoint") as pool:
            sums = list(pool.map(lambda file: self._write_file(ticket, file, source), files))
        return {file.name: written for file, written in zip(files, sums, strict=True)}

    def _write_file(self, ticket: Ticket, file: PlannedFile, source: Source) -> FileSum:
        return write_file(ticket.temporary / file.name, list(slots_of(ticket.plan, file)), source(file))

    def _remove_leftovers(self, ticket: Ticket) -> None:
        remove_leftovers(self.checkpoints)
        # One save is in flight at most: another folder of this process is of a save that failed. Whether a process of
        # another machine lives, where the run was before, can't be asked; but none that saves is silent for so long.
        own = f".tmp-{os.getpid()}-"
        for path in self.checkpoints.glob(".step-*.tmp-*"):
            if path != ticket.temporary and (own in path.name or _age_s(path) > PATIENCE.total_seconds()):
                shutil.rmtree(path, ignore_errors=True)

    def _commit(self, ticket: Ticket, path: Path, files: dict[str, FileSum], facts: Mapping[str, Any]) -> None:
        for name, expected in files.items():
            _check_visible(ticket.temporary / name, expected)
        files[STATE] = _write_state(ticket.temporary / STATE, ticket, facts)
        write_manifest(ticket.temporary, files)
        fsync_directory(ticket.temporary)
        take_name(ticket.temporary, path, replace=True)
        fsync_directory(self.checkpoints)
        try:
            drop_old(self.checkpoints, path, self._keep)
        except OSError as error:
            _log.warning("an old checkpoint in %s can't be removed: %s", self.checkpoints, error)


def slots_of(plan: Plan, file: PlannedFile) -> Iterator[Slot]:
    """What a file holds."""
    for number, key in file.entries:
        box = plan.boxes[file.rank][number]
        yield Slot(key, box.dtype, tuple(stop - start for start, stop in box.slices))


def _write_state(path: Path, ticket: Ticket, facts: Mapping[str, Any]) -> FileSum:
    """state.json: a line for each tensor, in small pieces: encoding holds Python's lock, and training goes on."""
    head = {"schema": "tunesmith.state", "schema_version": SCHEMA_VERSION, "step": ticket.step}
    parts = [f'"{key}": {json.dumps(value)}' for key, value in head.items()]
    parts.append(f'"facts": {json.dumps(jsonable(dict(facts)), ensure_ascii=False, allow_nan=False)}')
    lines = (f"{_text(name)}: {_text(entry)}" for name, entry in ticket.plan.index().items())
    parts.append('"tensors": {\n' + ",\n".join(lines) + "\n}")
    text = "{\n" + ",\n".join(parts) + "\n}\n"
    write_text_atomic(path, text)
    content = text.encode("utf-8")
    return FileSum(len(content), hashlib.sha256(content).hexdigest())


def _text(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _age_s(folder: Path) -> float:
    """Seconds since anything in a folder was written."""
    times = []
    for path in (folder, *folder.glob("*")):
        with contextlib.suppress(OSError):
            times.append(path.stat().st_mtime)
    return time.time() - max(times, default=time.time())


def _check_visible(path: Path, expected: FileSum) -> None:
    size = path.stat().st_size if path.is_file() else None
    if size != expected.num_bytes:
        raise CheckpointError(
            f"{path.name}, which another process wrote, has {size} bytes here, not {expected.num_bytes}: checkpoints "
            f"must be on a file system that all machines share; set --set output=FOLDER to one"
        )


def _box(name: str, dtype: str, global_shape: Sequence[int], slices: Sequence[Sequence[int]]) -> Box:
    return Box(name, dtype, tuple(global_shape), tuple((start, stop) for start, stop in slices))


def _problem(error: Exception | None, rank: int) -> dict[str, Any] | None:
    """An error as the other processes are told of it."""
    if error is None:
        return None
    number = error.errno if isinstance(error, OSError) else None
    return {"rank": rank, "errno": number, "text": f"{type(error).__name__}: {error}"}


def _raise_first(answers: Sequence[Mapping[str, Any]], own: Exception | None, ticket: Ticket) -> None:
    """Raise what went wrong here, or in the first process in which something did."""
    if own is not None:
        raise own
    found = next((answer["problem"] for answer in answers if answer["problem"] is not None), None)
    if found is None:
        return
    if found["errno"] is not None:
        raise OSError(found["errno"], os.strerror(found["errno"]), str(ticket.temporary))
    raise CheckpointError(
        f"process {found['rank']} could not write the checkpoint of step {ticket.step}: {found['text']}"
    )
