"""Saving beside training on a GPU: bits, the fence, pinned buffers, and how long the loop is kept."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tunesmith.checkpoint.async_saver import AsyncSaver
from tunesmith.checkpoint.host_copy import CudaLane
from tunesmith.checkpoint.shards import whole
from tunesmith.checkpoint.state import load_latest
from tunesmith.units import MIB

pytestmark = pytest.mark.gpu


def weights(count: int, num_values: int) -> dict[str, torch.Tensor]:
    return {f"model.{n}": torch.randn(num_values, device="cuda") for n in range(count)}


def busy(cycles: int = 10**9) -> None:
    """Keep the compute stream busy for about half a second."""
    torch.cuda._sleep(cycles)


def test_the_update_behind_the_fence_is_not_in_the_state(tmp_path: Path) -> None:
    """Copies of 1.2 GB are queued behind half a second of work; updates are queued at once behind the fence."""
    tensors = weights(30, 10 * MIB)
    expected = {name: tensor.cpu() + 1 for name, tensor in tensors.items()}
    with AsyncSaver(tmp_path, keep=1, device="cuda") as saver:
        shards = [whole(name, tensor) for name, tensor in tensors.items()]
        saver.prepare(shards)
        saver._join()
        busy()
        for tensor in tensors.values():
            tensor.add_(1)
        stall_s = saver.save(1, shards, {})
        saver.fence()
        for tensor in tensors.values():
            tensor.mul_(0)
        saved = saver.wait()
    assert saved is not None
    assert stall_s < 0.1
    assert saved.device_stall_s is not None and saved.device_stall_s > 0
    state = load_latest(tmp_path)[1]
    assert all(torch.equal(state.tensors[name], tensor) for name, tensor in expected.items())
    assert not any(tensor.any() for tensor in tensors.values())


def test_copies_run_beside_the_next_steps_work(tmp_path: Path) -> None:
    """With work queued behind the save, the copies have long ended when the work does: the fence waits for nothing."""
    tensors = weights(10, 10 * MIB)
    with AsyncSaver(tmp_path, keep=1, device="cuda") as saver:
        shards = [whole(name, tensor) for name, tensor in tensors.items()]
        saver.prepare(shards)
        saver._join()
        saver.save(1, shards, {})
        busy()
        saver.fence()
        torch.cuda.synchronize()
        saved = saver.wait()
    assert saved is not None
    assert saved.device_stall_s is not None and saved.device_stall_s < 0.01


def test_views_and_tensors_that_nobody_holds(tmp_path: Path) -> None:
    base = torch.randn(64, 96, device="cuda")
    expected = base[:, 16:48].cpu()
    with AsyncSaver(tmp_path, keep=1, device="cuda") as saver:
        busy(10**8)
        saver.save(
            1, [whole("model.view", base[:, 16:48]), whole("model.sum", base * 2), whole("rng.cpu", base.cpu())], {}
        )
        for _ in range(20):
            torch.full((64, 96), -1.0, device="cuda")  # takes the memory of what was let go
        saver.fence()
    state = load_latest(tmp_path)[1]
    assert torch.equal(state.tensors["model.view"], expected)
    assert torch.equal(state.tensors["model.sum"], state.tensors["rng.cpu"] * 2)


def test_buffers_are_pinned() -> None:
    assert CudaLane(torch.device("cuda", 0)).buffer(1000).is_pinned()


def test_a_thousand_tensors_are_queued_in_time(tmp_path: Path) -> None:
    """As many as a 7B model, its two moments and masters have on a process: the second save, buffers being there."""
    tensors = weights(1000, 4096)
    shards = [whole(name, tensor) for name, tensor in tensors.items()]
    with AsyncSaver(tmp_path, keep=1, device="cuda") as saver:
        saver.save(1, shards, {})
        saver.wait()
        busy(10**8)
        assert saver.save(2, shards, {}) < 0.1
    assert load_latest(tmp_path)[1].step == 2
