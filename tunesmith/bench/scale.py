"""One recipe on 1, 2, 4 ... GPUs, every number in fresh processes: how speed grows, where the time goes, what limits.

weak      every process keeps its part of a step, so that the step's batch grows with the processes
strong    the step's batch stays: that of the most processes, which fewer of them accumulate
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tunesmith.arch import ModelConfig, read_config
from tunesmith.bench.matrix import recipe_hash
from tunesmith.bench.scale_curve import curves_json, projection_json
from tunesmith.bench.scale_rank import TRACED_STEPS, rank_file
from tunesmith.bench.scale_summary import summarise
from tunesmith.bench.schema import SCALING_VERSION, scaling_file
from tunesmith.bench.worker import Outcome, Worker
from tunesmith.checkpoint.source import resolve_model
from tunesmith.cost.collectives import Link
from tunesmith.cost.scaling import Mode
from tunesmith.errors import ParallelError, RecipeError, UnsupportedModelError
from tunesmith.launch.cards import driver, gpu_count
from tunesmith.recipe.load import recipe_from_mapping, with_overrides
from tunesmith.recipe.schema import Recipe
from tunesmith.rundir.io import read_json, write_json_atomic
from tunesmith.rundir.layout import RunDir, create_run

CELL_SCHEMA, CELL_VERSION = "tunesmith.bench.scale", 1
Modes = Literal["weak", "strong", "both"]
Progress = Callable[[Mapping[str, Any]], None]


@dataclass(frozen=True)
class ScalePlan:
    """One cell: a recipe for so many processes, whose step has `micro_batches` of all of them together."""

    mode: Mode
    gpus: int
    micro_batches: int
    recipe: Recipe

    @property
    def name(self) -> str:
        """As weak-4."""
        return f"{self.mode}-{self.gpus}"


@dataclass(frozen=True)
class Extension:
    """Project the curve to `nodes` nodes of `per_node` GPUs (None: as many as were measured) over `network`."""

    nodes: int
    network: Link
    per_node: int | None = None


@dataclass(frozen=True)
class ScaleResult:
    """Where the measurements are, the cells in the order they ran, and the content of scaling.json."""

    run_dir: Path
    cells: tuple[dict[str, Any], ...]
    scaling: Mapping[str, Any]

    @property
    def num_ok(self) -> int:
        """Cells that were measured."""
        return sum(cell["status"] == "ok" for cell in self.cells)


def scale(
    recipe: Recipe,
    *,
    gpus: Sequence[int] = (1, 2, 4),
    mode: Modes = "weak",
    extension: Extension | None = None,
    run_dir: Path | None = None,
    command: str = "tunesmith bench scale",
    progress: Progress | None = None,
) -> ScaleResult:
    """Measure a recipe on each number of GPUs; of CPU processes where the recipe's device is cpu.

    Args: run_dir: a new directory; None: one named after the recipe in its output folder.
    Raises: RecipeError, ParallelError for what can't be measured, before anything runs.
    """
    plans = plan_scaling(recipe, gpus, mode)
    _check_machine(recipe, max(gpus), extension)
    run = create_run(recipe, kind="scale", path=run_dir)
    run.cells.mkdir()
    run.set_status("running", gpus=sorted(set(gpus)), mode=mode)
    try:
        cells = _run_all(run, plans, recipe.bench.repeats, command, progress or (lambda cell: None))
        scaling = _scaling_json(cells, recipe, extension)
        write_json_atomic(scaling_file(run.path), scaling)
    except BaseException as error:
        run.set_status("interrupted" if isinstance(error, KeyboardInterrupt) else "failed", error=str(error) or None)
        raise
    run.set_status("finished")
    return ScaleResult(run.path, tuple(cells), scaling)


def plan_scaling(recipe: Recipe, gpus: Sequence[int], mode: Modes) -> list[ScalePlan]:
    """The cells, fewest GPUs first.

    Raises: RecipeError where the processes can't be divided, or the batch of strong scaling among them.
    """
    model = recipe.parallel.tensor * recipe.parallel.pipeline
    counts = sorted(set(gpus))
    if not counts or counts[0] < 1:
        raise RecipeError("--gpus is numbers from 1 on, as 1,2,4")
    if bad := [count for count in counts if count % model]:
        raise RecipeError(
            f"--gpus {bad[0]} can't be divided into parallel.tensor x parallel.pipeline = {model}: name multiples of it"
        )
    chosen: list[Mode] = ["weak", "strong"] if mode == "both" else [mode]
    return [plan for one in chosen for plan in _plans(recipe, counts, one, model)]


def _plans(recipe: Recipe, counts: Sequence[int], mode: Mode, model: int) -> list[ScalePlan]:
    if mode == "weak":
        if recipe.parallel.micro_batches is not None:
            raise RecipeError(
                "parallel.micro_batches fixes a step's batch, and weak scaling has it grow: take it out and set "
                "train.accumulation, or use --mode strong"
            )
        return [_plan(recipe, mode, count, recipe.train.accumulation * count // model, model) for count in counts]
    total = recipe.parallel.micro_batches or recipe.train.accumulation * max(counts) // model
    for count in counts:
        if total % (count // model):
            raise RecipeError(
                f"the step's {total} micro-batches can't be divided among {count // model} data-parallel processes: "
                f"set parallel.micro_batches to a multiple of each"
            )
    return [_plan(recipe, mode, count, total, model) for count in counts]


def _plan(recipe: Recipe, mode: Mode, gpus: int, micro_batches: int, model: int) -> ScalePlan:
    """Of one process `train.accumulation` says how many micro-batches a step has, of several `parallel` does."""
    bench = recipe.bench
    overrides = {
        "train.accumulation": micro_batches * model // gpus,
        "parallel.micro_batches": micro_batches,
        "train.max_steps": bench.warmup_steps + bench.steps + TRACED_STEPS,
    }
    return ScalePlan(mode, gpus, micro_batches, with_overrides(recipe, overrides))


def _check_machine(recipe: Recipe, most: int, extension: Extension | None) -> None:
    if extension is not None and most < 2:
        raise RecipeError("--nodes extends a measured curve: measure two GPUs or more, as --gpus 1,2")
    if recipe.model.device == "cpu":
        return
    there = gpu_count(driver())
    if most > there:
        raise ParallelError(
            f"--gpus {most} is more than this machine's {there} GPUs: name fewer, or add --cpu for CPU processes"
        )


def _run_all(
    run: RunDir, plans: Sequence[ScalePlan], repeats: int, command: str, tell: Progress
) -> list[dict[str, Any]]:
    logs = run.path / "logs"
    logs.mkdir()
    environment = read_json(run.environment)
    cells = []
    with Worker(logs / "worker.log", preload=["torch", "tunesmith.bench.scale_group"]) as worker:
        for repeat in range(repeats):
            # Every second round backwards: what warms up or wears out the machine hits both ends alike.
            for plan in plans if repeat % 2 == 0 else list(reversed(plans)):
                cell = {**_start(plan, repeat, command), "environment": environment}
                cells.append(_run_cell(worker, plan, cell, run))
                tell(cells[-1])
    return cells


def _start(plan: ScalePlan, repeat: int, command: str) -> dict[str, Any]:
    """What is known of a cell before it runs."""
    recipe = plan.recipe.model_dump(mode="json")
    return {
        "schema": CELL_SCHEMA,
        "schema_version": CELL_VERSION,
        "name": plan.name,
        "mode": plan.mode,
        "gpus": plan.gpus,
        "micro_batches": plan.micro_batches,
        "repeat": repeat,
        "status": "failed",
        "reason": None,
        "command": f"{command}{_batch(plan)} --gpus {plan.gpus} --mode {plan.mode}",
        "recipe": recipe,
        "recipe_hash": recipe_hash(recipe),
        "ranks": [],
        "summary": None,
    }


def _batch(plan: ScalePlan) -> str:
    """What a command of one strong cell must say beside: the batch that the most processes gave."""
    return f" --set parallel.micro_batches={plan.micro_batches}" if plan.mode == "strong" else ""


def _run_cell(worker: Worker, plan: ScalePlan, cell: dict[str, Any], run: RunDir) -> dict[str, Any]:
    """Run one cell and write its JSON; processes that left nothing make a row with the reason."""
    stem = f"{plan.name}-{cell['repeat']}"
    folder = run.path / "logs" / stem
    folder.mkdir()
    plan_file, timeout_s = folder / "plan.json", plan.recipe.bench.timeout_s
    write_json_atomic(plan_file, cell)
    device = "cpu" if plan.recipe.model.device == "cpu" else ""
    job = ["tunesmith.bench.scale_group", "run_group", str(plan_file), str(folder), str(plan.gpus), device]
    began = time.monotonic()
    outcome = worker.run(job, folder / "launcher.log", timeout_s)
    files = [rank_file(folder, rank) for rank in range(plan.gpus)]
    ranks = [read_json(file) for file in files if file.exists()]
    cell.update(wall_s=time.monotonic() - began, log=f"logs/{stem}")
    cell.update(judged(ranks, plan, outcome))
    write_json_atomic(run.cells / f"{stem}.json", cell)
    for file in [plan_file, *files]:
        file.unlink(missing_ok=True)
    return cell


def judged(ranks: Sequence[dict[str, Any]], plan: ScalePlan, outcome: Outcome) -> dict[str, Any]:
    """A cell's status, its processes, and what they measured together."""
    failed = [rank for rank in ranks if rank["status"] != "ok"]
    if failed:
        # The processes that are left behind fail too, by waiting: memory is the cause where any of them names it.
        first = min(failed, key=lambda rank: (rank["status"] != "out_of_memory", rank["rank"]))
        return {"status": first["status"], "reason": f"process {first['rank']}: {first['reason']}", "ranks": ranks}
    if len(ranks) < plan.gpus:
        verdict = outcome.verdict(plan.recipe.bench.timeout_s) or ("failed", "a process ended without a result")
        return {"status": verdict[0], "reason": verdict[1], "ranks": ranks}
    resolved = recipe_from_mapping(ranks[0].pop("recipe"))
    for rank in ranks[1:]:
        rank.pop("recipe")
    summary = summarise(ranks, resolved, model_config(resolved))
    return {
        "status": "ok",
        "reason": None,
        "ranks": ranks,
        "summary": summary,
        "resolved": resolved.model_dump(mode="json"),
    }


def model_config(recipe: Recipe) -> ModelConfig | None:
    """The model's shape; None for a family that the formulas do not know, or another backend."""
    if recipe.model.backend == "transformers":
        return None
    try:
        return read_config(resolve_model(recipe.model.path, recipe.model.revision))
    except UnsupportedModelError:
        return None


def _scaling_json(cells: Sequence[Mapping[str, Any]], recipe: Recipe, extension: Extension | None) -> dict[str, Any]:
    measured = {"schema": "tunesmith.bench.scaling", "schema_version": SCALING_VERSION, **curves_json(cells)}
    several = [cell for cell in cells if cell["status"] == "ok" and cell["gpus"] > 1]
    if extension is None:
        return {**measured, "projection": None}
    if not several:
        return {**measured, "projection": {"reason": "no cell of two GPUs or more was measured"}}
    resolved = recipe_from_mapping(several[-1]["resolved"])
    per_node = extension.per_node or max(cell["gpus"] for cell in several)
    projection = projection_json(cells, resolved, model_config(recipe), extension.network, per_node, extension.nodes)
    return {**measured, "projection": projection}
