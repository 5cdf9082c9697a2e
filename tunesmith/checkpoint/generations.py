"""The states under a run's `checkpoints/`: which there are, and which stay."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from tunesmith.rundir.io import temporary_beside

_NAME = re.compile(r"^step-(\d{8})$")


def state_path(checkpoints: Path, step: int) -> Path:
    """Where the state of a step lies."""
    return checkpoints / f"step-{step:08d}"


def step_of(path: Path) -> int | None:
    """The step that a directory's name says; None for another name."""
    match = _NAME.match(path.name)
    return None if match is None else int(match[1])


def list_states(checkpoints: Path) -> list[Path]:
    """The states under `checkpoints`, oldest first; not verified."""
    if not checkpoints.is_dir():
        return []
    return sorted(path for path in checkpoints.iterdir() if _NAME.match(path.name))


def drop_old(checkpoints: Path, newest: Path, keep: int) -> None:
    """Remove all but the last `keep` states up to `newest`.

    A later state is one that was damaged, and gone back from: it must not crowd out the one just written.
    """
    for old in [known for known in list_states(checkpoints) if known.name <= newest.name][:-keep]:
        remove_state(old)


def remove_state(path: Path) -> None:
    """Out of sight first: a kill in the middle must not leave half a state under a good name."""
    doomed = temporary_beside(path)
    path.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)
