"""A complete training state on disk: safetensors and JSON, no pickle, whole or absent.

    checkpoints/step-00000120/
      tensors.safetensors   trained weights, optimiser states, random generators, by logical name
      state.json            step, data position, scalars, and for each tensor its global shape and its pieces
      manifest.json         bytes and SHA-256 of the others

A state knows no world size: several processes write one together (sharded.py), each its own files, and any number
reads it, each the boxes that it holds (stored.py). This is the case of one process, and how states are found.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from tunesmith.checkpoint.agreement import Agreement, Alone
from tunesmith.checkpoint.generations import list_states as list_states
from tunesmith.checkpoint.generations import step_of
from tunesmith.checkpoint.manifest import MANIFEST as MANIFEST
from tunesmith.checkpoint.manifest import SCHEMA_VERSION, read_object, verify
from tunesmith.checkpoint.manifest import STATE as STATE
from tunesmith.checkpoint.sharded import save_shards
from tunesmith.checkpoint.shards import SINGLE, whole
from tunesmith.checkpoint.stored import StoredTensors
from tunesmith.errors import CheckpointError

TENSORS = SINGLE
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainingState:
    """Everything a run needs to go on as if it had never stopped.

    tensors: by logical name ("model.", "optimizer." and "rng." first); of one that was loaded, `StoredTensors`, which
    also give parts. facts: plain JSON values.
    """

    step: int
    tensors: Mapping[str, Tensor]
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def stored(self) -> StoredTensors:
        """The tensors of a state that was loaded."""
        assert isinstance(self.tensors, StoredTensors)
        return self.tensors


def save_state(checkpoints: Path, state: TrainingState, *, keep: int) -> Path:
    """Write `state` under `checkpoints`, then drop all but the newest `keep` up to it. Returns its directory.

    Raises: OSError when the disk is full; what was there before is untouched then.
    """
    shards = [whole(name, tensor) for name, tensor in state.tensors.items()]
    return save_shards(checkpoints, state.step, shards, state.facts, keep=keep, file_bytes=None)


def load_latest(
    checkpoints: Path, *, device: torch.device | str = "cpu", agreement: Agreement | None = None
) -> tuple[Path, TrainingState]:
    """The newest state that is whole. A torn or corrupted one is named in a warning and passed over.

    Processes that all call it with an agreement divide the checking, and come to the same state.
    Raises: CheckpointError when there is none.
    """
    agreement = agreement or Alone()
    problems = []
    for name in _names(checkpoints, agreement):
        try:
            path = checkpoints / name
            return path, load_state(path, device=device, agreement=agreement)
        except CheckpointError as error:
            problems.append(str(error))
            _log.warning("%s; going back to the one before it", error)
    found = "; ".join(problems) or "there is none"
    raise CheckpointError(f"no usable checkpoint in {checkpoints}: {found}. Start the run again without --resume")


def load_state(path: Path, *, device: torch.device | str = "cpu", agreement: Agreement | None = None) -> TrainingState:
    """The state in `path`, its checksums verified first; its tensors are read when they are asked for.

    Raises: CheckpointError, in all processes, when it is torn, corrupted, or of a newer version.
    """
    agreement = agreement or Alone()
    files = verify(path, agreement)
    try:
        state, problem = _open(path, files, device), None
    except CheckpointError as error:
        state, problem = None, str(error)
    for found in agreement.gather(problem):
        if found is not None:
            raise CheckpointError(found)
    return cast(TrainingState, state)


def _names(checkpoints: Path, agreement: Agreement) -> Sequence[str]:
    """The states there are, newest first, as the first process sees them."""
    return cast(Sequence[str], agreement.gather([path.name for path in reversed(list_states(checkpoints))])[0])


def _open(path: Path, files: frozenset[str], device: torch.device | str) -> TrainingState:
    if STATE not in files:
        raise CheckpointError(f"checkpoint {path} is corrupted: {MANIFEST} does not name {STATE}")
    content = read_object(path / STATE)
    version = content.get("schema_version")
    if not isinstance(version, int) or version > SCHEMA_VERSION:
        raise CheckpointError(
            f"{path} is of version {version}, this tunesmith reads up to {SCHEMA_VERSION}: "
            f"pip install --upgrade tunesmith"
        )
    try:
        step, facts, index = int(content["step"]), dict(content["facts"]), dict(content["tensors"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"checkpoint {path} is corrupted: {STATE} lacks {error}") from None
    if step_of(path) not in (None, step):
        raise CheckpointError(f"checkpoint {path} is corrupted: it holds the state of step {step}")
    return TrainingState(step, StoredTensors(path, index, files, device), facts)
