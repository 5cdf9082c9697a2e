"""What is kept from one command to the next, for each user: below $XDG_CACHE_HOME, or ~/.cache."""

from __future__ import annotations

import os
from pathlib import Path


def user_cache(name: str) -> Path:
    """The folder of one kind of thing. It may not be there yet."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "tunesmith" / name
