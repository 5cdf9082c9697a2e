"""Recording of what a piece of work launches, to launch it again as one: CUDA graphs behind a small face."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

Made = TypeVar("Made")


class Recorder(Protocol):
    """What `DecodeGraphs` asks of a device."""

    def warm_up(self, work: Callable[[], object]) -> None:
        """Run the work once, so that nothing that happens at first calls only is recorded."""

    def record(self, work: Callable[[], Made]) -> tuple[Callable[[], None], Made]:
        """What repeats the work, and the tensors that it writes each time. Raises RuntimeError where it can't be."""

    def borrow(self, tensor: Tensor) -> Tensor:
        """A recorded tensor's memory without holding it: later recordings may use it for what they compute.

        It is valid from a replay of its own recording to the next replay of any.
        """

    def free_bytes(self) -> int | None:
        """Memory of the device that is free; None where that is not known."""

    def renew(self) -> None:
        """Give the memory of dropped recordings back."""


class CudaRecorder:
    """CUDA graphs of one device, in one memory pool, recorded on one stream."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self.pool: Any = torch.cuda.graph_pool_handle()

    def warm_up(self, work: Callable[[], object]) -> None:
        """On the stream that everything else runs on: its memory serves other work afterwards."""
        work()

    def record(self, work: Callable[[], Made]) -> tuple[Callable[[], None], Made]:
        """By stream capture. Other threads may go on using the device (`thread_local`)."""
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize(self.device)
        with torch.cuda.stream(self.stream):
            graph.capture_begin(pool=self.pool, capture_error_mode="thread_local")
            try:
                made = work()
            except BaseException:
                with suppress(RuntimeError):
                    graph.capture_end()
                raise
            graph.capture_end()
        return graph.replay, made

    def borrow(self, tensor: Tensor) -> Tensor:
        """A view by address; the tensor itself where torch would copy."""
        numbers = tensor.view(torch.int16) if tensor.element_size() == 2 else tensor.view(torch.int32)
        found = torch.as_tensor(_Memory(numbers), device=tensor.device)
        return found.view(tensor.dtype) if found.data_ptr() == tensor.data_ptr() else tensor

    def free_bytes(self) -> int | None:
        """What the driver has to give, and what torch has reserved and does not use."""
        free, _ = torch.cuda.mem_get_info(self.device)
        return free

    def renew(self) -> None:
        """A new pool; the old one's memory goes back with the last of its graphs."""
        self.pool = torch.cuda.graph_pool_handle()
        torch.cuda.empty_cache()


class DryRecorder:
    """Of what stands for a GPU: the work is done once, for whoever takes down its launches, and nothing repeats it."""

    def warm_up(self, work: Callable[[], object]) -> None:
        """Nothing that happens at first calls only."""

    def record(self, work: Callable[[], Made]) -> tuple[Callable[[], None], Made]:
        """The work, done once."""
        return lambda: None, work()

    def borrow(self, tensor: Tensor) -> Tensor:
        """There is no memory to spare."""
        return tensor

    def free_bytes(self) -> int | None:
        """Not known."""
        return None

    def renew(self) -> None:
        """There is nothing to give back."""


class _Memory:
    """A contiguous tensor's memory, by the protocol that CUDA libraries share arrays with; it holds nothing."""

    def __init__(self, numbers: Tensor) -> None:
        self.__cuda_array_interface__ = {
            "shape": tuple(numbers.shape),
            "typestr": f"<i{numbers.element_size()}",
            "data": (numbers.data_ptr(), False),
            "version": 3,
        }
