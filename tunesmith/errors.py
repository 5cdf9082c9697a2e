"""The tree of errors. What the user can mend derives also from the builtin that fits.

    TunesmithError
    ├── RecipeError (ValueError)        a key, value or combination in a recipe
    ├── DataError (ValueError)          a dataset: format, row, encoding, nothing to train on
    ├── TokenizerError (ValueError)     a tokenizer or chat template that can't be used
    ├── ModelError (ValueError)         a model directory, configuration or weight that can't be loaded
    │   └── UnsupportedModelError       an architecture or feature that this code path doesn't have
    ├── AdapterError (ValueError)       an adapter that doesn't fit its base
    ├── CheckpointError (RuntimeError)  a checkpoint that is torn, corrupted or of another run
    ├── DeviceError (RuntimeError)      a device that is missing, unusable or can't do what is asked
    ├── MissingExtraError (ImportError) an optional dependency; names the extra that installs it
    ├── VerificationError (RuntimeError) a check of the certificate failed: the run would be wrong
    ├── TrainingError (RuntimeError)    training can't go on
    │   └── NonFiniteError              NaN or Inf in the loss or a gradient; names the batch
    ├── ParallelError (RuntimeError)    processes that can't be started, divided or reached
    │   └── LaunchError (ValueError)    a launch's command line that asks for what can't be
    ├── RunDirError (ValueError)        a run directory that is missing, foreign, or of a newer version
    └── RequestError (ValueError)       a generation request that can't be served

A message says what was wrong, what was got, what is allowed, and the next command to type.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` is an allocator's: Python's, torch's on a GPU, or torch's on the CPU (a bare RuntimeError)."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and "memory: you tried to allocate" in str(error)


class TunesmithError(Exception):
    """The root: whatever tunesmith raises on purpose."""


class RecipeError(TunesmithError, ValueError):
    """A key, a value or a combination in a recipe that is not allowed."""


class DataError(TunesmithError, ValueError):
    """A dataset that can't be used; the message names file and line."""


class TokenizerError(TunesmithError, ValueError):
    """A tokenizer or chat template that can't be used."""


class ModelError(TunesmithError, ValueError):
    """A model directory, configuration or weight that can't be loaded."""


class UnsupportedModelError(ModelError):
    """An architecture, or a feature of one, that this code path does not have."""


class AdapterError(TunesmithError, ValueError):
    """An adapter that does not fit its base."""


class CheckpointError(TunesmithError, RuntimeError):
    """A checkpoint that is torn, corrupted, or belongs to another run."""


class DeviceError(TunesmithError, RuntimeError):
    """A device that is missing, unusable, or can't do what is asked of it."""


class MissingExtraError(TunesmithError, ImportError):
    """An optional dependency is not installed."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(f"{package} is not installed; install it with: pip install 'tunesmith[{extra}]'")


class VerificationError(TunesmithError, RuntimeError):
    """A check of the certificate failed: the run would be silently wrong."""


class TrainingError(TunesmithError, RuntimeError):
    """Training can't go on."""


class NonFiniteError(TrainingError):
    """NaN or Inf appeared in the loss or a gradient; nothing was updated."""


class ParallelError(TunesmithError, RuntimeError):
    """Processes of a run that can't be started, divided as asked, or reached."""


class LaunchError(ParallelError, ValueError):
    """What was typed to launch processes is a mistake."""


class RunDirError(TunesmithError, ValueError):
    """A run directory that is missing, foreign, or written by a newer version."""


class RequestError(TunesmithError, ValueError):
    """A generation request that can't be served."""


def nearest(name: str, allowed: Iterable[str]) -> str:
    """A hint ", did you mean 'x'?" for a misspelt name, or the empty string when nothing is near."""
    close = difflib.get_close_matches(name, list(allowed), n=1, cutoff=0.5)
    return f", did you mean '{close[0]}'?" if close else ""
