"""Objects that Python's collector does not look through because somebody froze them."""

from __future__ import annotations

import gc

OF_THE_INTERPRETER = 1000
"""Fewer frozen objects than this nobody froze: Python 3.12 begins with some hundred of its own."""


def somebody_froze() -> bool:
    """Whether this process has frozen objects beside the interpreter's own."""
    return gc.get_freeze_count() >= OF_THE_INTERPRETER
