"""Files that are whole or absent: atomic JSON and directories, JSON lines that survive a torn end, checksums.

A write goes to a temporary name beside its target, is flushed to the disk, and is renamed. When the disk is full,
or the process is killed, the target is what it was before.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tunesmith.errors import RunDirError

_TEMPORARY = re.compile(r"^\..+\.tmp-(\d+)-[0-9a-f]{8}$")


def jsonable(value: Any) -> Any:
    """`value` in what JSON has: unknown numbers (NaN, infinity) become None; paths and the like become text."""
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [jsonable(item) for item in value]
    if isinstance(value, float):
        return float(value) if value - value == 0 else None
    return value if value is None or isinstance(value, (str, int, bool)) else str(value)


@contextlib.contextmanager
def system_errors() -> Iterator[None]:
    """Writers that are not Python raise errors of their own (safetensors): what the system said becomes an OSError."""
    try:
        yield
    except Exception as error:
        found = None if isinstance(error, OSError) else re.search(r"\(os error (\d+)\)", str(error))
        if found is None:
            raise
        number = int(found[1])
        raise OSError(number, os.strerror(number)) from error


def write_text_atomic(path: Path, text: str) -> None:
    """Write `text` as UTF-8 so that `path` holds either its old content or all of the new."""
    write_bytes_atomic(path, text.encode("utf-8"))


def write_bytes_atomic(path: Path, content: bytes) -> None:
    """Write `content` so that `path` holds either its old content or all of the new."""
    temporary = temporary_beside(path)
    try:
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_directory(path.parent)


def write_json_atomic(path: Path, value: Any) -> None:
    """Write `value` as JSON, readable by people (indented, UTF-8, keys in their order); see `jsonable`."""
    write_text_atomic(path, json.dumps(jsonable(value), ensure_ascii=False, indent=2, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """The content of a JSON file. Raises: RunDirError when it is missing or not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RunDirError(f"{path} does not exist") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise RunDirError(f"{path} is not valid JSON: {error}") from None


@contextlib.contextmanager
def atomic_directory(path: Path, *, replace: bool = False) -> Iterator[Path]:
    """A new directory to fill: it takes the name `path` only when the block ends well, else it vanishes.

    Args: replace: an existing `path` is exchanged for the new one; otherwise it is an error, found at the start.
    Raises: RunDirError when `path` exists and is not to be replaced; whatever the block raises.
    """
    if path.exists() and not replace:
        raise RunDirError(f"{path} exists already: name another folder, or remove it")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_beside(path)
    temporary.mkdir()
    try:
        yield temporary
        _fsync_tree(temporary)
        take_name(temporary, path, replace)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    fsync_directory(path.parent)


def take_name(temporary: Path, path: Path, replace: bool) -> None:
    """Give a complete directory its name; an existing one that is to be replaced is removed."""
    if not (replace and path.exists()):
        temporary.rename(path)
        return
    old = temporary_beside(path)
    path.rename(old)
    try:
        temporary.rename(path)
    except BaseException:
        old.rename(path)
        raise
    shutil.rmtree(old, ignore_errors=True)


def remove_leftovers(directory: Path) -> list[Path]:
    """Remove what writers of this machine that are no longer alive left half-written in `directory`; returns it."""
    removed = []
    for path in sorted(directory.glob(".*.tmp-*")):
        match = _TEMPORARY.match(path.name)
        if match is None or _is_alive(int(match[1])):
            continue
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
        removed.append(path)
    return removed


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def temporary_beside(path: Path) -> Path:
    """A new hidden name for what becomes `path`; `remove_leftovers` knows it when this process is gone."""
    return path.with_name(f".{path.name}.tmp-{os.getpid()}-{secrets.token_hex(4)}")


def _fsync_tree(directory: Path) -> None:
    for folder, _, names in os.walk(directory):
        for name in names:
            _fsync_path(Path(folder) / name)
        fsync_directory(Path(folder))


def fsync_directory(directory: Path) -> None:
    """Make the names in `directory` survive a power cut, where the file system can."""
    with contextlib.suppress(PermissionError):
        _fsync_path(directory)


def _fsync_path(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256_file(path: Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def append_jsonl(path: Path, row: Mapping[str, Any]) -> None:
    """Append one row to a file of JSON lines: all of it, or nothing when the disk is full."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        _append_line(handle, row, path)
    finally:
        os.close(handle)


def _append_line(handle: int, row: Mapping[str, Any], path: Path) -> None:
    line = (json.dumps(jsonable(row), ensure_ascii=False, allow_nan=False) + "\n").encode("utf-8")
    size = os.fstat(handle).st_size
    try:
        written = os.write(handle, line)
        if written < len(line):
            os.write(handle, line[written:])  # says why there was no room
    except OSError as error:
        with contextlib.suppress(OSError):
            os.ftruncate(handle, size)
        raise OSError(error.errno, os.strerror(error.errno or 0), str(path)) from None


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The rows of a file of JSON lines. A last line that was torn by a kill is left out.

    Raises: RunDirError when the file is missing, or another line is not a JSON object.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        raise RunDirError(f"{path} does not exist") from None
    rows = []
    for number, line in enumerate(lines[:-1], start=1):  # what follows the last newline is torn, or empty
        try:
            row = json.loads(line)
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise RunDirError(f"{path}:{number} is not valid JSON: {error}") from None
        if not isinstance(row, dict):
            raise RunDirError(f"{path}:{number} must be a JSON object, got {type(row).__name__}")
        rows.append(row)
    return rows


class MetricsWriter:
    """Appends rows to metrics.jsonl; each is on its way to the disk when `write` returns.

    Args: resume_step: keep the rows up to this step, drop later ones and a torn end (None: keep all whole rows).
    """

    def __init__(self, path: Path, *, resume_step: int | None = None) -> None:
        self.path = path
        if path.exists():
            _drop_after(path, resume_step)
        self._handle: int | None = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def write(self, row: Mapping[str, Any]) -> None:
        """Append one row; NaN and infinity become null. Raises: OSError when the disk is full; no row is half there."""
        if self._handle is None:
            raise ValueError(f"the writer of {self.path} is closed")
        _append_line(self._handle, row, self.path)

    def close(self) -> None:
        """Flush to the disk and close; again is harmless."""
        if self._handle is not None:
            with contextlib.suppress(OSError):  # pipes and special files have nothing to flush
                os.fsync(self._handle)
            os.close(self._handle)
            self._handle = None

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _drop_after(path: Path, resume_step: int | None) -> None:
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if resume_step is not None:
        rows = (line for line in whole.splitlines(keepends=True) if json.loads(line).get("step", 0) <= resume_step)
        whole = b"".join(rows)
    if whole != content:
        write_bytes_atomic(path, whole)
