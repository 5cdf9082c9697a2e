"""Tokenised documents on disk: flat arrays that are appended to, and afterwards mapped, never loaded whole.

    tokens.bin int32 · trained.bin bool · offsets.bin int64 · places.bin int64 · files.bin int32 · hashes.bin uint64
    meta.json  what they are, their sizes and SHA-256, and whatever the writer adds

A directory appears under its final name complete or not at all. Several writers of the same key take turns, and the
later ones find what the first has made.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from tunesmith.errors import DataError
from tunesmith.text.encoding import EncodedRows

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

UNFINISHED, TORN = ".part", ".torn"
# A writer touches its files every few seconds, and names them right after the last one.
STALE_AFTER_S = 3600
_log = logging.getLogger(__name__)
ARRAYS: dict[str, Any] = {
    "tokens": np.int32, "trained": np.bool_, "lengths": np.int64,
    "places": np.int64, "files": np.int32, "hashes": np.uint64,
}  # fmt: skip


class DocumentStore:
    """The arrays of a finished directory, memory-mapped, and its metadata."""

    def __init__(self, arrays: dict[str, NDArray[Any]], meta: dict[str, Any]) -> None:
        self.tokens, self.trained = arrays["tokens"], arrays["trained"]
        self.lengths: NDArray[np.int64] = arrays["lengths"]
        self.offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(self.lengths)])
        self.places, self.files, self.hashes = arrays["places"], arrays["files"], arrays["hashes"]
        self.meta = meta

    def __len__(self) -> int:
        return len(self.lengths)


class StoreWriter:
    """Appends documents to the files of a directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._streams: dict[str, IO[bytes]] = {name: (directory / f"{name}.bin").open("wb") for name in ARRAYS}
        if fcntl is not None:
            with contextlib.suppress(OSError):  # a file system without locks: age alone tells
                fcntl.flock(self._streams["tokens"], fcntl.LOCK_EX | fcntl.LOCK_NB)

    def append(self, rows: EncodedRows, file_number: int) -> None:
        """Documents of one file."""
        files = np.full(len(rows.lengths), file_number, dtype=np.int32)
        for name, stream in self._streams.items():
            values = files if name == "files" else getattr(rows, name)
            stream.write(np.ascontiguousarray(values, dtype=ARRAYS[name]).data)

    def finish(self, meta: dict[str, Any]) -> None:
        """Closes the files and writes meta.json with their checksums."""
        self.close()
        digests = {name: _sha256(self.directory / f"{name}.bin") for name in ARRAYS}
        text = json.dumps({**meta, "sha256": digests}, ensure_ascii=False)
        (self.directory / "meta.json").write_text(text, encoding="utf-8")

    def close(self) -> None:
        """Closes the files, all of them even where the disk is too full for the last of their bytes."""
        with contextlib.ExitStack() as stack:
            for stream in self._streams.values():
                stack.callback(stream.close)


def cache_folder() -> Path:
    """Where tokenised data is kept."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "tunesmith" / "data"


def cached_store(key: str, write: Callable[[StoreWriter], dict[str, Any]]) -> tuple[DocumentStore, bool]:
    """The store of a key, and whether it was there already; a torn or changed one is made anew.

    Of several processes that want one key the first makes it, and the others wait for its lock on a file: the ranks
    of a run need not have met for that, nor the runs know of each other. A process that dies lets go of its lock.

    A cache that is full or can't be written is no reason to stop: then the store is a temporary one.
    Args: `write`: appends all documents and returns the metadata; called again where the cache turns out to be full.
    """
    target = cache_folder() / key
    store = open_store(target, verify=True)
    if store is not None:
        return store, True
    with _only_writer(target):
        return _found_or_made(target, write)


def _found_or_made(target: Path, write: Callable[[StoreWriter], dict[str, Any]]) -> tuple[DocumentStore, bool]:
    store = open_store(target, verify=True)  # another process may have made it while this one waited
    if store is not None:
        return store, True
    try:
        _write_cached(target, write)
    except OSError as error:
        _log.warning("tokenised data is not kept: %s can't be written (%s)", target.parent, error.strerror or error)
        return temporary_store(write), False
    store = open_store(target, verify=False)
    if store is None:
        raise DataError(f"the cache at {target} can't be read back; delete it, or set data.cache to false")
    return store, False


@contextlib.contextmanager
def _only_writer(target: Path) -> Iterator[None]:
    """Only one process at a time is inside, of those of this machine, and of others where the file system has locks."""
    try:
        locks = target.parent.with_name("locks")  # empty files, which stay: removing one that is waited for is a race
        locks.mkdir(parents=True, exist_ok=True)
        stream = (locks / target.name).open("wb")
    except OSError:  # a cache that can't be written
        yield
        return
    with stream:
        if fcntl is not None:
            with contextlib.suppress(OSError):  # a file system without locks: each makes its own
                _wait_for_lock(stream, target)
        yield


def _wait_for_lock(stream: IO[bytes], target: Path) -> None:
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        _log.info("another process is making this tokenised data; waiting for it: %s", target)
        fcntl.flock(stream, fcntl.LOCK_EX)


def _write_cached(target: Path, write: Callable[[StoreWriter], dict[str, Any]]) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    remove_stale(target.parent)
    temporary = Path(tempfile.mkdtemp(prefix=f"{target.name[:16]}.", suffix=UNFINISHED, dir=target.parent))
    try:
        _write(temporary, write)
        _move(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove_stale(folder: Path) -> None:
    """Remove what killed writers left in the cache: untouched for an hour, and held open by no writer that lives."""
    for path in folder.glob("*"):
        if path.suffix in (UNFINISHED, TORN) and _is_stale(path):
            shutil.rmtree(path, ignore_errors=True)


def _is_stale(directory: Path) -> bool:
    try:
        newest = max(path.stat().st_mtime for path in (directory, *directory.iterdir()))
    except OSError:
        return False  # it is gone, or not ours
    return time.time() - newest > STALE_AFTER_S and not _is_being_written(directory / "tokens.bin")


def _is_being_written(path: Path) -> bool:
    """Whether a process holds the writer's lock: the system lets go of it when the process ends, however it does."""
    if fcntl is None:
        return False
    try:
        with path.open("rb") as stream:
            fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False


def temporary_store(write: Callable[[StoreWriter], dict[str, Any]]) -> DocumentStore:
    """A store that goes when it is no longer used."""
    directory = Path(tempfile.mkdtemp(prefix="tunesmith-data-"))
    try:
        _write(directory, write)
        store = open_store(directory, verify=False)
    except OSError as error:
        shutil.rmtree(directory, ignore_errors=True)
        raise DataError(
            f"tokenised data can't be written to {directory.parent}: {error.strerror}; free some space there"
        ) from None
    except BaseException:
        shutil.rmtree(directory, ignore_errors=True)
        raise
    assert store is not None
    weakref.finalize(store, shutil.rmtree, directory, ignore_errors=True)
    return store


def _write(directory: Path, write: Callable[[StoreWriter], dict[str, Any]]) -> None:
    writer = StoreWriter(directory)
    try:
        meta = write(writer)
        writer.finish(meta)
    finally:
        writer.close()


def _move(temporary: Path, target: Path) -> None:
    """To the final name; what another writer put there in the meantime is the same and may stay."""
    try:
        temporary.rename(target)
    except OSError:
        if open_store(target, verify=True) is None:
            aside = temporary.with_suffix(TORN)
            target.rename(aside)
            temporary.rename(target)
            shutil.rmtree(aside, ignore_errors=True)


def open_store(directory: Path, *, verify: bool) -> DocumentStore | None:
    """The store in a directory, or None when there is none, or (with `verify`) its files are not what was written."""
    try:
        meta = json.loads((directory / "meta.json").read_text(encoding="utf-8"))
        if verify and any(_sha256(directory / f"{name}.bin") != meta["sha256"][name] for name in ARRAYS):
            return None
        return DocumentStore({name: _mapped(directory / f"{name}.bin", dtype) for name, dtype in ARRAYS.items()}, meta)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _mapped(path: Path, dtype: Any) -> NDArray[Any]:
    if path.stat().st_size == 0:
        return np.empty(0, dtype)
    return np.memmap(path, dtype=dtype, mode="r").view(np.ndarray)


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
