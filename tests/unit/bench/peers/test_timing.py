"""Continuous steps: what is between events is a step, nothing waits in between, numbers are read at the end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from tunesmith.bench import cell
from tunesmith.bench.peers import loop, ours
from tunesmith.bench.peers.job import Job
from tunesmith.bench.peers.loop import Recorder
from tunesmith.bench.peers.timing import CONTINUOUS, IDLE_TO_IDLE, QueuedSteps, timing_of
from tunesmith.recipe.schema import Recipe


@dataclass
class FakeEvent:
    """A moment of a device that is behind the host."""

    at_ms: float

    def elapsed_time(self, end: FakeEvent) -> float:
        return end.at_ms - self.at_ms


class FakeDevice:
    """A clock of a device, in milliseconds, and what was asked of it in order."""

    def __init__(self) -> None:
        self.now_ms = 1000.0
        self.asked: list[str] = []

    def mark(self) -> FakeEvent:
        self.asked.append("mark")
        return FakeEvent(self.now_ms)

    def synchronise(self, _: torch.device) -> None:
        self.asked.append("wait")

    def step(self, ms: float, loss: float) -> Callable[[], tuple[Any, Any]]:
        def run() -> tuple[Any, Any]:
            self.asked.append("step")
            self.now_ms += ms
            return torch.tensor(loss), torch.tensor(2 * loss)

        return run


@pytest.fixture
def job(peer_recipe: Callable[..., Recipe], prepared: Callable[..., dict[str, Any]]) -> Job:
    return Job.of(prepared(peer_recipe(bench={"warmup_steps": 2, "steps": 3}))["job"])


def test_a_gpu_is_timed_continuously_and_a_cpu_is_not() -> None:
    assert timing_of(torch.device("cuda", 0)) == CONTINUOUS
    assert timing_of(torch.device("cpu")) == IDLE_TO_IDLE


def test_seconds_are_between_events() -> None:
    device = FakeDevice()
    queued = QueuedSteps(device.mark)
    for ms, loss in ((250.0, 3.0), (125.0, 2.0), (500.0, 1.0)):
        queued.end(*device.step(ms, loss)())
    assert list(queued.read()) == [(0.25, 3.0, 6.0), (0.125, 2.0, 4.0), (0.5, 1.0, 2.0)]


def test_numbers_that_later_steps_write_over_are_kept() -> None:
    queued = QueuedSteps(FakeDevice().mark)
    loss = torch.tensor(1.0)
    queued.end(loss, 0.5)
    loss.fill_(9.0)
    assert next(queued.read())[1:] == (1.0, 0.5)


def test_the_device_is_waited_for_before_the_first_timed_step_and_after_the_last(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    device, said = FakeDevice(), list[Any]()
    monkeypatch.setattr(loop, "synchronise", device.synchronise)
    recorder = Recorder(job, said.append, timing=CONTINUOUS, mark=device.mark)
    for number in range(5):
        recorder.record(device.step(100.0 * (number + 1), float(number)))
    assert device.asked == [*["wait", "step", "wait"] * 2, "wait", "mark", *["step", "mark"] * 3]
    assert len(said) == 2
    finished = recorder.finish()
    assert device.asked[-1] == "wait"
    assert finished["timing"] == CONTINUOUS
    assert [step["loss"] for step in said] == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert [step["seconds"] for step in said[2:]] == pytest.approx([0.3, 0.4, 0.5])
    assert [step["grad_norm"] for step in said[2:]] == [4.0, 6.0, 8.0]


def test_on_a_cpu_each_step_is_said_when_it_is_over(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    device, said = FakeDevice(), list[Any]()
    monkeypatch.setattr(loop, "synchronise", device.synchronise)
    recorder = Recorder(job, said.append, mark=device.mark)
    for number in range(5):
        recorder.record(device.step(1.0, float(number)))
        assert len(said) == number + 1
    assert "mark" not in device.asked
    assert recorder.finish()["timing"] == IDLE_TO_IDLE


def test_our_timed_steps_are_queued_together(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """The warm-up is timed alone; the timed steps go through the bench's own continuous way."""
    asked: list[Any] = []
    monkeypatch.setattr(loop, "timing_of", lambda _: CONTINUOUS)
    monkeypatch.setattr(loop, "mark_of", lambda _: FakeDevice().mark)
    queue = cell.timed_steps

    def watched(session: Any, steps: int) -> Any:
        asked.append((session.step_number, steps))
        return queue(session, steps)

    monkeypatch.setattr(ours, "timed_steps", watched)
    said: list[Any] = []
    row = ours.run(job.plain(), said.append)
    assert asked == [(2, 3)]
    assert len(said) == len(row["tokens"]) == 5
    assert row["timing"] == CONTINUOUS
