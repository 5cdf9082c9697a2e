"""Where the time and the memory of a step go: operators by device time, the trace, allocated bytes over time.

profile/operators.json   a row per operator, and per kernel of a GPU: calls, own and total time on device and host
profile/operators.txt    the same as tables to read: a CUDA graph is one operator, and its kernels tell what is in it
profile/trace.json.gz    for chrome://tracing and Perfetto
profile/memory.json      allocated bytes over one more step that is not timed, with phases and bytes by owner
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, record_function

from tunesmith.bench.owners import owner_bytes
from tunesmith.bench.timeline import memory_timeline
from tunesmith.errors import DeviceError, RecipeError
from tunesmith.recipe.load import with_overrides
from tunesmith.recipe.schema import Recipe
from tunesmith.rundir.io import write_json_atomic, write_text_atomic
from tunesmith.rundir.layout import create_run
from tunesmith.train.session import Session, build_session

SHOWN = 40
STDERR = 2
CHATTER = b"USDT:"


@dataclass(frozen=True)
class ProfileResult:
    """Where the profile is, and the operators that took the most device time."""

    run_dir: Path
    operators: tuple[dict[str, Any], ...]


def profile(
    recipe: Recipe, *, steps: int = 3, warmup_steps: int = 2, nvtx: bool = False, run_dir: Path | None = None
) -> ProfileResult:
    """Profile `steps` optimiser steps after `warmup_steps`.

    Args: `nvtx`: also mark every module and step as NVTX ranges, for a run under Nsight Systems.
    Raises: RecipeError for a count below 1; DeviceError for NVTX ranges without a CUDA device.
    """
    if steps < 1 or warmup_steps < 1:
        raise RecipeError(f"steps and warmup_steps must be at least 1, got {steps} and {warmup_steps}")
    session = build_session(with_overrides(recipe, {"train.max_steps": warmup_steps + steps}))
    try:
        if nvtx and session.device.type != "cuda":
            raise DeviceError("NVTX ranges need a CUDA device; leave --nvtx out, or see: tunesmith doctor")
        run = create_run(session.recipe, kind="profile", path=run_dir)
        run.profile.mkdir()
        operators = _profile_session(session, steps, warmup_steps, nvtx, run.profile)
        run.set_status("finished", steps=steps)
    finally:
        session.close()
    return ProfileResult(run.path, tuple(operators))


def _profile_session(session: Session, steps: int, warmup_steps: int, nvtx: bool, folder: Path) -> list[dict[str, Any]]:
    for _ in range(warmup_steps):
        session.step()
    on_cuda = session.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_cuda else [])]
    ranges = nvtx_ranges(session.module) if nvtx else contextlib.nullcontext()
    with ranges, _profiling(torch.profiler.profile(activities=activities, acc_events=True)) as profiler:
        for index in range(steps):
            with record_function(f"step {index + 1}"):
                session.step()
    averages = profiler.key_averages()
    operators = operator_rows([event for event in averages if not _is_kernel(event)], on_cuda)
    kernels = operator_rows([event for event in averages if _is_kernel(event)], on_cuda)
    facts = {"steps": steps, "by": _by(on_cuda), "operators": operators, "kernels": kernels}
    write_json_atomic(folder / "operators.json", facts)
    write_text_atomic(folder / "operators.txt", tables_text(operators, kernels, steps, on_cuda))
    profiler.export_chrome_trace(str(folder / "trace.json.gz"))
    timeline = memory_timeline(session)
    write_json_atomic(folder / "memory.json", {**timeline, "owners": owner_bytes(session.module, session.optimizer)})
    return operators


@contextlib.contextmanager
def _profiling(profiler: torch.profiler.profile) -> Iterator[torch.profiler.profile]:
    """The profiler at work, without the lines that its C++ side prints when it starts and stops."""
    with without_lines(CHATTER):
        profiler.start()
    try:
        yield profiler
    finally:
        with without_lines(CHATTER):
            profiler.stop()


@contextlib.contextmanager
def without_lines(beginning: bytes) -> Iterator[None]:
    """Inside, nothing reaches standard error's file descriptor; afterwards all does but lines with this beginning."""
    sys.stderr.flush()
    try:
        real = os.dup(STDERR)
    except OSError:  # there is no standard error
        yield
        return
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), STDERR)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(real, STDERR)
            os.close(real)
            held.seek(0)
            for line in held:
                if not line.startswith(beginning):
                    os.write(STDERR, line)


def _by(on_cuda: bool) -> str:
    return "device" if on_cuda else "host"


def _is_kernel(event: Any) -> bool:
    """Whether this is a kernel on the device: its time is also that of the operator which launched it."""
    return str(event.device_type).rpartition(".")[2] != "CPU"


def operator_rows(averages: Any, on_cuda: bool) -> list[dict[str, Any]]:
    """A row for each operator, those with the most time of their own on the device (on a CPU: the host) first."""
    rows = [
        {
            "name": event.key,
            "calls": event.count,
            "self_device_s": event.self_device_time_total / 1e6 if on_cuda else None,
            "device_s": event.device_time_total / 1e6 if on_cuda else None,
            "self_host_s": event.self_cpu_time_total / 1e6,
            "host_s": event.cpu_time_total / 1e6,
        }
        for event in averages
        if not event.key.startswith("step ")
    ]
    return sorted(rows, key=lambda row: -row["self_device_s" if on_cuda else "self_host_s"])


def tables_text(operators: list[dict[str, Any]], kernels: list[dict[str, Any]], steps: int, on_cuda: bool) -> str:
    """The table of operators and, behind an empty line, that of the device's kernels, where there are any."""
    tables = [operator_table(operators, steps, on_cuda)]
    if kernels:
        tables.append(operator_table(kernels, steps, on_cuda, "kernel"))
    return "\n".join(tables)


def operator_table(rows: list[dict[str, Any]], steps: int, on_cuda: bool, what: str = "operator") -> str:
    """The first rows as aligned text; times are milliseconds per step, the share is of all rows' own time."""
    key = "self_device_s" if on_cuda else "self_host_s"
    total = sum(row[key] for row in rows) or 1.0
    head = f"{what:<60} {'calls/step':>10} {_by(on_cuda) + ' ms/step':>15} {'share':>7}"
    lines = [
        f"{row['name'][:60]:<60} {row['calls'] / steps:>10.1f} {row[key] / steps * 1e3:>15.3f} {row[key] / total:>7.1%}"
        for row in rows[:SHOWN]
    ]
    return "\n".join([head, *lines]) + "\n"


@contextlib.contextmanager
def nvtx_ranges(module: nn.Module) -> Iterator[None]:
    """Every forward pass of every named module below as an NVTX range, and every operator with its shapes."""
    handles = []
    for name, child in module.named_modules():
        if name:
            handles.append(child.register_forward_pre_hook(lambda *_, n=name: torch.cuda.nvtx.range_push(n)))
            handles.append(child.register_forward_hook(lambda *_: torch.cuda.nvtx.range_pop()))
    try:
        with torch.autograd.profiler.emit_nvtx():
            yield
    finally:
        for handle in handles:
            handle.remove()
