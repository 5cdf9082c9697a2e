"""Where a row stands in its file, as one number, so that it travels with the tokens: its line, and where lines don't
tell rows apart (a JSON array may be one line; parquet has none) its number among the rows, too.

    place = row << 32 | line        both from 1; row 0: the line says it; line 0: there are no lines
"""

from __future__ import annotations

_LINE_BITS = 32


def make_place(line: int, row: int = 0) -> int:
    """The place of a row (fits an int64)."""
    return row << _LINE_BITS | line


def name_place(file: str, place: int) -> str:
    """What people read: "file:12", "file: row 37 (line 1)", or "file: row 37"."""
    row, line = place >> _LINE_BITS, place & (1 << _LINE_BITS) - 1
    if not row:
        return f"{file}:{line}"
    return f"{file}: row {row} (line {line})" if line else f"{file}: row {row}"
