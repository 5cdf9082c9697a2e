"""Weights on their way from the disk while something else is done: the kernel reads files into its cache unasked."""

from __future__ import annotations

import os
import threading
from pathlib import Path

from tunesmith.checkpoint.source import resolve_model
from tunesmith.hardware import available_memory_bytes
from tunesmith.recipe.schema import ModelSection


def read_ahead(model: ModelSection) -> threading.Thread | None:
    """Begin to read the weights of a model into the page cache, in a thread; None where that would not help.

    Files are left out that a machine's free memory would not hold together: they would push each other out.
    Raises: ModelError when there is no such model.
    """
    if model.weights == "random" or not hasattr(os, "posix_fadvise"):
        return None
    files = sorted(resolve_model(model.path, model.revision).glob("*.safetensors"))
    if not files or sum(path.stat().st_size for path in files) > available_memory_bytes() // 2:
        return None
    thread = threading.Thread(target=_advise, args=(files,), name="read-ahead", daemon=True)
    thread.start()
    return thread


def _advise(files: list[Path]) -> None:
    for path in files:
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except OSError:
            return  # loading will say what is wrong
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_WILLNEED)
        finally:
            os.close(descriptor)
