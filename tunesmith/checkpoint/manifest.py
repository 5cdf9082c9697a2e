"""The manifest of a training state, and what is verified by it: nothing that was changed after writing is used.

manifest.json names every other file with its bytes and SHA-256, and has a SHA-256 of itself: its text is what this
module writes for its content, to the byte.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tunesmith.checkpoint.agreement import Agreement, Alone
from tunesmith.checkpoint.tensor_files import FileSum
from tunesmith.errors import CheckpointError, RunDirError
from tunesmith.rundir.io import read_json, sha256_file, write_text_atomic

SCHEMA_VERSION = 2
STATE, MANIFEST = "state.json", "manifest.json"
THREADS = 4


def write_manifest(directory: Path, files: Mapping[str, FileSum]) -> None:
    """Write manifest.json: the last file of a state."""
    write_text_atomic(directory / MANIFEST, _text(files))


def verify(path: Path, agreement: Agreement | None = None) -> frozenset[str]:
    """Check that every file of the state in `path` is what was written. Returns: their names.

    Processes that all call it divide the files. Raises: CheckpointError naming every bad file, in all of them.
    """
    agreement = agreement or Alone()
    try:
        expected = read_manifest(path)
        problems = _problems(path, _share(expected, agreement))
    except (CheckpointError, OSError) as error:
        expected, problems = {}, [str(error)]
    found = [problem for mine in agreement.gather(problems) for problem in mine]
    if found:
        raise CheckpointError("; ".join(dict.fromkeys(found)))
    return frozenset(expected)


def read_manifest(path: Path) -> dict[str, FileSum]:
    """Name -> what the file must be. Raises: CheckpointError when the manifest itself was changed."""
    content = read_object(path / MANIFEST)
    try:
        files = {name: FileSum(entry["bytes"], entry["sha256"]) for name, entry in content["files"].items()}
        version = content["schema_version"]
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"checkpoint {path} is corrupted: {MANIFEST} lacks {error}") from None
    if version == 1 and "sha256" not in content:  # had no checksum of its own
        return files
    if (path / MANIFEST).read_text(encoding="utf-8") != _text(files, version):
        raise CheckpointError(f"checkpoint {path} is corrupted: {MANIFEST} is not as it was written")
    return files


def read_object(path: Path) -> dict[str, Any]:
    """A file that holds a JSON object. Raises: CheckpointError."""
    try:
        content = read_json(path)
    except RunDirError as error:
        raise CheckpointError(f"checkpoint {path.parent} is torn: {error}") from None
    except (OSError, RecursionError) as error:
        raise CheckpointError(f"checkpoint {path.parent} is torn: {path.name} can't be read: {error}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"checkpoint {path.parent} is corrupted: {path.name} is not a JSON object")
    return content


def _text(files: Mapping[str, FileSum], version: int = SCHEMA_VERSION) -> str:
    listed = {name: {"bytes": file.num_bytes, "sha256": file.sha256} for name, file in files.items()}
    content: dict[str, Any] = {"schema": "tunesmith.state_manifest", "schema_version": version, "files": listed}
    own = hashlib.sha256(_dump(content).encode("utf-8")).hexdigest()
    return _dump({**content, "sha256": own})


def _dump(content: Mapping[str, Any]) -> str:
    return json.dumps(content, ensure_ascii=False, indent=2) + "\n"


def _share(expected: Mapping[str, FileSum], agreement: Agreement) -> dict[str, FileSum]:
    """The files that this process checks: the largest are dealt out first."""
    by_size = sorted(expected.items(), key=lambda item: (-_size(item[1]), item[0]))
    return dict(by_size[agreement.rank :: agreement.world_size])


def _size(file: FileSum) -> int:
    return file.num_bytes if isinstance(file.num_bytes, int) else 0


def _problems(path: Path, expected: Mapping[str, FileSum]) -> list[str]:
    with ThreadPoolExecutor(THREADS, thread_name_prefix="verify") as pool:
        found = pool.map(lambda item: _problem(path, *item), expected.items())
        return [problem for problem in found if problem is not None]


def _problem(path: Path, name: str, expected: FileSum) -> str | None:
    """What is wrong with one file, None for nothing. A read that fails is a problem like any other."""
    file = path / name
    try:
        size = file.stat().st_size if file.is_file() else None
        if size is None or size != expected.num_bytes:
            return f"checkpoint {path} is torn: {name} has {size} bytes, not {expected.num_bytes}"
        if sha256_file(file) != expected.sha256:
            return f"checkpoint {path} is corrupted: the SHA-256 of {name} is not the manifest's"
    except OSError as error:
        return f"checkpoint {path} is torn: {name} can't be read: {error.strerror}"
    return None
