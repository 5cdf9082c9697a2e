"""Data that is made, not read: `builtin:NAME` in a recipe."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

# name (without "builtin:") -> a function that yields rows, each in one of the formats files may have.
SOURCES: dict[str, Callable[[], Iterable[dict[str, Any]]]] = {}
