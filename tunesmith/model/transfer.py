"""Copies between a GPU and the host, queued beside the computation: the one part of offloading that needs a GPU."""

from __future__ import annotations

import contextlib
import mmap
import weakref
from collections.abc import Iterable
from typing import Any, Protocol

import torch
from torch import Tensor

from tunesmith.errors import DeviceError
from tunesmith.hardware import available_memory_bytes
from tunesmith.units import ceil_div, format_bytes

_PORTABLE = 1
"""cudaHostRegisterPortable: pinned for every CUDA context of the process."""
_PAGE_BYTES = mmap.PAGESIZE


class Transfer(Protocol):
    """How bytes move. A ticket stands for copies that were queued, and means something to its transfer only."""

    def allocate(self, num_bytes: int) -> Tensor:
        """Host memory that copies may read and write, uint8 [num_bytes]. Raises: DeviceError where there is none."""

    def copy(self, pairs: Iterable[tuple[Tensor, Tensor]]) -> Any:
        """Queue target.copy_(source) for each pair, after all that was queued for computation until now."""

    def wait(self, ticket: Any) -> None:
        """Computation that is queued from now on finds those copies done."""


class CudaTransfer:
    """A stream of its own for the copies, tied to the computation by events: the host never waits.

    The events may be recorded as parts of a CUDA graph, as long as no memory must be pinned meanwhile.
    """

    def __init__(self, device: torch.device) -> None:
        if device.type != "cuda":
            raise DeviceError(
                f"train.checkpointing 'offload' moves activations from a GPU to the host, and there is nothing to move "
                f"them from on {device}: use --set train.checkpointing=selective"
            )
        self._stream = torch.cuda.Stream(device)

    def allocate(self, num_bytes: int) -> Tensor:
        """Pinned memory of exactly this size (torch's own allocator rounds to powers of two).

        Raises: DeviceError when the host has too little; RuntimeError while a graph is recorded.
        """
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError("host memory can't be pinned while a CUDA graph is recorded")
        free = available_memory_bytes()
        if num_bytes > free:
            raise DeviceError(
                f"train.checkpointing 'offload' needs {format_bytes(num_bytes)} more of host memory, and "
                f"{format_bytes(free)} are free: lower train.micro_batch_tokens, or set train.checkpointing=block"
            )
        return pinned_memory(num_bytes, "use --set train.checkpointing=selective, or block")

    def copy(self, pairs: Iterable[tuple[Tensor, Tensor]]) -> Any:
        """The event after the copies, and the stream that computes."""
        compute = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(compute)
        with torch.cuda.stream(self._stream):
            for target, source in pairs:
                target.copy_(source, non_blocking=True)
        return self._stream.record_event(), compute

    def wait(self, ticket: Any) -> None:
        """Let the stream that computes wait for the event."""
        event, compute = ticket
        compute.wait_event(event)


def pinned_memory(num_bytes: int, advice: str) -> Tensor:
    """Ordinary memory, registered with the driver until it is freed. Raises: DeviceError, which ends with `advice`.

    Whole pages of its own: of a page that two buffers share, the driver would register one only. The storage begins
    with the first of them: torch asks the driver about a storage's first byte, whatever part of it a tensor is.
    """
    buffer = touched_memory(num_bytes)
    pages_bytes = _PAGE_BYTES * ceil_div(num_bytes, _PAGE_BYTES)
    runtime, address = torch.cuda.cudart(), buffer.data_ptr()
    code = int(runtime.cudaHostRegister(address, pages_bytes, _PORTABLE))
    if code != 0:
        raise DeviceError(
            f"the driver could not pin {format_bytes(num_bytes)} of host memory (CUDA error {code}): {advice}"
        )
    weakref.finalize(buffer, runtime.cudaHostUnregister, address).atexit = False
    return buffer


def touched_memory(num_bytes: int) -> Tensor:
    """Whole pages of ordinary memory which the kernel has really given, uint8 [num_bytes], zeros.

    All of torch's threads ask for them, and for large ones: left to the driver, one thread waits for page after page.
    """
    pages_bytes = _PAGE_BYTES * ceil_div(num_bytes, _PAGE_BYTES)
    pages = mmap.mmap(-1, pages_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without large pages
        pages.madvise(mmap.MADV_HUGEPAGE)
    buffer = torch.frombuffer(pages, dtype=torch.uint8, count=num_bytes)
    buffer[::_PAGE_BYTES].zero_()
    return buffer
