"""Compiling an engine's kernels in the background, from the moment its options are known until it makes its runner.

    compiling = start_compiling(Asked("models/qwen", quantize="fp8"))     # before torch is imported, if that can be
    ...                                                                   # import, load weights
    if compiling is not None: compiling.wait()

This module imports nothing that takes long; the work is done by `compiling_worker`.
"""

from __future__ import annotations

import contextlib
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tunesmith.engine.asked import Asked
from tunesmith.kernels.compiling import Compiling, can_compile, marker_of, start_worker
from tunesmith.kernels.cuda_start import start_cuda

_FILES = ("config.json", "recipe.yaml", "run.json", "adapter_config.json")
_under_way: dict[Path, Compiling] = {}


def start_ahead(asked: Asked) -> Compiling | None:
    """What takes long and needs no torch, while that is imported: CUDA starts, and kernels are compiled.

    `LLM` of the same arguments waits for these.
    """
    start_cuda(asked.device)
    return start_compiling(asked)


def start_compiling(asked: Asked) -> Compiling | None:
    """Begin to compile an engine's kernels; what is under way for the same engine is given again.

    None where there is no NVIDIA GPU, no Triton, nothing left to do, or a model that processes share: each of them
    compiles what it launches.
    """
    if asked.tensor_parallel_size > 1 or asked.backend == "transformers" or not can_compile(asked.device):
        return None
    marker = marker_of([asdict(asked), _stamps(asked)])
    if marker.exists():
        return _under_way.pop(marker, None)
    if marker in _under_way:
        return _under_way[marker]
    found = start_worker("tunesmith.engine.compiling_worker", {"asked": asdict(asked)}, marker)
    if found is not None:
        _under_way[marker] = found
    return found


def _stamps(asked: Asked) -> list[Any]:
    """When the small files were written that say what the model is."""
    found: list[Any] = []
    for folder in filter(None, (asked.model, asked.adapter)):
        for name in _FILES:
            with contextlib.suppress(OSError):
                found.append((name, (Path(folder).expanduser() / name).stat().st_mtime_ns))
    return found
