"""Saving beside training: what is saved is what was there, the loop hardly waits, errors come back, fences hold."""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tunesmith.checkpoint import async_saver, sharded
from tunesmith.checkpoint.agreement import checkpoint_group
from tunesmith.checkpoint.async_saver import AsyncSaver
from tunesmith.checkpoint.host_copy import HostImage, HostLane, Pairs
from tunesmith.checkpoint.shards import Shard, box_of, make_plan, whole
from tunesmith.checkpoint.state import list_states, load_latest
from tunesmith.errors import CheckpointError

Ranks = Callable[..., list[Any]]


class FakeDevice:
    """Work that the host queues and the device does later: a compute stream, and one for copies."""

    def __init__(self) -> None:
        self.compute: list[Callable[[], None]] = []
        self.copies: list[Callable[[], None]] = []
        self.host_waits = 0

    def buffer(self, num_bytes: int) -> Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8)

    def copy(self, pairs: Pairs) -> FakeCopied:
        self.run_compute()  # the side stream waits for what was queued before
        for target, source in pairs:
            self.copies.append(lambda target=target, source=source: target.copy_(source))
        return FakeCopied(self)

    def run_compute(self) -> None:
        while self.compute:
            self.compute.pop(0)()

    def run_copies(self) -> None:
        while self.copies:
            self.copies.pop(0)()


class FakeCopied:
    """An event on the copies' stream."""

    def __init__(self, device: FakeDevice) -> None:
        self.device = device

    def wait(self) -> None:
        self.device.host_waits += 1
        while self.device.copies:
            time.sleep(0.001)

    def fence(self) -> None:
        self.device.compute.append(self.device.run_copies)

    def fence_s(self) -> float | None:
        return 0.25


def update(weight: Tensor) -> Callable[[], None]:
    return lambda: weight.add_(1).sum().item()


@pytest.mark.parametrize("fenced", [True, False])
def test_the_update_waits_for_the_copies_on_the_device(tmp_path: Path, fenced: bool) -> None:
    """Without the fence the update runs first, and the state is of the step after: so the test can fail."""
    device, weight = FakeDevice(), torch.zeros(5)
    saver = AsyncSaver(tmp_path, keep=1, lane=device)
    device.compute.append(update(weight))
    saver.save(1, [whole("model.w", weight)], {})
    if fenced:
        saver.fence()
    device.compute.append(update(weight))
    assert weight.tolist() == [1] * 5  # the host has only queued
    device.run_compute()
    device.run_copies()
    saved = saver.wait()
    assert saved is not None and saved.device_stall_s == 0.25
    assert load_latest(tmp_path)[1].tensors["model.w"].tolist() == [1 if fenced else 2] * 5
    assert weight.tolist() == [2] * 5


def test_what_was_there_is_saved_whatever_comes_after(tmp_path: Path) -> None:
    weight, facts = torch.zeros(3), {"nested": {"tokens": 1}}
    with AsyncSaver(tmp_path, keep=1) as saver:
        saver.save(1, [whole("model.w", weight)], facts)
        saver.fence()
        weight.fill_(9)
        facts["nested"]["tokens"] = 2
    state = load_latest(tmp_path)[1]
    assert state.tensors["model.w"].tolist() == [0, 0, 0]
    assert state.facts == {"nested": {"tokens": 1}}


def test_the_loop_does_not_wait_for_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = threading.Event()
    original = sharded.write_file

    def slow(*arguments: Any) -> Any:
        assert disk.wait(60)
        return original(*arguments)

    monkeypatch.setattr(sharded, "write_file", slow)
    saver = AsyncSaver(tmp_path, keep=1)
    began = time.perf_counter()
    stall_s = saver.save(1, [whole("model.w", torch.zeros(1000))], {})
    assert stall_s == saver.stall_s <= time.perf_counter() - began
    assert saver.poll() is None
    assert list_states(tmp_path) == []
    time.sleep(0.5)
    disk.set()
    saved = saver.wait()
    assert saved is not None
    assert (saved.step, saved.path, saved.num_bytes) == (1, list_states(tmp_path)[0], 4000)
    assert saved.duration_s >= 0.5
    assert saver.poll() is None
    saver.close()


def test_a_second_save_waits_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waits, original = threading.Event(), sharded.write_file

    def slow(*arguments: Any) -> Any:
        assert waits.wait(60)
        time.sleep(0.5)
        return original(*arguments)

    def waiting(step: int) -> None:
        if step == 2:
            waits.set()
        wait_for_earlier(step)

    monkeypatch.setattr(sharded, "write_file", slow)
    warnings: list[str] = []
    with AsyncSaver(tmp_path, keep=5, on_warning=warnings.append) as saver:
        wait_for_earlier = saver._wait_for_earlier
        monkeypatch.setattr(saver, "_wait_for_earlier", waiting)
        for step in (1, 2):
            saver.save(step, [whole("model.w", torch.full((2,), step))], {})
        assert saver.stall_s > 0.3
        saved = saver.poll()
        assert saved is not None and saved.step == 1
    assert len(warnings) == 1
    assert "step 2 waited" in warnings[0] and "checkpoint of step 1" in warnings[0]
    assert [path.name for path in list_states(tmp_path)] == ["step-00000001", "step-00000002"]


def full_disk(*_: Any) -> Any:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_comes_back_at_the_next_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = [whole("model.w", torch.ones(4))]
    saver = AsyncSaver(tmp_path, keep=2)
    saver.save(1, shards, {})
    assert saver.wait() is not None
    with monkeypatch.context() as patch:
        patch.setattr(sharded, "write_file", full_disk)
        saver.save(2, shards, {})
        saver._join()
    with pytest.raises(OSError, match="No space left") as caught:
        saver.poll()
    assert (caught.value.errno, saver.failed_step) == (errno.ENOSPC, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    saver.save(3, shards, {})
    saver.close()
    assert load_latest(tmp_path)[1].step == 3


def test_an_error_outlives_a_save_after_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = [whole("model.w", torch.ones(4))]
    saver = AsyncSaver(tmp_path, keep=2)
    with monkeypatch.context() as patch:
        patch.setattr(sharded, "write_file", full_disk)
        saver.save(1, shards, {})
        saver._join()
    saver.save(2, shards, {})
    with pytest.raises(OSError, match="No space left"):
        saver.poll()
    saved = saver.wait()
    assert saved is not None and saved.step == 2


def test_closing_raises_unless_something_else_is_on_its_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharded, "write_file", full_disk)
    shards = [whole("model.w", torch.ones(4))]
    with pytest.raises(OSError, match="No space left"), AsyncSaver(tmp_path, keep=1) as saver:
        saver.save(1, shards, {})
    warnings: list[str] = []
    with pytest.raises(KeyError), AsyncSaver(tmp_path, keep=1, on_warning=warnings.append) as saver:
        saver.save(4, shards, {})
        raise KeyError("a step")
    assert "checkpoint of step 4 was not written" in warnings[0]


class CountingLane(HostLane):
    """Counts buffers."""

    def __init__(self) -> None:
        self.buffers: list[int] = []

    def buffer(self, num_bytes: int) -> Tensor:
        self.buffers.append(num_bytes)
        return super().buffer(num_bytes)


def test_buffers_are_taken_once_and_before_the_first_save(tmp_path: Path) -> None:
    lane = CountingLane()
    with AsyncSaver(tmp_path, keep=1, lane=lane) as saver:
        saver.prepare([whole("model.w", torch.ones(4))])
        saver._join()
        assert lane.buffers == [16]
        for step in (1, 2, 3):
            saver.save(step, [whole("model.w", torch.full((4,), float(step)))], {})
        assert lane.buffers == [16]
        saver.save(4, [whole("model.w", torch.ones(6))], {})
        assert lane.buffers == [16, 24]
    assert load_latest(tmp_path)[1].step == 4


def test_no_memory_for_the_copy_is_an_error_of_the_save(tmp_path: Path) -> None:
    class Full(HostLane):
        def buffer(self, num_bytes: int) -> Tensor:
            raise MemoryError("no buffer")

    saver = AsyncSaver(tmp_path, keep=1, lane=Full())
    saver.save(1, [whole("model.w", torch.ones(4))], {})
    with pytest.raises(MemoryError, match="no buffer"):
        saver.close()
    assert list(tmp_path.iterdir()) == []


def test_where_a_copy_has_no_room_training_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(async_saver, "MEMORY_SHARE", 1e-12)
    warnings: list[str] = []
    with AsyncSaver(tmp_path, keep=1, on_warning=warnings.append) as saver:
        saver.prepare([whole("model.w", torch.ones(1000))])
        weight = torch.ones(1000)
        stall_s = saver.save(1, [whole("model.w", weight)], {"x": 1})
        saver.fence()
        weight.zero_()
        saved = saver.poll()
        assert saved is not None
        assert 0 < saved.stall_s <= stall_s == saver.stall_s
    assert "written while training waits" in warnings[0] and "4 kB" in warnings[0]
    assert load_latest(tmp_path)[1].tensors["model.w"].tolist() == [1] * 1000


@pytest.mark.parametrize("chunk_bytes", [1, 7, 16, 4096])
def test_tensors_lie_across_chunks(chunk_bytes: int) -> None:
    tensors = {
        "a": torch.randn(5),
        "b": torch.arange(9, dtype=torch.uint8),
        "c": torch.randn(3, 4).t(),
        "d": torch.ones(()),
    }
    shards = [whole(name, tensor) for name, tensor in tensors.items()]
    plan = make_plan([[box_of(shard) for shard in shards]], 40)
    image = HostImage(plan, 0, HostLane(), chunk_bytes)
    HostLane().copy(image.pairs(shards)).wait()
    for file in plan.files_of(0):
        expected = b"".join(shards[n].tensor.contiguous().numpy().tobytes() for n, _ in file.entries)
        assert b"".join(image.source(file)) == expected


def save_replicas(folder: Path) -> tuple[int, list[int]]:
    """Several asynchronous saves of tensors that all processes hold, and of rows. Returns: own bytes, and the steps."""
    agreement = checkpoint_group()
    rank, size = agreement.rank, agreement.world_size
    shared = [torch.zeros(50) for _ in range(8)]
    rows = torch.zeros(2, 3)
    shards = [whole(f"model.{n}", tensor) for n, tensor in enumerate(shared)]
    shards.append(Shard("model.rows", rows, (2 * size, 3), ((2 * rank, 2 * rank + 2), (0, 3))))
    steps, num_bytes = [], 0
    with AsyncSaver(folder, keep=2, agreement=agreement) as saver:
        for step in (1, 2, 3):
            for tensor in shared:
                tensor.fill_(step)
            rows.fill_(10 * step + rank)
            saver.save(step, shards, {"step": step})
            saver.fence()
            rows.fill_(-1)
            saved = saver.wait()
            assert saved is not None
            steps.append(saved.step)
            num_bytes = saved.num_bytes
    return num_bytes, steps


@pytest.mark.parametrize("world_size", [2, 4])
def test_several_processes(tmp_path: Path, ranks: Ranks, world_size: int) -> None:
    outcomes = ranks(save_replicas, world_size, tmp_path)
    assert [steps for _, steps in outcomes] == [[1, 2, 3]] * world_size
    assert [num_bytes for num_bytes, _ in outcomes] == [24 + 8 * 200 // world_size] * world_size
    state = load_latest(tmp_path)[1]
    assert state.tensors["model.rows"][:, 0].tolist() == [30 + rank for rank in range(world_size) for _ in range(2)]
    assert all(state.tensors[f"model.{n}"].tolist() == [3] * 50 for n in range(8))


def fail_on_one(folder: Path) -> tuple[list[str], list[int | None]]:
    """One process's disk is full at step 2: what every process is told at which step."""
    agreement = checkpoint_group()
    told, steps = [], []
    shards = [Shard("model.rows", torch.ones(1, 3), (2, 3), ((agreement.rank, agreement.rank + 1), (0, 3)))]
    saver = AsyncSaver(folder, keep=2, agreement=agreement)
    original = sharded.write_file
    for step in (1, 2, 3):
        if step == 2 and agreement.rank == 1:
            sharded.write_file = full_disk
        saver.save(step, shards, {})
        try:
            saver.wait()
        except (OSError, CheckpointError) as error:
            told.append(f"{type(error).__name__} {getattr(error, 'errno', None)}")
            steps.append(saver.failed_step)
        sharded.write_file = original
    saver.close()
    return told, steps


def test_an_error_on_one_comes_back_on_all(tmp_path: Path, ranks: Ranks) -> None:
    assert ranks(fail_on_one, 2, tmp_path) == [([f"OSError {errno.ENOSPC}"], [2])] * 2
    assert [path.name for path in list_states(tmp_path)] == ["step-00000001", "step-00000003"]


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    import threading

    yield
    assert not [thread for thread in threading.enumerate() if thread.name == "checkpoint" and thread.is_alive()]
