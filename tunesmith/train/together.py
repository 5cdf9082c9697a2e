"""What the loop does with other processes: stop after the same step, save one state, go on from one."""

from __future__ import annotations

import signal
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Protocol

import torch

from tunesmith.checkpoint.agreement import Agreement, Alone, GroupAgreement
from tunesmith.checkpoint.async_saver import AsyncSaver
from tunesmith.checkpoint.shards import Shard
from tunesmith.checkpoint.state import TrainingState, save_state
from tunesmith.parallel.agreement import any_rank, most, raise_together
from tunesmith.parallel.mesh import Mesh
from tunesmith.parallel.progress import Progress


class Saved(Protocol):
    """What is saved: all of it by a process alone, its shards by one of several."""

    step_number: int

    def state(self) -> TrainingState: ...


class Together:
    """One process. `Several` is the same among others."""

    def __init__(self) -> None:
        self.agreement: Agreement = Alone()

    def signal(self, received: signal.Signals | None) -> signal.Signals | None:
        """The signal that any process has received."""
        return received

    def any(self, flag: bool) -> bool:
        """Whether `flag` is true in any process."""
        return flag

    def long(self, what: str) -> AbstractContextManager[None]:
        """While what is inside may take long in one process alone."""
        return nullcontext()

    def prepare(self, trained: Saved, checkpoints: Path, keep: int) -> None:
        """After the first step: take what the first save would otherwise have to wait for."""

    def save(self, trained: Saved, checkpoints: Path, keep: int, done: Callable[[Path], None]) -> None:
        """Save the state; `done` is called with its directory once it is there. Raises: OSError."""
        done(save_state(checkpoints, trained.state(), keep=keep))

    def fence(self) -> None:
        """Before the optimiser writes to what is being saved."""

    def poll(self) -> None:
        """Learn of a save that goes on in the background. Raises: OSError."""

    def finish(self) -> None:
        """Wait for it. Raises: OSError."""

    def close(self) -> None:
        """Let everything go, without waiting for others."""


class Several(Together):
    """One of several processes: what one wants all do, and the state is written beside training.

    progress: is told when the main thread may wait long for a save.
    """

    def __init__(self, mesh: Mesh, progress: Progress) -> None:
        super().__init__()
        self.mesh, self.progress = mesh, progress
        # Groups of their own: saving and stopping must not get between the collectives of a step.
        self._flags: Any = torch.distributed.new_group(backend="gloo")
        self._group: Any = torch.distributed.new_group(backend="gloo")
        self.agreement = GroupAgreement(self._group)
        progress.leave_out(self._group)  # its calls come from the saver's thread
        self._saver: AsyncSaver | None = None
        self._done: Callable[[Path], None] = _ignore

    def signal(self, received: signal.Signals | None) -> signal.Signals | None:
        """The greatest number of any process's signal."""
        number = most(0 if received is None else received.value, self._flags)
        return signal.Signals(number) if number else None

    def any(self, flag: bool) -> bool:
        """Whether `flag` is true in any process."""
        return any_rank(flag, self._flags)

    def long(self, what: str) -> AbstractContextManager[None]:
        """The watchdog waits longer."""
        return self.progress.long(what)

    def prepare(self, trained: Saved, checkpoints: Path, keep: int) -> None:
        """Agree on who writes what, and take the host's memory for it in the background."""
        with self.progress.long("preparing a save"):
            self._saver_of(checkpoints, keep).prepare(self._shards(trained)[0])

    def save(self, trained: Saved, checkpoints: Path, keep: int, done: Callable[[Path], None]) -> None:
        """Begin to save; what was begun before is waited for."""
        self._done = done
        with self.progress.long("a save"):  # which waits for the one before
            shards, facts = self._shards(trained)
            self._saver_of(checkpoints, keep).save(trained.step_number, shards, facts)

    def _saver_of(self, checkpoints: Path, keep: int) -> AsyncSaver:
        if self._saver is None:
            device = self.mesh.device
            self._saver = AsyncSaver(checkpoints, keep=keep, device=device, agreement=self.agreement)
        return self._saver

    def _shards(self, trained: Saved) -> tuple[list[Shard], dict[str, Any]]:
        """This process's shards. Raises: in all processes, what one raises (weights that are NaN)."""
        found: tuple[list[Shard], dict[str, Any]] = ([], {})
        problem: Exception | None = None
        try:
            found = trained.shards()  # type: ignore[attr-defined]
        except Exception as error:
            problem = error
        raise_together(problem, self._flags)
        return found

    def fence(self) -> None:
        """Before the optimiser writes to what is being copied."""
        if self._saver is not None:
            with self.progress.long("the copy of a save"):
                self._saver.fence()

    def poll(self) -> None:
        """Learn of a save that has ended."""
        self._take(None if self._saver is None else self._saver.poll())

    def finish(self) -> None:
        """Wait for the save that is under way."""
        with self.progress.long("a save"):
            self._take(None if self._saver is None else self._saver.wait())

    def close(self) -> None:
        """The saver's thread is a daemon: a failing process does not wait for the others."""
        self._saver = None

    def _take(self, saved: Any) -> None:
        if saved is not None:
            self._done(saved.path)


def _ignore(path: Path) -> None:
    return None


def together(mesh: Mesh, progress: Progress) -> Together:
    """For the processes of a mesh; all of them call this."""
    return Together() if mesh.world_size == 1 else Several(mesh, progress)
