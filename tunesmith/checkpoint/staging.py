"""Tensors of safetensors files on their way to a GPU: threads read into pinned memory, from where copies are fast.

A copy from a mapped file is one thread's: the driver moves it through a buffer of its own, page by page, at some
3 GB/s. Here several threads fill buffers while what they have filled before crosses the bus.
"""

from __future__ import annotations

import json
import math
import queue
import struct
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from tunesmith.errors import ModelError
from tunesmith.units import GIB, MIB

THREADS = 8
BUFFER_BYTES = 16 * MIB
AHEAD_BYTES, AHEAD_OF_FREE = GIB, 8
"""How much may lie on the device before it is asked for, and the share of the free memory that it may take (one in so
many). One tensor is always let through."""
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}


Box = tuple[tuple[int, int], tuple[int, int]]
"""[start, stop) of the rows and of the columns of a matrix as its file has it."""


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies: its file, and its bytes in there: one run, or a run of so many bytes in every pitch."""

    path: Path
    offset: int
    num_bytes: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    run_bytes: int = 0
    pitch_bytes: int = 0

    def part(self, box: Box) -> Stored:
        """A box of a matrix."""
        (top, bottom), (left, right) = box
        pitch, size = self.shape[1] * self.dtype.itemsize, self.dtype.itemsize
        part = replace(
            self,
            offset=self.offset + top * pitch + left * size,
            num_bytes=(bottom - top) * (right - left) * size,
            shape=(bottom - top, right - left),
        )
        is_whole = right - left == self.shape[1]
        return part if is_whole else replace(part, run_bytes=(right - left) * size, pitch_bytes=pitch)

    def pieces(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """(offset in the file, bytes) of what lies from `start` to `stop` of the tensor's bytes, in order."""
        if not self.run_bytes:
            yield self.offset + start, stop - start
            return
        while start < stop:
            row, within = divmod(start, self.run_bytes)
            count = min(self.run_bytes - within, stop - start)
            yield self.offset + row * self.pitch_bytes + within, count
            start += count


def staging_pays(device: torch.device) -> bool:
    """Whether tensors get to `device` faster this way: on a CPU the mapped file is read as it is."""
    return device.type == "cuda"


def stored_tensors(path: Path) -> dict[str, Stored]:
    """The floating-point tensors of a safetensors file, by name.

    Source: the format's own description: eight bytes, the header's length; JSON; then the tensors.
    Raises: ModelError for a header that is none.
    """
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        places = {name: _stored(path, 8 + length, entry) for name, entry in entries.items() if entry["dtype"] in DTYPES}
    except (
        OSError,
        struct.error,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        OverflowError,
        MemoryError,
    ) as error:
        raise ModelError(f"{path} is torn or no safetensors file ({error!r}): download it again") from None
    return places


def _stored(path: Path, start: int, entry: Mapping[str, Any]) -> Stored:
    first, last = entry["data_offsets"]
    dtype, shape = DTYPES[entry["dtype"]], tuple(entry["shape"])
    if math.prod(shape) * dtype.itemsize != last - first:
        raise ValueError(f"{last - first} bytes for {list(shape)}")
    return Stored(path, start + first, last - first, dtype, shape)


class _Buffer:
    """Pinned memory of the host, the stream that copies out of it, and the copy that does so now."""

    def __init__(self, device: torch.device, num_bytes: int) -> None:
        is_gpu = device.type == "cuda"
        self.bytes = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=is_gpu)
        self.view = memoryview(cast(Any, self.bytes.numpy()))
        self.stream = torch.cuda.Stream(device) if is_gpu else None
        self.copied: Any = None


class StagedTensors:
    """Reads tensors in the order in which they will be asked for, ahead of it. A context manager.

    Args: wanted: the tensors by name, in order.
    """

    def __init__(
        self,
        wanted: Mapping[str, Stored],
        device: torch.device,
        *,
        threads: int = THREADS,
        buffer_bytes: int = BUFFER_BYTES,
        ahead_bytes: int | None = None,
    ) -> None:
        self._wanted, self._device = dict(wanted), device
        self._buffer_bytes = buffer_bytes
        self._ahead_bytes = _ahead_bytes(device) if ahead_bytes is None else ahead_bytes
        self._waiting = list(reversed(self._wanted))
        self._coming: dict[str, tuple[Tensor, Sequence[Future[Any]]]] = {}
        self._coming_bytes = 0
        self._buffers: queue.SimpleQueue[_Buffer] = queue.SimpleQueue()
        for _ in range(threads):
            self._buffers.put(_Buffer(device, buffer_bytes))
        self._closing = False
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="weights")
        self._submit()

    def __enter__(self) -> StagedTensors:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __contains__(self, name: str) -> bool:
        """Whether it is wanted, and has not been read."""
        return name in self._wanted

    def read(self, name: str) -> Tensor:
        """A tensor on the device; each once. Raises: ModelError where its file ends too early or can't be read."""
        while name not in self._coming:
            self._submit_one()
        held, chunks = self._coming.pop(name)
        for chunk in chunks:
            copied = chunk.result()
            if copied is not None:
                torch.cuda.current_stream(self._device).wait_event(copied)
        stored = self._wanted.pop(name)
        self._coming_bytes -= stored.num_bytes
        self._submit()
        return held.view(stored.dtype).view(stored.shape)

    def close(self) -> None:
        """End the threads; what they have not begun is left."""
        self._closing = True
        self._pool.shutdown(wait=True, cancel_futures=True)
        if self._coming and self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # copies under way go to memory that is given back now
        self._coming.clear()

    def _submit(self) -> None:
        while self._waiting and (not self._coming or self._coming_bytes < self._ahead_bytes):
            self._submit_one()

    def _submit_one(self) -> None:
        """Take memory for the next tensor, on the stream that will use it, and have its chunks read."""
        name = self._waiting.pop()
        stored = self._wanted[name]
        held = torch.empty(stored.num_bytes, dtype=torch.uint8, device=self._device)
        is_free = None
        if self._device.type == "cuda":
            is_free = torch.cuda.current_stream(self._device).record_event()
        starts = range(0, stored.num_bytes, self._buffer_bytes)
        chunks = [(start, held[start : start + self._buffer_bytes]) for start in starts]
        submit = self._pool.submit
        futures = [submit(self._read_chunk, stored, start, chunk, is_free) for start, chunk in chunks]
        self._coming[name] = (held, futures)
        self._coming_bytes += stored.num_bytes

    def _read_chunk(self, stored: Stored, start: int, chunk: Tensor, is_free: Any) -> Any:
        """Returns the event after the copy to a GPU, None on a CPU."""
        if self._closing:
            return None
        buffer = self._buffers.get()
        try:
            if buffer.copied is not None:
                buffer.copied.synchronize()
            _fill(buffer.view, stored, start, start + chunk.numel())
            buffer.copied = _copy(buffer, chunk, is_free)
            return buffer.copied
        finally:
            self._buffers.put(buffer)


def _ahead_bytes(device: torch.device) -> int:
    if device.type != "cuda":
        return AHEAD_BYTES
    free, _ = torch.cuda.mem_get_info(device)
    return min(AHEAD_BYTES, free // AHEAD_OF_FREE)


def _copy(buffer: _Buffer, chunk: Tensor, is_free: Any) -> Any:
    source = buffer.bytes[: chunk.numel()]
    if buffer.stream is None:
        chunk.copy_(source)
        return None
    with torch.cuda.stream(buffer.stream):
        buffer.stream.wait_event(is_free)  # the memory may still be in use by what it was taken for before
        chunk.copy_(source, non_blocking=True)
        return buffer.stream.record_event()


def _fill(view: memoryview, stored: Stored, start: int, stop: int) -> None:
    """Read these bytes of a tensor. Python's lock is free meanwhile. Raises: ModelError."""
    path = stored.path
    try:
        with path.open("rb", buffering=0) as file:
            for offset, size in stored.pieces(start, stop):
                file.seek(offset)
                piece, view = view[:size], view[size:]
                while piece:
                    count = file.readinto(piece)
                    if not count:
                        raise ModelError(f"{path} ends too early: download it again")
                    piece = piece[count:]
    except OSError as error:
        raise ModelError(f"{path} can't be read: {error.strerror}") from None
