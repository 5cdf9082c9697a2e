"""What the launches of row-wise kernels share: the current GPU, the strides of rows, tiles and warps by width."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar

import torch
from torch import Tensor

from tunesmith.hardware import GENERATIONS
from tunesmith.kernels.chip import chip_of, known_by_chip

LEAST_SHARED_BYTES = GENERATIONS[8, 6].shared_bytes
# Values of one tile where rows are narrow: enough 16-byte loads in flight, few enough registers.
TILE = 2048
_VALUES_PER_WARP = 512
_FEW_PROCESSORS = 2
# The first generation whose kernels may begin while the one before them ends.
_FIRST_OVERLAP = (9, 0)
_HERE = nullcontext()
_overlapping: ContextVar[bool] = ContextVar("overlapping", default=False)


def current(device: torch.device) -> AbstractContextManager[object]:
    """Triton launches on the current GPU, wherever the tensors are; its interpreter takes tensors of the CPU."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return _HERE
    return torch.cuda.device(device)


def in_rows(x: Tensor) -> Tensor:
    """x as kernels read it: two or three dimensions, the last contiguous. Copies only where no view does."""
    if x.dim() not in (2, 3):
        x = x.reshape(-1, x.shape[-1])
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def row_strides(x: Tensor) -> tuple[int, int]:
    """Strides of the outer and the inner index of a row of [T, D] (whose inner index is always 0) or [T, N, D]."""
    return x.stride(0), x.stride(1) if x.dim() == 3 else 0


def tile(width: int) -> tuple[int, int, int]:
    """Rows and columns of one program's tile, powers of two, and its warps; a row is never cut."""
    columns = 1 << max(width - 1, 0).bit_length()
    rows = max(1, TILE // columns)
    return rows, columns, max(1, min(16, rows * columns // _VALUES_PER_WARP))


@known_by_chip
def num_processors(device: torch.device) -> int:
    """The GPU's streaming multiprocessors; for Triton's interpreter a small number."""
    chip = chip_of(device)
    return _FEW_PROCESSORS if chip is None else chip.num_processors


@known_by_chip
def shared_bytes(device: torch.device) -> int:
    """Shared memory that a program may have; the least of all chips for one that is not known.

    What is recorded on the meta device is compiled for the GPU that is there, or foreseen.
    """
    chip = chip_of(device)
    generation = None if chip is None else GENERATIONS.get(chip.capability)
    return LEAST_SHARED_BYTES if generation is None else generation.shared_bytes


@contextmanager
def overlapped() -> Iterator[None]:
    """Launches in here may begin while the kernel before them ends, where a kernel knows how (`overlaps`).

    Such a kernel asks for its weights before it waits, and attention for where requests lie (starts, contexts, tables,
    slots) and how far they are turned (cos, sin). So nothing in here may write weights, and none of these behind the
    first such launch; what writes them before has another, ordinary launch behind it: in a pass that is the first norm.
    TUNESMITH_OVERLAP=0 turns it off. A decoding step on an H200, one request: Qwen3-0.6B 1.04 ms without, 0.90 with; 7B
    in fp8 2.88 and 2.75.
    """
    token = _overlapping.set(os.environ.get("TUNESMITH_OVERLAP") != "0")
    try:
        yield
    finally:
        _overlapping.reset(token)


def overlaps(device: torch.device) -> bool:
    """Whether a kernel launched now is to wait for the one before it by itself (programmatic dependent launch)."""
    return _overlapping.get() and device.type in ("cuda", "meta") and _has_overlap(device)


@known_by_chip
def _has_overlap(device: torch.device) -> bool:
    # What is recorded on the meta device is compiled for the GPU that is there, or foreseen.
    chip = chip_of(device)
    return chip is not None and chip.capability >= _FIRST_OVERLAP
