"""The folder that a team of processes has among the temporary files: where they meet, and what they say.

Whoever owns it holds a lock on a file in it, which the kernel lets go when the owner ends, however that was: so the
next team can tell folders that were left behind (`kill -9`) from those in use, whatever numbers processes have since.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import stat
import tempfile
from pathlib import Path

PREFIX = "tunesmith-team-"
_OWNER = "owner"
_log = logging.getLogger(__name__)


class TeamFolder:
    """A new folder; those that dead owners of this user left are removed first.

    `name` is its path. cleanup: what is in it goes too; it also happens when the process ends in good order.
    """

    def __init__(self) -> None:
        remove_left_behind(Path(tempfile.gettempdir()))
        self._folder = tempfile.TemporaryDirectory(prefix=PREFIX)
        self.name = self._folder.name
        self._lock = _locked_owner(Path(self.name))

    def cleanup(self) -> None:
        """Remove the folder, and let go of it. Twice does nothing."""
        self._folder.cleanup()
        if self._lock >= 0:
            os.close(self._lock)
        self._lock = -1


def _locked_owner(folder: Path) -> int:
    """The descriptor of the file that says that somebody is here; it is locked before it has its name."""
    import fcntl  # POSIX, as what passes a socket to a process

    unnamed = folder / f".{_OWNER}"
    descriptor = os.open(unnamed, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    unnamed.rename(folder / _OWNER)
    return descriptor


def remove_left_behind(temporary: Path) -> list[Path]:
    """Remove this user's folders whose owner is gone; which those were. A folder that says nothing of one stays."""
    removed = []
    for folder in temporary.glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):
            if _is_own_folder(folder) and _is_left(folder / _OWNER):
                shutil.rmtree(folder)
                removed.append(folder)
    if removed:
        _log.info("removed %d folders that engines left behind", len(removed))
    return removed


def _is_own_folder(folder: Path) -> bool:
    found = folder.lstat()
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid()


def _is_left(owner: Path) -> bool:
    """Whether nobody holds the lock. Raises: OSError where there is no such file."""
    import fcntl

    descriptor = os.open(owner, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)
    return True
