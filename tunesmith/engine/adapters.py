"""Named adapters on one base, loaded and unloaded while requests run, and brought up to date while they are trained.

    load -> read by a thread -> `poll`, between two steps: into a free place -> acquire ... release -> unload

A name has versions: a request keeps the one that it began with, and its place is free for another when the last such
request has ended. There is one place more than adapters, so that a newer version can come in beside the older.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Event, Thread

import numpy as np

from tunesmith.engine.adapter_reader import AdapterFiles, AdapterReader, Base
from tunesmith.engine.adapter_stacks import AdapterStacks
from tunesmith.errors import AdapterError, RequestError, TunesmithError, nearest
from tunesmith.model.decoder import Decoder
from tunesmith.model.language_model import LanguageModel
from tunesmith.rundir.layout import is_run

FOLLOW_S = 2.0
"""Seconds between two looks at the runs that are followed."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class AdapterInfo:
    """A loaded adapter. step: of the checkpoint that it is; None for one that is no run's. num_running: its users."""

    name: str
    source: str
    version: int
    step: float | None
    follows: bool
    num_running: int


@dataclass(eq=False)
class _Version:
    """One set of weights of a name, in a place. `is_current`: requests that begin take it."""

    name: str
    number: int
    slot: int
    source: str
    step: float | None
    num_users: int = 0
    is_current: bool = True


@dataclass(eq=False)
class _Name:
    """A name, and what stands for it now. waiting: read, and without a place yet."""

    directory: Path
    follows: bool
    current: _Version | None = None
    waiting: AdapterFiles | None = None
    error: str | None = None


class AdapterPool:
    """The adapters of one model. Everything but reading files happens on the caller's thread.

    Args:
        max_adapters: names at the same time; max_rank: of any of their projections.
        base: what adapters must have been trained on; where it names no directory, nothing is compared.
    on_put: told of everything that goes into a place (other processes that share the model do the same).
    Raises: UnsupportedModelError, see `AdapterStacks`.
    """

    def __init__(
        self,
        model: LanguageModel,
        max_adapters: int = 8,
        max_rank: int = 16,
        *,
        base: Base | None = None,
        invariant: bool = False,
        follow_s: float = FOLLOW_S,
    ) -> None:
        if max_adapters < 1 or max_rank < 1:
            raise RequestError(f"max_loras and max_lora_rank must be at least 1, got {max_adapters} and {max_rank}")
        self.max_adapters = max_adapters
        self.stacks = AdapterStacks(model, max_adapters + 1, max_rank, invariant=invariant)
        assert isinstance(model, Decoder)
        self.reader = AdapterReader(self.stacks.linears, model.config.family, max_rank, base or Base())
        self._names: dict[str, _Name] = {}
        self._places: dict[int, _Version] = {}
        self._free = list(range(max_adapters, -1, -1))
        self._num_versions = 0
        self.on_put: Callable[[int, AdapterFiles], None] | None = None
        self._thread = _ReaderThread(self.reader, follow_s)

    def load(self, name: str, directory: str | Path, *, follow: bool = False, wait: bool = True) -> None:
        """Make an adapter known under a name; one of that name is replaced, for requests that begin from now on.

        Args:
            directory: in PEFT's format, or a run directory of `tunesmith train`: its outcome, or newest checkpoint.
            follow: a run's newer checkpoints take its place as they come; it may have none yet.
            wait: until it is read, and in its place where one is free (else at a `poll`, when a request has ended);
                without it requests for the adapter wait, and learn what was wrong with it.
        Raises: AdapterError, CheckpointError, RunDirError.
        """
        folder = Path(directory).expanduser()
        self._check_load(name, folder, follow)
        entry = _Name(folder, follow, current=self._names[name].current if name in self._names else None)
        if wait and follow:
            entry.waiting = self.reader.newest(folder)
        elif wait:
            entry.waiting = self.reader.read(folder)
        self._thread.forget(name)
        self._names[name] = entry
        if entry.waiting is None:
            self._thread.order(name, entry)
        elif follow:
            self._thread.follow(name, entry, entry.waiting.step or 0)
        self._place(name, entry)

    def _check_load(self, name: str, folder: Path, follow: bool) -> None:
        if not name:
            raise AdapterError("an adapter needs a name that requests ask for")
        if not folder.is_dir():
            raise AdapterError(f"there is no directory {folder}: name one with an adapter in PEFT's format, or a run")
        if follow and not is_run(folder):
            raise AdapterError(
                f"{folder} can't be followed: only run directories of tunesmith train are, whose checkpoints are whole "
                f"or absent; load it without follow"
            )
        if name not in self._names and len(self._names) >= self.max_adapters:
            raise AdapterError(
                f"{self.max_adapters} adapters are loaded ({', '.join(self._names)}), and there are no more places: "
                f"unload one of them, or set max_loras to more (--max-loras)"
            )

    def unload(self, name: str) -> bool:
        """Forget a name. Its place is free when the last running request that uses it has ended (`is_held`).

        Returns: whether it is free already. Raises: AdapterError for a name that is not known.
        """
        if name not in self._names:
            raise AdapterError(f"there is no adapter {name!r}{nearest(name, self._names)} ({self._known()})")
        self._thread.forget(name)
        entry = self._names.pop(name)
        self._retire(entry.current)
        return not self.is_held(name)

    def is_held(self, name: str) -> bool:
        """Whether requests still use a version of this name that is no longer loaded."""
        return any(version.name == name and not version.is_current for version in self._places.values())

    def list(self) -> list[AdapterInfo]:
        """What is loaded; not what is still being read."""
        return [
            AdapterInfo(name, now.source, now.number, now.step, entry.follows, now.num_users)
            for name, entry in self._names.items()
            if (now := entry.current) is not None
        ]

    @property
    def is_busy(self) -> bool:
        """Whether an adapter is being read that has no version yet: requests may wait for it."""
        return any(entry.current is None and entry.error is None for entry in self._names.values())

    def _known(self) -> str:
        return f"loaded: {', '.join(self._names)}" if self._names else "none is loaded"

    def check(self, name: str) -> None:
        """Raises RequestError for a name that is not known, or whose adapter can't be used."""
        entry = self._names.get(name)
        if entry is None:
            raise RequestError(f"there is no adapter {name!r}{nearest(name, self._names)} ({self._known()})")
        if entry.current is None and entry.error is not None:
            raise RequestError(f"the adapter {name!r} could not be loaded: {entry.error}")

    def acquire(self, name: str) -> int | None:
        """The place of an adapter, held until `release`; None while it is being read. Raises: as `check`."""
        self.check(name)
        current = self._names[name].current
        if current is None:
            return None
        current.num_users += 1
        return current.slot

    def release(self, slot: int) -> None:
        """One user of a place fewer."""
        version = self._places[slot]
        version.num_users -= 1
        self._drop_unused(version)

    def cache_key(self, slot: int) -> str:
        """What tells keys and values made with the adapter in this place from all others: its name and version."""
        version = self._places[slot]
        return f"{version.name}@{version.number}"

    def choose(self, slots: np.ndarray | None) -> None:
        """See `AdapterStacks.choose`."""
        self.stacks.choose(slots)

    def poll(self) -> None:
        """Between two steps: what was read meanwhile takes its place, where one is free."""
        for name, entry, outcome in self._thread.done():
            if self._names.get(name) is not entry:
                continue
            if isinstance(outcome, str):
                if outcome != entry.error:
                    _log.warning("the adapter %s could not be read: %s", name, outcome)
                entry.error = outcome
            else:
                entry.waiting = outcome
        for name, entry in self._names.items():
            self._place(name, entry)

    def wait(self, timeout_s: float) -> None:
        """Until something has been read, but not longer: for a loop that has nothing else to do."""
        self._thread.news.wait(timeout_s)

    def close(self) -> None:
        """Stop reading, and take the places off the model."""
        self._thread.stop()
        self.stacks.close()

    def _place(self, name: str, entry: _Name) -> None:
        """Put what was read into a place; where none is free, another time."""
        if entry.waiting is None or not self._free:
            return
        files, entry.waiting, entry.error = entry.waiting, None, None
        slot = self._free.pop()
        self.stacks.put(slot, files.linears)
        if self.on_put is not None:
            self.on_put(slot, files)
        self._num_versions += 1
        before = entry.current
        entry.current = _Version(name, self._num_versions, slot, files.source, files.step)
        self._places[slot] = entry.current
        self._retire(before)
        _log.info("adapter %s: version %d from %s", name, self._num_versions, files.source)

    def _retire(self, version: _Version | None) -> None:
        if version is not None:
            version.is_current = False
            self._drop_unused(version)

    def _drop_unused(self, version: _Version) -> None:
        if not version.is_current and not version.num_users:
            del self._places[version.slot]
            self._free.append(version.slot)


@dataclass(eq=False)
class _Job:
    name: str
    entry: _Name
    newer_than: float = -1


@dataclass(eq=False)
class _ReaderThread:
    """Reads adapters beside the engine's loop: those that are ordered at once, followed runs every few seconds."""

    reader: AdapterReader
    follow_s: float
    news: Event = field(default_factory=Event)
    _jobs: SimpleQueue[_Job | None] = field(default_factory=SimpleQueue)
    _outcomes: SimpleQueue[tuple[str, _Name, AdapterFiles | str]] = field(default_factory=SimpleQueue)
    _followed: dict[str, _Job] = field(default_factory=dict)
    _thread: Thread | None = None

    def order(self, name: str, entry: _Name) -> None:
        """Read an adapter, and follow it where that is asked for."""
        self._start()
        if entry.follows:
            self._followed[name] = _Job(name, entry)
        self._jobs.put(_Job(name, entry))

    def follow(self, name: str, entry: _Name, step: float) -> None:
        """Read what is newer than `step`, as it comes."""
        self._start()
        self._followed[name] = _Job(name, entry, step)
        self._jobs.put(self._followed[name])  # the thread may be waiting without a limit

    def forget(self, name: str) -> None:
        """Follow a name no more."""
        self._followed.pop(name, None)

    def done(self) -> list[tuple[str, _Name, AdapterFiles | str]]:
        """What was read since the last call, or why it could not be."""
        self.news.clear()
        found = []
        while not self._outcomes.empty():
            found.append(self._outcomes.get())
        return found

    def stop(self) -> None:
        """End the thread."""
        self._followed.clear()
        if self._thread is not None:
            self._jobs.put(None)
            self._thread.join()
            self._thread = None

    def _start(self) -> None:
        if self._thread is None:
            self._thread = Thread(target=self._run, name="adapter-reader", daemon=True)
            self._thread.start()

    def _run(self) -> None:
        while True:
            try:
                job = self._jobs.get(timeout=self.follow_s if self._followed else None)
                if job is None:
                    return
                if not job.entry.follows:
                    self._tell(job, lambda job=job: self.reader.read(job.entry.directory))  # type: ignore[misc]
                    continue
            except Empty:
                pass
            for followed in list(self._followed.values()):
                self._tell(followed, lambda job=followed: self._newer(job))  # type: ignore[misc]

    def _newer(self, job: _Job) -> AdapterFiles | None:
        found = self.reader.newest(job.entry.directory, job.newer_than)
        if found is not None:
            job.newer_than = found.step or 0
        return found

    def _tell(self, job: _Job, read: Callable[[], AdapterFiles | None]) -> None:
        outcome: AdapterFiles | str | None
        try:
            outcome = read()
        except (TunesmithError, OSError) as error:
            outcome = str(error)
        if outcome is not None:
            self._outcomes.put((job.name, job.entry, outcome))
            self.news.set()
