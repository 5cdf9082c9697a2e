"""Pinned memory with a driver played by hand: whole pages, unregistered when freed, refused where it is too much."""

from __future__ import annotations

import gc
from types import SimpleNamespace

import pytest
import torch

from tunesmith.errors import DeviceError
from tunesmith.model import transfer
from tunesmith.model.transfer import CudaTransfer, touched_memory
from tunesmith.watch.memory import resident_bytes

PAGE = 4096


class Driver:
    """Keeps ranges of registered pages, and takes none twice."""

    def __init__(self, code: int = 0) -> None:
        self.ranges: dict[int, int] = {}
        self.code = code

    def register(self, address: int, num_bytes: int, flags: int) -> int:
        assert address % PAGE == 0
        assert num_bytes % PAGE == 0
        assert all(address + num_bytes <= start or start + size <= address for start, size in self.ranges.items())
        if self.code == 0:
            self.ranges[address] = num_bytes
        return self.code

    def unregister(self, address: int) -> int:
        del self.ranges[address]
        return 0


def _transfer(monkeypatch: pytest.MonkeyPatch, driver: Driver, is_capturing: bool = False) -> CudaTransfer:
    runtime = SimpleNamespace(cudaHostRegister=driver.register, cudaHostUnregister=driver.unregister)
    cuda = SimpleNamespace(
        Stream=lambda device: None, cudart=lambda: runtime, is_current_stream_capturing=lambda: is_capturing
    )
    monkeypatch.setattr(torch, "cuda", cuda)
    return CudaTransfer(torch.device("cuda", 0))


def test_buffers_have_pages_of_their_own_until_they_are_freed(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver()
    copies = _transfer(monkeypatch, driver)
    buffers = [copies.allocate(size) for size in (1, PAGE - 1, PAGE, PAGE + 1, 70_000)]
    assert [buffer.numel() for buffer in buffers] == [1, PAGE - 1, PAGE, PAGE + 1, 70_000]
    assert all(driver.ranges[buffer.data_ptr()] >= buffer.numel() for buffer in buffers)
    part = buffers[0][:1]
    del buffers
    gc.collect()
    del part
    assert driver.ranges == {}


def test_torch_recognises_the_memory_by_its_storage(monkeypatch: pytest.MonkeyPatch) -> None:
    """`Tensor.is_pinned` asks about the storage's first byte, and a recording refuses memory that is not pinned."""
    driver = Driver()
    buffer = _transfer(monkeypatch, driver).allocate(PAGE + 1)
    part = buffer[10:20]
    assert part.untyped_storage().data_ptr() in driver.ranges
    part.fill_(7)
    assert buffer.tolist() == [0] * 10 + [7] * 10 + [0] * (PAGE - 19)


def test_too_little_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    copies = _transfer(monkeypatch, Driver())
    monkeypatch.setattr(transfer, "available_memory_bytes", lambda: 999)
    assert copies.allocate(999).numel() == 999
    with pytest.raises(DeviceError, match=r"needs 1 kB more of host memory, and 999 B are free"):
        copies.allocate(1000)


def test_a_driver_that_pins_nothing_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DeviceError, match=r"could not pin 10 B of host memory \(CUDA error 2\)"):
        _transfer(monkeypatch, Driver(code=2)).allocate(10)


def test_nothing_is_pinned_while_a_graph_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver()
    with pytest.raises(RuntimeError, match="while a CUDA graph is recorded"):
        _transfer(monkeypatch, driver, is_capturing=True).allocate(10)
    assert driver.ranges == {}


def test_touched_memory_has_been_given() -> None:
    """Pages count as the process's own before anything is written to them; of zeros, down to the last byte."""
    num_bytes = 64 * 2**20 + 1
    before = resident_bytes()
    buffer = touched_memory(num_bytes)
    assert resident_bytes() - before > 0.9 * num_bytes
    assert buffer.numel() == num_bytes
    assert buffer[-1] == 0
