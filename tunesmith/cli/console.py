"""What the verbs print with: people read stderr, programs read the last line of stdout.

`err` and `out` are made when they are first used, so that `tunesmith --help` imports no rich.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

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
TABLE_COLUMNS = 110
"""The width of a table there, as it is read in a log or an editor."""
_NARROW_COLUMNS = 20  # what a column that wraps is left at least, where others need much


@cache
def _console(stderr: bool) -> Console:
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    width = None if _has_width(stream) else PIPE_COLUMNS
    return Console(stderr=stderr, highlight=False, soft_wrap=True, width=width)


def _has_width(stream: TextIO) -> bool:
    return stream.isatty() or bool(os.environ.get("COLUMNS"))


def print_table(table: Table, unbroken: Sequence[str] = ()) -> None:
    """A table on stderr; in a pipe TABLE_COLUMNS wide at most, or as wide as columns that must not wrap need.

    Args: unbroken: cells of the last column that stay on one line in a pipe, too, such as commands to copy.
    """
    console = _console(stderr=True)
    console.print(table, width=None if _has_width(sys.stderr) else max(TABLE_COLUMNS, _whole_columns(table, unbroken)))


def _whole_columns(table: Table, unbroken: Sequence[str]) -> int:
    """The width at which no cell that must not wrap does."""
    from rich.cells import cell_len
    from rich.measure import Measurement

    console, width = _console(stderr=True), 1
    for column in table.columns:
        cells = [column.header, *column.cells] if column.no_wrap else []
        needed = [Measurement.get(console, console.options, cell).maximum for cell in cells]
        if column is table.columns[-1]:
            needed += map(cell_len, unbroken)
        width += 3 + max(needed, default=_NARROW_COLUMNS)
    return width


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
