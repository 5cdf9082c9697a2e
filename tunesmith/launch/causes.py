"""Why a group of processes ended, and whether another try can end otherwise.

A process that was killed, and one whose connection broke, are tried again from the last checkpoint. A mistake of use,
a NaN, a full disk, a failed check would come back: the group ends with them. So does one that was asked to stop and
has saved its state (exit codes 130 and 143).
"""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tunesmith.errors import ParallelError, TunesmithError

STOPPED = (130, 143)
_MISTAKE = 2
# Errors that a broken connection, a lost device or a file server's hiccup raise; a subclass reports its own name.
_PASSING = frozenset(
    (
        *("RuntimeError", "DistError", "DistBackendError", "DistNetworkError", "DistStoreError", "AcceleratorError"),
        *("OSError", "ConnectionError", "ConnectionResetError", "ConnectionRefusedError", "ConnectionAbortedError"),
        *("BrokenPipeError", "TimeoutError", "EOFError"),
    )
)


@dataclass(frozen=True)
class Ending:
    """How one process ended.

    rank: -1 where it is not known; exit_code: negative for a signal's number; error: the exception's class and message.
    """

    rank: int
    exit_code: int
    error: str | None = None
    message: str | None = None
    at: float = 0.0

    @property
    def was_killed(self) -> bool:
        """Whether a signal ended it, from outside or by a crash."""
        return self.exit_code < 0 and -self.exit_code != signal.SIGTERM

    @property
    def is_consequence(self) -> bool:
        """Whether what it says is what a process sees when another one is gone."""
        return self.error == ParallelError.__name__ or self.error in _PASSING

    @property
    def is_final(self) -> bool:
        """Whether another try would end the same."""
        if self.exit_code in (*STOPPED, _MISTAKE):
            return True
        return self.error is not None and not self.is_consequence

    def say(self) -> str:
        """The ending in a few words."""
        who = "a rank" if self.rank < 0 else f"rank {self.rank}"
        if self.exit_code < 0:
            return f"{who} was ended by {_signal_name(-self.exit_code)}"
        if self.error is None:
            return f"{who} ended with exit code {self.exit_code}"
        if self.error == ParallelError.__name__ and self.message:  # it names the ranks itself
            return self.message
        return f"{who}: {self.message if _is_ours(self.error) else f'{self.error}: {self.message}'}"


@dataclass(frozen=True)
class Verdict:
    """Whether to try again; the exit code and the line if not."""

    restart: bool
    exit_code: int
    line: str


def judge(endings: Sequence[Ending]) -> Verdict:
    """What is to be made of processes that ended badly: all of one try, those that were ended with them left out."""
    killed = [ending for ending in endings if ending.was_killed]
    final = [ending for ending in endings if ending.is_final]
    named = [ending for ending in endings if ending.error == ParallelError.__name__]
    cause = min(killed or final or named or endings, key=lambda ending: (ending.at, ending.rank))
    restart = bool(killed) or not final
    return Verdict(restart, cause.exit_code if cause.exit_code in (*STOPPED, _MISTAKE) else 1, cause.say())


def write_ending(path: Path, rank: int, exit_code: int, error: BaseException | None) -> None:
    """Leave how this process ends for the launcher to read. No error of its own: the disk may be full."""
    message = None if error is None else " ".join(str(error).split())
    name = None if error is None else type(error).__name__
    text = json.dumps({"rank": rank, "exit_code": exit_code, "error": name, "message": message, "at": time.time()})
    try:
        path.write_text(text, encoding="utf-8")
    except OSError:
        return


def read_ending(path: Path, rank: int, exit_code: int) -> Ending:
    """What a process left at its end; only its exit code where it could leave nothing."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        code = exit_code if exit_code < 0 else int(found["exit_code"])
        return Ending(rank, code, found["error"], found["message"], float(found["at"]))
    except (OSError, ValueError, KeyError, TypeError):
        return Ending(rank, exit_code, at=time.time())


def ending_path(logs: Path, rank: int) -> Path:
    """Where the process of a rank leaves how it ended."""
    return logs / f"rank-{rank}.end.json"


def _is_ours(name: str) -> bool:
    todo, names = [TunesmithError], set()
    while todo:
        kind = todo.pop()
        names.add(kind.__name__)
        todo += kind.__subclasses__()
    return name in names


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
