"""The memory meters against known allocations."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from tunesmith.units import MIB
from tunesmith.watch import memory
from tunesmith.watch.memory import LiveStorages, MemorySampler

_TOLERANCE = 6 * MIB  # the interpreter's own small change, and the kernel's batched page counters


def _touch(num_bytes: int) -> bytearray:
    block = bytearray(num_bytes)
    block[::4096] = b"x" * len(block[::4096])
    return block


def test_resident_peak_sees_a_block_that_came_and_went() -> None:
    with MemorySampler() as sampler:
        before = sampler.read().resident_peak_bytes
        block = _touch(64 * MIB)
        del block
        peak = sampler.read().resident_peak_bytes
    assert abs(peak - before - 64 * MIB) < _TOLERANCE


def test_start_forgets_an_earlier_peak() -> None:
    block = _touch(64 * MIB)
    with MemorySampler() as sampler:
        del block
        gc.collect()
        high = sampler.read().resident_peak_bytes
        sampler.start()
        assert sampler.read().resident_peak_bytes < high - 64 * MIB + _TOLERANCE


def test_sampling_thread_stands_in_for_the_high_water_mark(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_CLEAR_REFS", Path("/nonexistent/clear_refs"))
    with MemorySampler() as sampler:
        before = sampler.read()
        block = _touch(64 * MIB)
        after = sampler.read()
    assert before.resident_source == "sampled"
    assert abs(after.resident_peak_bytes - before.resident_peak_bytes - 64 * MIB) < _TOLERANCE
    assert len(block) == 64 * MIB


def test_device_figures_are_unknown_on_a_cpu() -> None:
    with MemorySampler("cpu") as sampler:
        reading = sampler.read()
    assert reading.device_allocated_peak_bytes is None
    assert reading.device_reserved_peak_bytes is None


def test_live_storages_count_a_known_allocation_exactly() -> None:
    with LiveStorages() as live:
        first = torch.zeros(1000)
        second = torch.ones(500, dtype=torch.float64)
        assert live.current_bytes == 8000
        del first
        assert live.current_bytes == 4000
        third = torch.empty(25, dtype=torch.int64)
        assert live.current_bytes == 4200
    assert live.peak_bytes == 8000
    assert second.numel() + third.numel() == 525


def test_views_and_in_place_operations_share_their_storage() -> None:
    with LiveStorages() as live:
        base = torch.zeros(100, 10)
        views = [base[1:], base.t(), base.view(-1), base.reshape(10, 100)]
        base.add_(1)
        del base
        assert live.current_bytes == 4000
        del views
        assert live.current_bytes == 0
    assert live.peak_bytes == 4000


def test_what_existed_before_counts_when_it_is_named_or_touched() -> None:
    named, touched, untouched = torch.zeros(10), torch.zeros(20), torch.zeros(30)
    with LiveStorages([named]) as live:
        assert live.current_bytes == 40
        total = touched.sum()
        assert live.current_bytes == 40 + 80 + 4
    assert total == 0
    assert untouched.numel() == 30


def test_a_reused_address_is_a_new_storage() -> None:
    with LiveStorages() as live:
        for _ in range(100):
            torch.empty(1000)
        assert live.current_bytes == 0
    assert live.peak_bytes == 4000


def test_a_resized_storage_changes_its_count() -> None:
    with LiveStorages() as live:
        tensor = torch.zeros(10)
        tensor.resize_(100)
        assert live.current_bytes == 400


def test_other_devices_are_left_out() -> None:
    with LiveStorages() as live:
        tensor = torch.empty(1000, device="meta")
        assert live.current_bytes == 0
    assert tensor.is_meta


def _chain(width: int, depth: int) -> torch.nn.Sequential:
    return torch.nn.Sequential(*[torch.nn.Tanh() for _ in range(depth)]).to(torch.float32)


def test_activations_held_for_the_backward_pass_are_counted() -> None:
    """Tanh keeps its output: a chain of n holds n outputs, a gradient and the input at the peak."""
    width, depth = 10_000, 8
    source = torch.zeros(width, requires_grad=True)
    with LiveStorages([source]) as live:
        out = _chain(width, depth)(source)
        assert live.current_bytes == 4 * width * (depth + 1)
        del out
    assert live.current_bytes == 4 * width


def test_checkpointing_lowers_the_counted_peak() -> None:
    width, depth = 10_000, 16
    peaks = {}
    for checkpointed in (False, True):
        source = torch.zeros(width, requires_grad=True)
        with LiveStorages([source]) as live:
            value = source
            for _ in range(4):
                block = _chain(width, depth // 4)
                value = checkpoint(block, value, use_reentrant=False) if checkpointed else block(value)
            value.sum().backward()
        peaks[checkpointed] = live.peak_bytes
    assert peaks[True] < 0.7 * peaks[False]


def test_reset_peak_starts_from_what_is_alive() -> None:
    with LiveStorages() as live:
        kept = torch.zeros(10)
        torch.zeros(1000)
        live.reset_peak()
        assert live.peak_bytes == 40
    assert kept.numel() == 10
