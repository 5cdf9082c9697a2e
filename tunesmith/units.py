"""Units and their formatting: base units are stored, and formatted only where a person reads them."""

from __future__ import annotations

KIB = 2**10
MIB = 2**20
GIB = 2**30
MB = 10**6
GB = 10**9


def ceil_div(numerator: int, denominator: int) -> int:
    """The quotient of two positive integers, rounded up."""
    return -(-numerator // denominator)


def format_bytes(num_bytes: float) -> str:
    """Bytes as decimal B, kB, MB, GB or TB with three significant digits (GB = 10^9 bytes)."""
    size = float(num_bytes)
    for unit in ("B", "kB", "MB", "GB"):
        if abs(size) < 999.5:
            return f"{size:.0f} {unit}" if unit == "B" or abs(size) >= 100 else f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"


def format_seconds(seconds: float) -> str:
    """Seconds as '840 ms', '12.3 s', '4 min 05 s' or '2 h 03 min'."""
    if seconds < 1:
        return f"{seconds * 1e3:.3g} ms"
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min"


def format_count(count: float) -> str:
    """A count as '950', '12.3 k', '7.62 B' (thousand, million, billion)."""
    size = float(count)
    for unit in ("", " k", " M", " B"):
        if abs(size) < 999.5:
            return f"{size:.0f}" if not unit else f"{size:.3g}{unit}"
        size /= 1000
    return f"{size:.3g} T"
