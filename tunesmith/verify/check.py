"""One check of the certificate, and how it is timed."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Outcome:
    """What a check found. `value` must not exceed `limit`, unless `passed` says otherwise."""

    value: float | None
    limit: float | None
    detail: str
    passed: bool | None = None


@dataclass(frozen=True)
class Check:
    """A row of the certificate. value and limit are None where the check is no number."""

    name: str
    passed: bool
    value: float | None
    limit: float | None
    detail: str
    duration_s: float

    def to_dict(self) -> dict[str, Any]:
        """The row as plain data."""
        return dict(vars(self))


def run_check(name: str, check: Callable[[], Outcome]) -> Check:
    """Run a check and time it. NaN never passes."""
    began = time.perf_counter()
    found = check()
    passed = found.passed
    if passed is None:
        passed = found.value is not None and found.limit is not None and found.value <= found.limit
    return Check(name, bool(passed), found.value, found.limit, found.detail, time.perf_counter() - began)
