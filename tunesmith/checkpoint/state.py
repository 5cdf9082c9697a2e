"""A complete training state on disk: safetensors and JSON, no pickle, whole or absent.

    checkpoints/step-00000120/
      tensors.safetensors   trained weights, optimiser states, random generators, by logical name
      state.json            step, data position, scalars, and for each tensor its global shape and slice
      manifest.json         bytes and SHA-256 of the two

A tensor's slice says which part of the global tensor a file holds: all of it today. It is what lets another number
of processes read the same state.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tunesmith.errors import CheckpointError, RunDirError
from tunesmith.rundir.io import atomic_directory, read_json, remove_leftovers, sha256_file, write_json_atomic

SCHEMA_VERSION = 1
TENSORS, STATE, MANIFEST = "tensors.safetensors", "state.json", "manifest.json"
_NAME = re.compile(r"^step-(\d{8})$")
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainingState:
    """Everything a run needs to go on as if it had never stopped.

    tensors: by logical name ("model.", "optimizer." and "rng." first). facts: plain JSON values.
    """

    step: int
    tensors: Mapping[str, Tensor]
    facts: Mapping[str, Any] = field(default_factory=dict)


def save_state(checkpoints: Path, state: TrainingState, *, keep: int) -> Path:
    """Write `state` under `checkpoints`, then drop all but the newest `keep` up to it. Returns its directory.

    Raises: OSError when the disk is full; what was there before is untouched then.
    """
    checkpoints.mkdir(parents=True, exist_ok=True)
    remove_leftovers(checkpoints)
    path = checkpoints / f"step-{state.step:08d}"
    with atomic_directory(path, replace=True) as directory:
        _write(directory, state)
    # A later state is one that was damaged, and gone back from: it must not crowd out the one just written.
    for old in [known for known in list_states(checkpoints) if known.name <= path.name][:-keep]:
        _remove(old)
    return path


def list_states(checkpoints: Path) -> list[Path]:
    """The states under `checkpoints`, oldest first; not verified."""
    if not checkpoints.is_dir():
        return []
    return sorted(path for path in checkpoints.iterdir() if _NAME.match(path.name))


def load_latest(checkpoints: Path, *, device: torch.device | str = "cpu") -> tuple[Path, TrainingState]:
    """The newest state that is whole. A torn or corrupted one is named in a warning and passed over.

    Raises: CheckpointError when there is none.
    """
    problems = []
    for path in reversed(list_states(checkpoints)):
        try:
            return path, load_state(path, device=device)
        except CheckpointError as error:
            problems.append(str(error))
            _log.warning("%s; going back to the one before it", error)
    found = "; ".join(problems) or "there is none"
    raise CheckpointError(f"no usable checkpoint in {checkpoints}: {found}. Start the run again without --resume")


def load_state(path: Path, *, device: torch.device | str = "cpu") -> TrainingState:
    """The state in `path`, its checksums verified first.

    Raises: CheckpointError when it is torn, corrupted, or of a newer version.
    """
    _verify(path)
    facts = _read(path / STATE)
    version = facts.get("schema_version")
    if not isinstance(version, int) or version > SCHEMA_VERSION:
        raise CheckpointError(
            f"{path} is of version {version}, this tunesmith reads up to {SCHEMA_VERSION}: "
            f"pip install --upgrade tunesmith"
        )
    try:
        tensors = FileTensors(path / TENSORS, device)
    except SafetensorError as error:
        raise CheckpointError(f"{path / TENSORS} can't be read: {error}") from None
    return TrainingState(int(facts["step"]), tensors, facts["facts"])


class FileTensors(Mapping[str, Tensor]):
    """The tensors of a safetensors file by name, each read when it is asked for: a state may be larger than memory."""

    def __init__(self, path: Path, device: torch.device | str) -> None:
        self._file = safe_open(path, framework="pt", device=str(device))
        self._names = tuple(self._file.keys())

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._file.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _verify(path: Path) -> None:
    manifest = _read(path / MANIFEST)
    for name in (TENSORS, STATE):
        expected = manifest.get("files", {}).get(name, {})
        file = path / name
        size = file.stat().st_size if file.is_file() else None
        if size is None or size != expected.get("bytes"):
            raise CheckpointError(f"checkpoint {path} is torn: {name} has {size} bytes, not {expected.get('bytes')}")
        if sha256_file(file) != expected.get("sha256"):
            raise CheckpointError(f"checkpoint {path} is corrupted: the SHA-256 of {name} is not the manifest's")


def _read(path: Path) -> dict[str, Any]:
    try:
        content = read_json(path)
    except RunDirError as error:
        raise CheckpointError(f"checkpoint {path.parent} is torn: {error}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"checkpoint {path.parent} is corrupted: {path.name} is not a JSON object")
    return content


def _write(directory: Path, state: TrainingState) -> None:
    sums = {TENSORS: write_tensors(directory / TENSORS, state.tensors)}
    tensors = {name: _placement(tensor) for name, tensor in state.tensors.items()}
    content = {
        "schema": "tunesmith.state",
        "schema_version": SCHEMA_VERSION,
        "step": state.step,
        "facts": dict(state.facts),
        "tensors": tensors,
    }
    write_json_atomic(directory / STATE, content)
    sums[STATE] = sha256_file(directory / STATE)
    files = {name: {"bytes": (directory / name).stat().st_size, "sha256": digest} for name, digest in sums.items()}
    write_json_atomic(directory / MANIFEST, {"schema_version": SCHEMA_VERSION, "files": files})


def _placement(tensor: Tensor) -> dict[str, Any]:
    return {
        "global_shape": list(tensor.shape),
        "dtype": _DTYPES[tensor.dtype],
        "slices": [[0, size] for size in tensor.shape],
        "file": TENSORS,
    }


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write a safetensors file one tensor at a time (never more than one on the host); returns its SHA-256.

    Source: the safetensors format: 8 bytes of header length, the JSON header, the tensors' bytes in order.
    """
    header = json.dumps(_header(tensors)).encode("utf-8")
    header += b" " * (-len(header) % 8)
    digest = hashlib.sha256()
    with path.open("xb") as file:
        _write_both(file, digest, len(header).to_bytes(8, "little") + header)
        for tensor in tensors.values():
            _write_both(file, digest, memoryview(_raw_bytes(tensor)))
    return digest.hexdigest()


def _header(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    header: dict[str, Any] = {}
    start = 0
    for name, tensor in tensors.items():
        end = start + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
        start = end
    return header


def _raw_bytes(tensor: Tensor) -> Any:
    flat = tensor.detach().cpu().contiguous().view(-1)
    return flat.view(torch.uint8).numpy() if flat.numel() else b""


def _write_both(file: BinaryIO, digest: Any, content: bytes | memoryview) -> None:
    file.write(content)
    digest.update(content)


def _remove(path: Path) -> None:
    """Out of sight first: a kill in the middle must not leave half a state under a good name."""
    doomed = path.with_name(f".{path.name}.tmp-{os.getpid()}-{secrets.token_hex(4)}")
    path.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)
