"""One process of a scaling cell: `python -m tunesmith.bench.scale_rank PLAN FOLDER`, started by `scale_group`.

Warm-up, timed steps, the trace of a few more, and the links between the processes; written to FOLDER/rank-N.json.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from tunesmith.bench.cell import explain, synchronise, throughput, timed_steps, work
from tunesmith.bench.optimizer_watch import OptimizerWatch
from tunesmith.bench.step_split import trace_split
from tunesmith.hardware import describe_device
from tunesmith.launch.output import die_with_parent, send_to_log
from tunesmith.parallel.mesh import Mesh, joined, place_from
from tunesmith.recipe.load import recipe_from_mapping
from tunesmith.recipe.schema import Recipe
from tunesmith.rundir.io import read_json, write_json_atomic
from tunesmith.train.allocator import prepare_allocator
from tunesmith.train.session import Session, build_session
from tunesmith.watch.memory import MemorySampler, resident_high_water_bytes

TRACED_STEPS = 5
"""The first of them starts on an idle device, which looks like a late host; more of them make that weigh little."""
LINK_BYTES = {"cpu": (4, 2**20, 2**23), "cuda": (4, 2**24, 2**28)}
_LINK_ROUNDS = 5


def rank_file(folder: Path, rank: int) -> Path:
    """Where a process writes what it measured."""
    return folder / f"rank-{rank}.json"


def run_rank(plan_file: Path, folder: Path) -> int:
    """Measure as one process of several. Returns the exit code; a failure is written down too."""
    die_with_parent()
    rank = place_from(os.environ).rank
    send_to_log(folder, rank)
    result: dict[str, Any] = {"rank": rank}
    try:
        result.update(measure_rank(recipe_from_mapping(read_json(plan_file)["recipe"])), status="ok", reason=None)
    except BaseException as error:
        traceback.print_exc(file=sys.stderr)
        status, reason = explain(error)
        result.update(status=status, reason=reason)
    write_json_atomic(rank_file(folder, rank), result)
    return 0 if result["status"] == "ok" else 1


def measure_rank(recipe: Recipe) -> dict[str, Any]:
    """Everything one process measures of a recipe that its launcher runs several of."""
    prepare_allocator(recipe.model.device)
    on_cuda = recipe.model.device != "cpu" and torch.cuda.is_available()
    with joined(recipe.parallel, "cuda" if on_cuda else "cpu") as mesh:
        began = time.perf_counter()
        session = build_session(recipe, mesh=mesh)
        setup_s = time.perf_counter() - began
        loading = _loading_memory(mesh.device)
        try:
            measured = _measure_session(session, mesh)
            return {**measured, "memory": {**measured["memory"], **loading}, "setup_s": setup_s}
        finally:
            session.close()


def _loading_memory(device: torch.device) -> dict[str, int | None]:
    """The most that this process, which did nothing else yet, held while the model was loaded and spread."""
    on_device = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    return {"loading_peak_bytes": on_device, "loading_resident_bytes": resident_high_water_bytes()}


def _measure_session(session: Session, mesh: Mesh) -> dict[str, Any]:
    bench = session.recipe.bench
    with MemorySampler(mesh.device) as sampler, OptimizerWatch(session) as watch:
        warmup = timed_steps(session, bench.warmup_steps)
        watch.restart()
        timed = timed_steps(session, bench.steps)
        synchronise(mesh.device)
        optimizer_s, states = watch.seconds(), watch.states
        at_rest = torch.cuda.memory_allocated(mesh.device) if mesh.device.type == "cuda" else None
        memory = sampler.read()
    split = trace_split(lambda: timed_steps(session, TRACED_STEPS), mesh.device)
    seconds, steps = [duration for _, duration in timed], [step for step, _ in timed]
    return {
        "recipe": session.recipe.model_dump(mode="json"),
        "place": {dimension: mesh.index(dimension) for dimension in ("pp", "dp", "tp")},
        "mesh": {dimension: mesh.size(dimension) for dimension in ("pp", "dp", "tp")},
        "device": {"type": mesh.device.type, "name": describe_device(mesh.device).name},
        "steps_s": seconds,
        "warmup_steps_s": [duration for _, duration in warmup],
        "losses": [step.loss for step, _ in (*warmup, *timed)],
        "data_wait_s": statistics.median(step.data_wait_s for step in steps),
        "optimizer_s": optimizer_s,
        "split": None if split is None else asdict(split),
        "throughput": throughput(seconds, steps),
        "work": work(steps),
        "states": states,
        "memory": {
            "allocated_peak_bytes": memory.device_allocated_peak_bytes,
            "reserved_peak_bytes": memory.device_reserved_peak_bytes,
            "resident_peak_bytes": memory.resident_peak_bytes,
            "allocated_at_rest_bytes": at_rest,
        },
        "links": link_timings(mesh),
    }


def link_timings(mesh: Mesh) -> list[tuple[int, float]]:
    """(bytes, seconds) of all-reduces over all processes, the median of a few; none where there is one process."""
    if mesh.world_size == 1:
        return []
    return [(size, _all_reduce_s(size, mesh.device)) for size in LINK_BYTES[mesh.device.type]]


def _all_reduce_s(size_bytes: int, device: torch.device) -> float:
    import torch.distributed as dist

    values = torch.zeros(size_bytes // 4, device=device)
    seconds = []
    for _ in range(_LINK_ROUNDS + 1):
        synchronise(device)
        began = time.perf_counter()
        dist.all_reduce(values)
        synchronise(device)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[1:])


def main(arguments: Sequence[str]) -> int:
    """The command line."""
    plan, folder = map(Path, arguments)
    return run_rank(plan, folder)


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
