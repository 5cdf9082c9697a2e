"""Whether the loop keeps a device busy, on a clock that is only counted: every part of a step takes a known time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from tunesmith.engine.batch import SampledRow, StepBatch, StepResult
from tunesmith.engine.engine import Engine
from tunesmith.engine.request import SamplingParams, StructuredSpec

Make = Callable[..., Engine]


@dataclass
class Clock:
    """The host's time, and when the device is through with all that was launched; idle: between two launches."""

    now_ms: float = 0.0
    free_ms: float = 0.0
    idle_ms: float = 0.0

    def work(self, host_ms: float) -> None:
        self.now_ms += host_ms

    def launch(self, host_ms: float, device_ms: float) -> float:
        """When the device will be through."""
        self.work(host_ms)
        begin = max(self.now_ms, self.free_ms)
        self.idle_ms += begin - self.free_ms
        self.free_ms = begin + device_ms
        return self.free_ms

    def wait(self, until_ms: float) -> None:
        self.now_ms = max(self.now_ms, until_ms)


@dataclass
class Later:
    """A step's tokens, on the host at a time."""

    inner: Any
    clock: Clock
    done_ms: float

    def wait(self) -> StepResult:
        self.clock.wait(self.done_ms)
        return self.inner.wait()


class Timed:
    """A runner whose launches take `launch_ms` of the host and run `device_ms`, then `choice_ms`, on the device."""

    def __init__(self, inner: Any, clock: Clock, launch_ms: float, device_ms: float, choice_ms: float) -> None:
        self.inner, self.clock = inner, clock
        self.launch_ms, self.device_ms, self.choice_ms = launch_ms, device_ms, choice_ms

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def forward(self, batch: StepBatch) -> None:
        self.clock.launch(self.launch_ms, self.device_ms)
        self.inner.forward(batch)

    def sample(self, batch: StepBatch, rows: Sequence[SampledRow], masks: np.ndarray | None) -> Later:
        done_ms = self.clock.launch(0.0, self.choice_ms)
        return Later(self.inner.sample(batch, rows, masks), self.clock, done_ms)


class Slow:
    """Text that takes its time; also a grammar that allows everything, slowly."""

    is_finished = False

    def __init__(self, clock: Clock, each_ms: float) -> None:
        self.clock, self.each_ms = clock, each_ms

    def put(self, token: int) -> str:
        self.clock.work(self.each_ms)
        return "x"

    def finish(self) -> str:
        return ""

    def mask_into(self, bitmask_row: np.ndarray) -> None:
        self.clock.work(self.each_ms)
        bitmask_row[:] = -1

    def accept(self, token: int) -> bool:
        return True


class Grammars:
    """The same for every request."""

    def __init__(self, state: Slow) -> None:
        self.state = state

    def submit(self, request_id: int, spec: StructuredSpec) -> None:
        return

    def ready(self, request_id: int) -> Slow:
        return self.state

    def forget(self, request_id: int) -> None:
        return


def timed(counting: Make, requests: int, build_ms: float, launch_ms: float, text_ms: float) -> tuple[Engine, Clock]:
    """An engine of a device with 9 ms for a pass and 1 for the choice."""
    clock = Clock()
    slow = Slow(clock, text_ms)
    parts = {"make_decoder": lambda request: slow, "grammars": Grammars(slow)}
    engine = counting(requests, 512, step_ahead=True, max_num_batched_tokens=64, parts=parts)
    engine.runner = Timed(engine.runner, clock, launch_ms, device_ms=9.0, choice_ms=1.0)
    build = engine.builder.build

    def building(*given: Any) -> Any:
        clock.work(build_ms)
        return build(*given)

    engine.builder.build = building  # type: ignore[assignment,method-assign]
    return engine, clock


def periods(engine: Engine, clock: Clock, steps: int) -> list[float]:
    """Milliseconds of a step, and of these the device's idle ones, once the first steps have gone."""
    for _ in range(4):
        engine.step()
    began_ms, idle_ms = clock.now_ms, clock.idle_ms
    for _ in range(steps):
        engine.step()
    return [(clock.now_ms - began_ms) / steps, (clock.idle_ms - idle_ms) / steps]


def submit(engine: Engine, count: int, **options: Any) -> None:
    for i in range(count):
        engine.submit([i + 1], SamplingParams(max_tokens=300, **options))


@pytest.mark.parametrize(("build_ms", "launch_ms", "text_ms"), [(0, 0, 0), (2, 2, 1), (4, 1, 1), (0.5, 0.5, 2.2)])
def test_a_device_with_more_work_than_the_host_never_waits(
    counting: Make, build_ms: float, launch_ms: float, text_ms: float
) -> None:
    engine, clock = timed(counting, 4, build_ms, launch_ms, text_ms)
    submit(engine, 4)
    assert periods(engine, clock, 20) == pytest.approx([10.0, 0.0])


def test_a_host_with_more_work_is_the_limit_and_nothing_is_added(counting: Make) -> None:
    engine, clock = timed(counting, 4, build_ms=6, launch_ms=4, text_ms=1)
    submit(engine, 4)
    assert periods(engine, clock, 20) == pytest.approx([14.0, 4.0])


def test_pieces_of_prompts_and_new_requests_leave_no_gap(counting: Make) -> None:
    engine, clock = timed(counting, 8, build_ms=2, launch_ms=3, text_ms=0.5)
    submit(engine, 4)
    engine.step()
    engine.submit(list(range(90)) * 3, SamplingParams(max_tokens=100))
    assert periods(engine, clock, 20) == pytest.approx([10.0, 0.0], rel=0.01)
    engine.submit([3], SamplingParams(max_tokens=1))
    assert periods(engine, clock, 20) == pytest.approx([10.0, 0.0], rel=0.01)


def test_masks_are_made_while_the_pass_runs(counting: Make) -> None:
    """A row's mask needs the token before: it is read, told and masked within the pass that was launched ahead."""
    engine, clock = timed(counting, 4, build_ms=0.5, launch_ms=0.5, text_ms=1.0)
    submit(engine, 2)
    submit(engine, 2, structured=StructuredSpec("regex", "."))
    assert periods(engine, clock, 20) == pytest.approx([10.0, 0.0])


def test_plainly_the_device_waits_for_the_host(counting: Make) -> None:
    """The clock itself: without steps ahead nothing overlaps."""
    engine, clock = timed(counting, 4, build_ms=2, launch_ms=1, text_ms=0.5)
    object.__setattr__(engine.config, "step_ahead", False)
    submit(engine, 4)
    assert periods(engine, clock, 20) == pytest.approx([15.0, 5.0])
