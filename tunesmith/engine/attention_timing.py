"""Kernels of attention over pages beside each other on this GPU: are their results right, and how long do they take.

Ours is the measure of both. A kernel that is wrong or fails for one shape is dropped altogether, with the reason.
"""

from __future__ import annotations

import logging
import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tunesmith.engine.attention_shapes import AttentionShape, pages_for, step_of
from tunesmith.engine.pages import ARRIVALS
from tunesmith.kernels.paged_attention import paged_attention
from tunesmith.kernels.paged_step import PagedHeads, PagedKernel, PagedStep

log = logging.getLogger(__name__)
OURS = "triton"
MOST_TOKENS = 2**16
"""Of the pages that are measured over: more than a GPU's cache holds."""
FLUSH_BYTES, WARM_UP, ROUNDS = 2**29, 2, 9
LIMITS = {torch.float16: 4e-3, torch.bfloat16: 3e-2, torch.float32: 1e-4}
"""How far results of a dtype may be apart, absolute and relative: what its rounding of weights and outputs explains."""
Timer = Callable[[Callable[[], object], bool], float]
"""Milliseconds of some work on the device; whether it is work that is recorded."""


@dataclass
class Measured:
    """Milliseconds of each shape (by its label) and kernel over all of a model's windows, and what was dropped, why."""

    milliseconds: dict[str, dict[str, float]] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)

    def drop(self, name: str, reason: str) -> None:
        """Leave a kernel out of everything."""
        self.dropped[name] = reason
        for times in self.milliseconds.values():
            times.pop(name, None)


class Trial:
    """Random pages of one layer, and steps over them. What lies behind a context is no number, as memory may hold."""

    def __init__(self, heads: PagedHeads, shapes: Sequence[AttentionShape], device: torch.device) -> None:
        self.heads, self.shapes, self.device = heads, shapes, device
        self.num_pages = pages_for(shapes, MOST_TOKENS)
        num_pages = self.num_pages + max(shape.num_rows for shape in shapes)
        shape = (num_pages, heads.page_slots, heads.num_kv_heads, heads.head_dim)
        generator = torch.Generator(device).manual_seed(0)
        self.keys, self.values = (
            torch.randn(shape, generator=generator, device=device, dtype=heads.page_dtype) for _ in range(2)
        )
        self.arrivals = torch.zeros(ARRIVALS, dtype=torch.int32, device=device) if device.type == "cuda" else None
        self.scale = heads.head_dim**-0.5
        self.windows = Counter(heads.windows)

    def step(self, shape: AttentionShape) -> PagedStep:
        """A step of this shape over the pages, whose last ones are made for it."""
        step = step_of(shape, self.num_pages, self.device)
        last_R = (step.context_R - 1) % self.heads.page_slots
        behind_RS = torch.arange(self.heads.page_slots, device=self.device) > last_R[:, None]
        for pages in (self.keys, self.values):
            own = pages[self.num_pages : self.num_pages + shape.num_rows]
            own.copy_(pages[:1].expand_as(own).masked_fill(behind_RS[:, :, None, None], float("nan")))
        return step

    def query(self, step: PagedStep) -> Tensor:
        """Random queries of a step."""
        assert step.host is not None
        shape = (int(step.host.starts[-1]), self.heads.num_heads, self.heads.head_dim)
        generator = torch.Generator(self.device).manual_seed(1)
        return torch.randn(shape, generator=generator, device=self.device, dtype=self.heads.dtype)

    def ours(self, query_TNH: Tensor, step: PagedStep, window: int | None) -> Tensor:
        """What every other kernel must equal."""
        return paged_attention(
            query_TNH,
            self.keys,
            self.values,
            step.block_tables_RP,
            step.query_starts_R1,
            step.context_R,
            max_query=step.max_query,
            min_query=step.min_query,
            max_context=step.max_context,
            window=window,
            scale=self.scale,
            arrivals=self.arrivals,
        )

    def run(self, kernel: PagedKernel, query_TNH: Tensor, step: PagedStep, window: int | None) -> Tensor:
        """Another kernel's."""
        return kernel(query_TNH, self.keys, self.values, step, window=window, scale=self.scale)


def compare(
    kernels: Mapping[str, PagedKernel],
    heads: PagedHeads,
    shapes: Sequence[AttentionShape],
    device: torch.device,
    timer: Timer | None = None,
) -> Measured:
    """Every kernel checked and timed for every shape. timer: without one they are only checked."""
    measured = Measured()
    with torch.inference_mode():
        trial = Trial(heads, shapes, device)
        for shape in shapes:
            step = trial.step(shape)
            query_TNH = trial.query(step)
            times = measured.milliseconds.setdefault(shape.label, {})
            for name, kernel in kernels.items():
                if name not in measured.dropped:
                    _try(name, kernel, trial, query_TNH, step, measured, times, timer)
            if timer is not None and times:
                times[OURS] = _total(lambda w: trial.ours(query_TNH, step, w), trial, step, timer)  # noqa: B023
    return measured


def _try(
    name: str,
    kernel: PagedKernel,
    trial: Trial,
    query_TNH: Tensor,
    step: PagedStep,
    measured: Measured,
    times: dict[str, float],
    timer: Timer | None,
) -> None:
    try:
        for window in (*trial.windows, *trial.windows):  # again as later layers do, by what the first ones planned
            wrong = difference(trial.run(kernel, query_TNH, step, window), trial.ours(query_TNH, step, window))
            if wrong is not None:
                measured.drop(name, f"its results are wrong: {wrong}")
                return
        if timer is not None:
            times[name] = _total(lambda window: trial.run(kernel, query_TNH, step, window), trial, step, timer)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a foreign library raises, from C++, from Python, or where it can't compile
        log.debug("%s failed", name, exc_info=True)
        measured.drop(name, f"it fails: {type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}")


def _total(work: Callable[[int | None], object], trial: Trial, step: PagedStep, timer: Timer) -> float:
    """Milliseconds of all layers: each window as often as layers have it."""
    return sum(
        number * timer(lambda: work(window), step.is_decode)  # noqa: B023
        for window, number in trial.windows.items()
    )


def difference(mine: Tensor, truth: Tensor) -> str | None:
    """How far two results are apart, where that is more than rounding."""
    if mine.shape != truth.shape or mine.dtype != truth.dtype:
        return f"{list(mine.shape)} of {mine.dtype}, not {list(truth.shape)} of {truth.dtype}"
    limit = LIMITS[truth.dtype]
    if torch.allclose(mine.float(), truth.float(), rtol=limit, atol=limit):
        return None
    return f"up to {float((mine.float() - truth.float()).abs().max()):.3g} away from ours"


class DeviceTimer:
    """Milliseconds on a GPU: the median of some runs, each after more memory was written than its cache holds.

    Work that is recorded in the engine is recorded here too, so that no time of the host is in it; of other work the
    host's, where that is longer.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device)

    def __call__(self, work: Callable[[], object], is_recorded: bool) -> float:
        for _ in range(WARM_UP):
            work()
        run = self._recorded(work) if is_recorded else work
        times, hosts = [], []
        for _ in range(ROUNDS):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self.flush.zero_()
            start.record()
            began = time.perf_counter()
            run()
            hosts.append(1e3 * (time.perf_counter() - began))
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
        return statistics.median(times) if is_recorded else max(statistics.median(times), statistics.median(hosts))

    def _recorded(self, work: Callable[[], object]) -> Callable[[], object]:
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize(self.device)
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            work()
        return graph.replay
