"""Numbers of the host on their way to the device: one pinned buffer, one copy, and nobody waits for it.

Pinning memory is slow, and may wait for what the device runs: a step that does it stands still for as long as the step
before it takes. torch keeps pinned buffers that are free again, by the power of two that their size is rounded up to,
and knows when the device has read them. So `pin_ahead` has it keep some of every size before anyone waits.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from tunesmith.units import ceil_div

_ALIGNMENT = 16
_TORCH = {np.dtype(np.int64): torch.int64, np.dtype(np.int32): torch.int32, np.dtype(np.float32): torch.float32}
_FEW_BYTES = 2**16
_MANY, _SOME = 16, 4
"""Buffers of a size that is small, or not: two steps are on their way at once, and each has several small ones."""


def move(arrays: Sequence[np.ndarray], device: torch.device) -> list[Tensor]:
    """Arrays of int64, int32 or float32 as tensors of the device: on a CPU as they are, on a GPU through one pinned
    buffer."""
    if device.type != "cuda":
        return [torch.from_numpy(np.ascontiguousarray(array)).to(device) for array in arrays]
    places, total = places_of([array.nbytes for array in arrays])
    host = torch.empty(total, dtype=torch.uint8, pin_memory=True)
    fill(host.numpy(), arrays, places)
    return parts(host.to(device, non_blocking=True), arrays, places)


def places_of(sizes: Sequence[int]) -> tuple[list[int], int]:
    """Where parts of so many bytes begin, one behind the other, and the bytes of all.

    Each is aligned to 16 bytes: Triton compiles a kernel once more for every pointer that is now aligned and now not,
    a second each, in the middle of serving.
    """
    places, at = [], 0
    for size in sizes:
        places.append(at)
        at += ceil_div(size, _ALIGNMENT) * _ALIGNMENT
    return places, at


def fill(buffer: np.ndarray, arrays: Sequence[np.ndarray], places: Sequence[int]) -> None:
    """Write arrays into a buffer of bytes, each at its place."""
    for array, at in zip(arrays, places, strict=True):
        np.ndarray(array.shape, array.dtype, buffer=buffer, offset=at)[...] = array


def parts(moved: Tensor, arrays: Sequence[np.ndarray], places: Sequence[int]) -> list[Tensor]:
    """What a buffer of bytes holds of these arrays, as views of it: [total] uint8, its length a multiple of 16."""
    wholes: dict[np.dtype[np.generic], Tensor] = {}
    tensors = []
    for array, at in zip(arrays, places, strict=True):
        kind = array.dtype
        if kind not in wholes:
            wholes[kind] = moved.view(_TORCH[kind])
        part = wholes[kind].narrow(0, at // kind.itemsize, array.size)
        tensors.append(part if array.ndim == 1 else part.view(array.shape))
    return tensors


def pinned_sizes(most_bytes: int) -> list[tuple[int, int]]:
    """(bytes, how many) of the buffers that steps take turns with, where the largest has at least `most_bytes`."""
    largest = max(most_bytes - 1, 1).bit_length()
    return [(2**power, _MANY if 2**power <= _FEW_BYTES else _SOME) for power in range(largest + 1)]


def pin_ahead(most_bytes: int, device: torch.device) -> None:
    """Have torch keep pinned buffers of every size up to this one, so that no step has to make one."""
    if device.type == "cuda":
        held = [
            torch.empty(size, dtype=torch.uint8, pin_memory=True)
            for size, number in pinned_sizes(most_bytes)
            for _ in range(number)
        ]
        del held
