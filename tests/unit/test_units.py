"""Numbers as people read them."""

from __future__ import annotations

import pytest

from tunesmith.units import GB, GIB, MIB, ceil_div, format_bytes, format_count, format_seconds


@pytest.mark.parametrize(("numerator", "denominator", "quotient"), [(0, 4, 0), (1, 4, 1), (4, 4, 1), (5, 4, 2)])
def test_ceil_div_rounds_up(numerator: int, denominator: int, quotient: int) -> None:
    assert ceil_div(numerator, denominator) == quotient


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (16_260_000_000, "16.3 GB"), (999_600, "1 MB"), (2.5e12, "2.5 TB")],
)
def test_format_bytes_is_decimal(num_bytes: float, text: str) -> None:
    assert format_bytes(num_bytes) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.84, "840 ms"), (12.34, "12.3 s"), (245, "4 min 05 s"), (7380, "2 h 03 min")]
)
def test_format_seconds(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


@pytest.mark.parametrize(("count", "text"), [(950, "950"), (12_300, "12.3 k"), (7.62e9, "7.62 B")])
def test_format_count(count: float, text: str) -> None:
    assert format_count(count) == text


def test_gb_and_gib_differ() -> None:
    assert GIB == 1024 * MIB
    assert GB == 10**9
