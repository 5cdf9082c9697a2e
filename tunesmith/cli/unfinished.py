"""Runs that were stopped or killed before their end, as `chat`, `eval` and `merge` take them."""

from __future__ import annotations

import shlex
from pathlib import Path

from tunesmith.cli.console import err
from tunesmith.errors import RunDirError
from tunesmith.rundir.layout import is_run, open_run


def use_checkpoint(*paths: str | Path | None) -> Path | None:
    """Where one of `paths` is a run without an outcome: makes one of its newest whole checkpoint, and says so.

    Returns: the outcome's directory; None where nothing had to be made.
    Raises: RunDirError for a run that has nothing to make one of.
    """
    runs = [Path(path).expanduser() for path in paths if path is not None]
    for path in runs:
        if is_run(path) and not (path / "final").is_dir():
            return _from_checkpoint(path)
    return None


def _from_checkpoint(path: Path) -> Path:
    from tunesmith.engine.source import check_training, why_no_outcome
    from tunesmith.train.interim import write_interim

    run = open_run(path)
    check_training(run)
    interim = write_interim(run)
    if interim is None:
        raise RunDirError(why_no_outcome(run, has_checkpoint=False))
    err.print(
        f"This run has not finished: using what it had learnt at step {interim.step} of {interim.total_steps} "
        f"(to train on: tunesmith train --resume {shlex.quote(str(path))})",
        style="yellow",
        markup=False,
    )
    return interim.path
