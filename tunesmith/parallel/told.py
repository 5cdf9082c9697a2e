"""Who is told when a run's processes are about to be ended because one of them hangs. Imports nothing."""

from __future__ import annotations

from collections.abc import Callable

ON_HANG: list[Callable[[str], None]] = []
"""Each is called with the line that names the rank, just before this process ends."""
