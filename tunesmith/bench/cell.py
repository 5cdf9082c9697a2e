"""One cell, measured in the process it has to itself: load, warm up, time, validate, then count memory untimed."""

from __future__ import annotations

import statistics
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from tunesmith.bench.counting import count_live_bytes
from tunesmith.bench.owners import host_state_bytes, owner_bytes, with_activations
from tunesmith.bench.schema import Status
from tunesmith.errors import is_out_of_memory
from tunesmith.hardware import describe_device
from tunesmith.recipe.load import recipe_from_mapping
from tunesmith.rundir.io import read_json, write_json_atomic
from tunesmith.text.packing import plan_epoch
from tunesmith.train.metrics import StepMetrics
from tunesmith.train.pending import Pending
from tunesmith.train.session import Session, build_session
from tunesmith.units import ceil_div
from tunesmith.watch.memory import MemorySampler, resident_bytes


def run_cell(plan_file: str, result_file: str) -> None:
    """Measure the cell that `plan_file` describes (a cell's JSON with its recipe) and write it to `result_file`.

    A cell that fails is written too, with its status and the reason.
    """
    cell = read_json(Path(plan_file))
    try:
        cell.update(measure(cell["recipe"]), status="ok", reason=None)
    except BaseException as error:
        traceback.print_exc(file=sys.stderr)
        status, reason = explain(error)
        cell.update(status=status, reason=reason)
    write_json_atomic(Path(result_file), cell)


def explain(error: BaseException) -> tuple[Status, str]:
    """The status of a cell that ended with `error`, and the reason in a line or two."""
    text = " ".join(str(error).split()) or "no message"
    if is_out_of_memory(error):
        return "out_of_memory", text[:500]
    return "failed", f"{type(error).__name__}: {text}"[:500]


def measure(mapping: dict[str, Any]) -> dict[str, Any]:
    """Everything that is measured of one recipe, as the cell's JSON has it."""
    recipe = recipe_from_mapping(mapping)
    start_bytes, began = resident_bytes(), time.perf_counter()
    session = build_session(recipe)
    setup_s = time.perf_counter() - began
    try:
        return {**_measure_session(session, start_bytes), "setup_s": setup_s}
    finally:
        session.close()


def _measure_session(session: Session, start_bytes: int) -> dict[str, Any]:
    bench = session.recipe.bench
    with MemorySampler(session.device) as sampler:
        warmup = timed_steps(session, bench.warmup_steps)
        timed = timed_steps(session, bench.steps)
        reading = sampler.read()
    owners = owner_bytes(session.module, session.optimizer)
    on_cuda = session.device.type == "cuda"
    device_peak = _device_in_use(session.device)
    validation = session.evaluate()
    allocated = reading.device_allocated_peak_bytes
    if not on_cuda:
        allocated = count_live_bytes(session) if bench.count_memory else None
    return {
        "recipe": session.recipe.model_dump(mode="json"),
        "device": _device_facts(session.device),
        "backend": session.model.backend,
        "times": _times(session, warmup, timed, None if validation is None else validation.duration_s),
        "throughput": throughput([seconds for _, seconds in timed], [step for step, _ in timed]),
        "memory": {
            "allocated_peak_bytes": allocated,
            "allocated_source": "cuda" if on_cuda else "live storages",
            "reserved_peak_bytes": reading.device_reserved_peak_bytes,
            "device_peak_bytes": device_peak,
            "resident_peak_bytes": reading.resident_peak_bytes,
            "resident_source": reading.resident_source,
            "resident_start_bytes": start_bytes,
            "optimizer_host_bytes": host_state_bytes(session.optimizer),
        },
        "owners": with_activations(owners, allocated),
        "losses": {
            "training": [step.loss for step, _ in (*warmup, *timed)],
            "validation": None if validation is None else validation.loss,
        },
        "parameters": {
            "trainable": session.method_summary.trainable_parameters,
            "total": session.method_summary.total_parameters,
        },
        "work": work([step for step, _ in timed]),
    }


def timed_steps(session: Session, steps: int) -> list[tuple[StepMetrics, float]]:
    """Steps and their seconds, as training takes them: on a GPU each is queued before the one before is read.

    There a step lasts from the end of the step before to its own end, by the device's clock.
    """
    if session.device.type != "cuda":
        return [timed_step(session) for _ in range(steps)]
    synchronise(session.device)
    session.clock.interrupt()
    metrics: list[StepMetrics] = []
    pending: Pending[StepMetrics] | None = None
    for _ in range(steps):
        queued = session.submit()
        if pending is not None:
            metrics.append(pending.read())
        pending = queued
    if pending is not None:
        metrics.append(pending.read())
    return [(step, step.duration_s) for step in metrics]


def timed_step(session: Session) -> tuple[StepMetrics, float]:
    """One step and its seconds, from when the device is idle until it is idle again."""
    synchronise(session.device)
    began = time.perf_counter()
    metrics = session.step()
    synchronise(session.device)
    return metrics, time.perf_counter() - began


def synchronise(device: torch.device) -> None:
    """Wait until the device has done all it was asked to."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _device_in_use(device: torch.device) -> int | None:
    """Bytes in use on the whole device, as its driver sees it (other processes too); None on a CPU."""
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    return total - free


def _device_facts(device: torch.device) -> dict[str, Any]:
    return {"type": device.type, "name": describe_device(device).name, "threads": torch.get_num_threads()}


def _times(
    session: Session,
    warmup: Sequence[tuple[StepMetrics, float]],
    timed: Sequence[tuple[StepMetrics, float]],
    evaluation_s: float | None,
) -> dict[str, Any]:
    seconds = [duration for _, duration in timed]
    first = (*warmup, *timed)[0][1]
    return {
        "total_s": sum(seconds),
        "steps_s": seconds,
        "warmup_steps_s": [duration for _, duration in warmup],
        "first_step_s": first,
        "evaluation_s": evaluation_s,
        "steps_per_epoch": steps_per_epoch(session),
        "epoch_estimate_s": statistics.median(seconds) * steps_per_epoch(session),
    }


def steps_per_epoch(session: Session) -> int:
    """Optimiser steps of one pass over the training data."""
    data, train = session.recipe.data, session.recipe.train
    plan = plan_epoch(
        session.data.train.lengths,
        session.micro_batch_tokens,
        seed=train.seed,
        epoch=0,
        packing=data.packing,
        max_length=data.max_length,
    )
    return ceil_div(len(plan), train.accumulation)


def throughput(seconds: Sequence[float], steps: Sequence[StepMetrics]) -> dict[str, float | None]:
    """Rates at the median step's time, so that they say the same as it does; the wait for data is over all steps."""
    total = statistics.median(seconds) * len(seconds)
    flops = [step.model_flops for step in steps if step.model_flops is not None]
    peaks = [s.model_flops_per_s / s.mfu_ratio for s in steps if s.model_flops_per_s and s.mfu_ratio]
    flops_per_s = sum(flops) / total if len(flops) == len(steps) else None
    return {
        "tokens_per_s": sum(step.tokens for step in steps) / total,
        "trained_tokens_per_s": sum(step.trained_tokens for step in steps) / total,
        "samples_per_s": sum(step.samples for step in steps) / total,
        "model_flops_per_s": flops_per_s,
        "mfu_ratio": flops_per_s / peaks[0] if peaks and flops_per_s is not None else None,
        "data_wait_s": sum(step.data_wait_s for step in steps),
    }


def work(steps: Sequence[StepMetrics]) -> dict[str, int]:
    """What the timed steps did: cells whose work differs can't be compared."""
    return {
        "steps": len(steps),
        "tokens": sum(step.tokens for step in steps),
        "trained_tokens": sum(step.trained_tokens for step in steps),
        "samples": sum(step.samples for step in steps),
    }
