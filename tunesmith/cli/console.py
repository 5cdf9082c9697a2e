"""What the verbs print with: people read stderr, programs read the last line of stdout.

`err` and `out` are made when they are first used, so that `tunesmith --help` imports no rich.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

    err: Console
    out: Console


@dataclass
class Mode:
    """How this process was called; set once by `cli.main`."""

    debug: bool = False
    json: bool = False


class StoppedError(Exception):
    """A verb was stopped; the message says what was kept, and what to type to go on."""

    def __init__(self, message: str, exit_code: int = 130) -> None:
        super().__init__(message)
        self.exit_code = exit_code


mode = Mode()


PIPE_COLUMNS = 240
"""The width of a pipe or a file: rich takes 80 there, and cuts tables to it."""


@cache
def _console(stderr: bool) -> Console:
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() or os.environ.get("COLUMNS") else PIPE_COLUMNS
    return Console(stderr=stderr, highlight=False, soft_wrap=True, width=width)


def __getattr__(name: str) -> Console:
    if name not in ("err", "out"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _console(stderr=name == "err")


def is_json() -> bool:
    """Whether the caller asked for a JSON result line."""
    return mode.json


def is_debug() -> bool:
    """Whether the caller asked for tracebacks and debug logs."""
    return mode.debug


def launched_rank() -> int:
    """This process's rank by its launcher's environment; 0 alone. The mesh reads it again, and checks it."""
    names = ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "SLURM_PROCID")
    return next((int(os.environ[name]) for name in names if os.environ.get(name, "").isdigit()), 0)


def emit(result: Mapping[str, Any]) -> None:
    """With --json: print `result` as one line of JSON, the last line of stdout; else print nothing.

    NaN and infinity become null, paths become text.
    """
    if mode.json:
        from tunesmith.rundir.io import jsonable

        sys.stdout.write(json.dumps(jsonable(result), ensure_ascii=False, allow_nan=False) + "\n")
        sys.stdout.flush()
