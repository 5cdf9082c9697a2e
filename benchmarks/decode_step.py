"""Where a decoding step's time goes: `python benchmarks/decode_step.py CONFIG_DIR`, on a CUDA GPU or a CPU.

    CONFIG_DIR            a model directory, or a folder with its config.json alone: weights are random, made in place
    --batch 1 8 64 256    requests that decode together; each has --context tokens in the cache
    --quantize fp8        a weight format of `tunesmith.LLM(quantize=...)`; --kv fp8: pages in 8 bits
    --head stored         no copy of the head in int8, which quantised blocks have on a GPU
    --operators 20        of the fastest mode, the operators (kernels) that take the most of the device's time

Every batch and mode prints one JSON line with ms per step:

    eager   launch by launch, and every step's tokens are read before the next is launched
    graph   the same with CUDA graphs (CUDA only)
    ahead   the whole engine, a step ahead: scheduling, text-free outputs and graphs included

`host_ms`, of mode ahead, is what the host does in a step beside waiting: the device idles where that is longer than it.
On CUDA, `device_ms` is a step from its first launch to its last on the device's own clock, and `idle_ms` what lies
between two steps (the copy of the next one's tensors too): where idle_ms is small, the host is hidden, however long it
waits, and what device_ms has beyond the kernels' own time (--operators) lies between kernels.
`slowest`, of mode ahead, are the slowest of these steps: where their time went on the host (engine/step_clock.py).
`floor_ratio` is the time that the step's bytes (weights once, the requests' keys and values) take at the data sheet's
bandwidth, or at --bandwidth GB/s, over the time measured. The first line tells the start: seconds to make the model, to
warm up and to record, and the memory that graphs took.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, cast

import numpy as np
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from tunesmith.checkpoint.inference import load_for_inference
from tunesmith.engine.batch import SampledRow
from tunesmith.engine.batching import HostBatch, to_device
from tunesmith.engine.config import EngineConfig
from tunesmith.engine.engine import Engine
from tunesmith.engine.pages import PAGE_SLOTS, pages_of, token_bytes
from tunesmith.engine.request import SamplingParams
from tunesmith.engine.runner import NativeRunner
from tunesmith.hardware import describe_device
from tunesmith.model.decoder import Decoder
from tunesmith.model.head_copy import MOST_REQUESTS

WARM_UP = 3
PROFILED = 3
SLOWEST = 2


@dataclass(frozen=True)
class Setting:
    """What is measured with which model."""

    runner: NativeRunner
    config: EngineConfig
    context: int
    steps: int
    params: SamplingParams
    bandwidth: float | None
    num_operators: int

    @property
    def is_cuda(self) -> bool:
        """Whether the device runs beside the host."""
        return self.runner.device.type == "cuda"


def weight_bytes(model: Decoder, num_requests: int) -> int:
    """Bytes of weights that a step reads: all but an embedding that is no head, of which a row a token is read.

    Of a head and its copy the one that so many requests take.
    """
    head = model.embedding if model.head is None else model.head
    if model.head_copy is not None and num_requests <= MOST_REQUESTS:
        head = model.head_copy
    parts: list[nn.Module] = [model.blocks, model.norm, head]
    tensors = {t.data_ptr(): t.nbytes for part in parts for t in [*part.parameters(), *part.buffers()]}
    return sum(tensors.values())


def step_bytes(runner: NativeRunner, batch: int, context: int) -> int:
    """Bytes that a step has to read: weights once, and every request's keys and values."""
    held = batch * context * token_bytes(runner.model.config, runner.cache.dtype)
    return weight_bytes(runner.model, batch) + held


def host_batch(batch: int, context: int) -> HostBatch:
    """A step of `batch` requests, each with a token at position context - 1 and pages of its own."""
    pages = pages_of(context)
    tables = np.arange(batch * pages, dtype=np.int64).reshape(batch, pages)
    positions = np.full(batch, context - 1)
    none = np.zeros(0, dtype=np.int64)
    return HostBatch(
        tokens=np.arange(batch) + 5,
        positions=positions,
        slots=tables[:, -1] * PAGE_SLOTS + positions % PAGE_SLOTS,
        starts=np.arange(batch + 1),
        contexts=positions + 1,
        tables=tables,
        sequence_slots=np.arange(batch),
        sample_rows=np.arange(batch),
        adapters=None,
        score_rows=none,
        score_targets=none,
        num_scored_top=0,
        is_decode=True,
    )


def stepper(setting: Setting, batch: int) -> Callable[[], Any]:
    """One step of the runner, its tokens read."""
    runner, host = setting.runner, host_batch(batch, setting.context)
    params = setting.params
    rows = [SampledRow(i, params, i, setting.context - 1, (), frozenset()) for i in range(batch)]

    def step() -> Any:
        moved = to_device(host, runner.device)
        runner.forward(moved)
        return runner.sample(moved, rows, None).wait()

    return step


def milliseconds(step: Callable[[], Any], steps: int) -> list[float]:
    """Of each step after warm-up."""
    for _ in range(WARM_UP):
        step()
    times = []
    for _ in range(steps):
        began_s = time.perf_counter()
        step()
        times.append(1000 * (time.perf_counter() - began_s))
    return times


class Waits:
    """A runner whose steps' waits are timed; on CUDA also `spans`: where each begins and ends on the device."""

    def __init__(self, runner: NativeRunner) -> None:
        self.runner = runner
        self.waited_ms = 0.0
        self.spans: list[tuple[Any, Any]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.runner, name)

    def forward(self, batch: Any) -> None:
        """The runner's."""
        if self.runner.device.type == "cuda":
            began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            began.record()
            self.spans.append((began, ended))
        self.runner.forward(batch)

    def sample(self, *given: Any) -> Any:
        """The pending step of the runner, which tells how long it was waited for."""
        pending = self.runner.sample(*given)
        if self.spans:
            self.spans[-1][1].record()
        return TimedPending(self, pending)

    def on_device(self) -> dict[str, float]:
        """Milliseconds of a step on the device, and between two; nothing where there is no device's clock."""
        spans = self.spans[:-2]  # the last ones may not have ended
        if len(spans) < 2:
            return {}
        device = [began.elapsed_time(ended) for began, ended in spans]
        idle = [ended.elapsed_time(began) for (_, ended), (began, _) in pairwise(spans)]
        return {"device_ms": round(statistics.median(device), 4), "idle_ms": round(statistics.median(idle), 4)}


@dataclass(frozen=True)
class TimedPending:
    """A launched step."""

    waits: Waits
    pending: Any

    def wait(self) -> Any:
        """The step's result; the time that it took to come is counted."""
        began_s = time.perf_counter()
        result = self.pending.wait()
        self.waits.waited_ms += 1000 * (time.perf_counter() - began_s)
        return result


def ahead(setting: Setting, batch: int, host: list[float], clock: dict[str, Any]) -> list[float]:
    """Milliseconds of the engine's steps while all requests decode, a step ahead; the last steps are left out.

    host: is given the milliseconds of each of these steps that were not spent waiting; clock: what `Waits.on_device`
    says, and the slowest steps.
    """
    waits = Waits(setting.runner)
    engine = Engine(cast(Any, waits), config=setting.config)
    generator = np.random.default_rng(0)
    vocab_size = setting.runner.vocab_size
    for _ in range(batch):
        prompt = generator.integers(5, vocab_size, setting.context - setting.steps // 2).tolist()
        engine.submit(prompt, setting.params)
    times: list[float] = []
    while engine.has_work:
        began_s, waits.waited_ms = time.perf_counter(), 0.0
        engine.step()
        running = engine.scheduler.running
        if len(running) == batch and all(sequence.num_missing == 1 for sequence in running):
            if not times:
                del waits.spans[:-1]
                engine.clock.clear()
            times.append(1000 * (time.perf_counter() - began_s))
            host.append(times[-1] - waits.waited_ms)
            clock |= waits.on_device() if len(times) == setting.steps - WARM_UP else {}
    clock["slowest"] = [
        {"kind": slow.kind, "collections": slow.collections, **slow.phases_ms}
        for slow in engine.clock.slowest()[:SLOWEST]
    ]
    host[:] = host[WARM_UP:-1]
    return times[WARM_UP:-1]


def operators(setting: Setting, step: Callable[[], Any]) -> list[dict[str, Any]]:
    """The operators of a step that take the most time of the device, the longest first."""
    kind = ProfilerActivity.CUDA if setting.is_cuda else ProfilerActivity.CPU
    with profile(activities=[kind]) as profiled:
        for _ in range(PROFILED):
            step()
        if setting.is_cuda:
            torch.cuda.synchronize()
    found = []
    for event in profiled.key_averages():
        taken = event.self_device_time_total if setting.is_cuda else event.self_cpu_time_total
        if taken > 0:
            found.append((taken / PROFILED, event.count / PROFILED, event.key))
    whole = sum(taken for taken, _, _ in found)
    return [
        {"operator": name[:120], "calls": round(calls, 1), "us": round(taken, 1), "share": round(taken / whole, 4)}
        for taken, calls, name in sorted(found, reverse=True)[: setting.num_operators]
    ]


def measure(setting: Setting, batch: int) -> None:
    """Print the lines of one batch size."""
    runner, graphs = setting.runner, setting.runner.graphs
    step = stepper(setting, batch)
    moved = step_bytes(runner, batch, setting.context)
    modes: dict[str, Callable[[], list[float]]] = {}

    def eager() -> list[float]:
        runner.graphs = None
        try:
            return milliseconds(step, setting.steps)
        finally:
            runner.graphs = graphs

    modes["eager"] = eager
    if graphs is not None:
        modes["graph"] = lambda: milliseconds(step, setting.steps)
    host: list[float] = []
    clock: dict[str, Any] = {}
    modes["ahead"] = lambda: ahead(setting, batch, host, clock)
    for mode, run in modes.items():
        times = run()
        typical = statistics.median(times) if mode != "ahead" else statistics.fmean(times)
        line: dict[str, Any] = {
            "batch": batch,
            "context": setting.context,
            "mode": mode,
            "ms": round(typical, 4),
            "worst_ms": round(max(times), 4),
            "steps": len(times),
            "tokens_per_s": round(1000 * batch / typical, 1),
            "moved_bytes": moved,
            "floor_ratio": None if setting.bandwidth is None else round(1000 * moved / setting.bandwidth / typical, 4),
        }
        if host:
            line |= {"host_ms": round(statistics.median(host), 4), **clock}
        print(json.dumps(line), flush=True)
    if setting.num_operators:
        print(json.dumps({"batch": batch, "operators": operators(setting, step)}), flush=True)


def prepare(arguments: argparse.Namespace) -> Setting:
    """Make the model and its runner; prints the line about the start."""
    began_s = time.perf_counter()
    model = load_for_inference(
        arguments.config,
        quantize=arguments.quantize,
        head=arguments.head,
        dtype=arguments.dtype,
        device=arguments.device,
        weights="random",
        backend="native",
    )
    assert isinstance(model, Decoder)
    made_s = time.perf_counter() - began_s
    longest = arguments.context + arguments.steps + 2
    batch = max(arguments.batch)
    config = EngineConfig(
        max_model_len=longest,
        max_num_seqs=batch,
        max_num_batched_tokens=max(batch, arguments.prefill_tokens),
        enable_prefix_cache=False,
        kv_dtype=arguments.kv,
        step_ahead=True,
    )
    runner = NativeRunner(model, config, num_pages=batch * pages_of(longest))
    runner.warm_up(arguments.graphs_s)
    while runner.idle():
        pass
    device = describe_device(runner.device)
    graphs = runner.graphs
    line = {
        "config": arguments.config,
        "device": device.name,
        "torch": torch.__version__,
        "dtype": str(runner.stream_dtype),
        "quantize": arguments.quantize,
        "kv": arguments.kv,
        "weight_bytes": weight_bytes(model, 1),
        "held_bytes": sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()]),
        "head": "copy" if model.head_copy is not None else arguments.head,
        "model_s": round(made_s, 2),
        "start_s": round(time.perf_counter() - began_s, 2),
        "graphs": None if graphs is None else graphs.stats.num_graphs,
        "graphs_s": None if graphs is None else round(graphs.stats.seconds, 2),
        "graphs_bytes": None if graphs is None else graphs.stats.num_bytes,
        "refused": [] if graphs is None else sorted(graphs.refused.values()),
    }
    print(json.dumps(line), flush=True)
    return Setting(
        runner=runner,
        config=config,
        context=arguments.context,
        steps=arguments.steps,
        params=SamplingParams(temperature=arguments.temperature, max_tokens=arguments.steps + 1, ignore_eos=True),
        bandwidth=arguments.bandwidth * 1e9 if arguments.bandwidth else device.bandwidth_bytes_per_s,
        num_operators=arguments.operators,
    )


def parse(words: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="a directory with config.json")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 64, 256])
    parser.add_argument("--context", type=int, default=512, help="tokens of each request in the cache")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--quantize")
    parser.add_argument("--head", choices=["auto", "stored", "int8", "copy"], default="auto")
    parser.add_argument("--kv", choices=["auto", "fp8"], default="auto")
    parser.add_argument("--temperature", type=float, default=0.6)
    parser.add_argument("--prefill-tokens", type=int, default=8192, help="tokens of a step while prompts are computed")
    parser.add_argument("--graphs-s", type=float, default=5.0, help="seconds for graphs at start-up, the rest after it")
    parser.add_argument("--bandwidth", type=float, help="GB/s of the floor, where the data sheet's is not wanted")
    parser.add_argument("--operators", type=int, default=20)
    arguments = parser.parse_args(words)
    if arguments.context <= arguments.steps:
        parser.error("--context must be more than --steps")
    return arguments


def main(words: list[str] | None = None) -> None:
    """Measure every batch size."""
    arguments = parse(sys.argv[1:] if words is None else words)
    setting = prepare(arguments)
    for batch in sorted(arguments.batch):
        measure(setting, batch)


if __name__ == "__main__":
    main()
