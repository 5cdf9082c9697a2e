"""A matrix of recipes, measured in equal conditions: every cell in a fresh process, repeats in shuffled order."""

from __future__ import annotations

import hashlib
import json
import random
import re
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunesmith.bench.plans import CellPlan, plan_matrix
from tunesmith.bench.schema import blank_cell
from tunesmith.bench.worker import Worker
from tunesmith.recipe.load import with_overrides
from tunesmith.recipe.schema import Recipe
from tunesmith.rundir.io import read_json, write_json_atomic
from tunesmith.rundir.layout import RunDir, create_run
from tunesmith.train.allocator import prepare_allocator

Progress = Callable[["Event"], None]


@dataclass(frozen=True)
class Event:
    """A cell begins (`cell` is None) or has ended."""

    plan: CellPlan
    repeat: int
    position: int
    count: int
    cell: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class BenchResult:
    """Where the measurements are, and the measurements: one mapping for each cell and repeat, in the order they ran."""

    run_dir: Path
    cells: tuple[dict[str, Any], ...]

    @property
    def num_ok(self) -> int:
        """Cells that were measured."""
        return sum(cell["status"] == "ok" for cell in self.cells)


@dataclass(frozen=True)
class Turn:
    """One cell, one time."""

    plan: CellPlan
    recipe: Recipe
    repeat: int


def bench(
    recipe: Recipe,
    matrix: str | None = None,
    *,
    only: Sequence[str] = (),
    run_dir: Path | None = None,
    command: str = "tunesmith bench train",
    progress: Progress | None = None,
) -> BenchResult:
    """Measure every cell of a matrix.

    Args:
        matrix: methods, ladder or grid; None: the recipe's.
        only: names of cells; none: all.
        run_dir: a new directory; None: one named after the recipe in its output folder.
        command: what was typed, recipe and settings included: the rows of the report name it with their own --only.

    Returns: the cells that were measured, and those that failed, as rows with a reason.
    Raises: RecipeError for a matrix, a cell or an override that is not allowed, before anything runs.
    """
    plans = plan_matrix(recipe, matrix, only)
    recipes = {plan.name: cell_recipe(recipe, plan) for plan in plans}
    prepare_allocator(recipe.model.device)  # for the cells, and before the environment is recorded
    run = create_run(recipe, kind="bench", path=run_dir)
    run.cells.mkdir()
    run.set_status("running", matrix=matrix or recipe.bench.matrix, order=[plan.name for plan in plans])
    turns = shuffled_turns(plans, recipes, recipe.bench.repeats, recipe.train.seed)
    try:
        cells = _run_all(run, turns, command, progress)
    except BaseException as error:
        run.set_status("interrupted" if isinstance(error, KeyboardInterrupt) else "failed", error=str(error) or None)
        raise
    run.set_status("finished")
    return BenchResult(run.path, tuple(cells))


def cell_recipe(recipe: Recipe, plan: CellPlan) -> Recipe:
    """The recipe of one cell: its changes, and as many steps as warm-up and timing take."""
    steps = recipe.bench.warmup_steps + recipe.bench.steps
    return with_overrides(recipe, {"train.max_steps": steps, **plan.overrides})


def shuffled_turns(plans: Sequence[CellPlan], recipes: Mapping[str, Recipe], repeats: int, seed: int) -> list[Turn]:
    """Every cell once in each round, every round in an order of its own: drift of the machine hits all cells alike."""
    generator = random.Random(seed)
    turns: list[Turn] = []
    for repeat in range(repeats):
        round_ = [Turn(plan, recipes[plan.name], repeat) for plan in plans]
        generator.shuffle(round_)
        turns += round_
    return turns


def _run_all(run: RunDir, turns: Sequence[Turn], command: str, progress: Progress | None) -> list[dict[str, Any]]:
    tell = progress or (lambda event: None)
    environment = read_json(run.environment)
    logs = run.path / "logs"
    logs.mkdir()
    cells = []
    with Worker(logs / "worker.log") as worker:
        for position, turn in enumerate(turns):
            tell(Event(turn.plan, turn.repeat, position, len(turns)))
            start = {**_start(turn, position, command), "environment": environment}
            cells.append(_run_turn(worker, turn, start, run.cells, logs))
            tell(Event(turn.plan, turn.repeat, position, len(turns), cells[-1]))
    return cells


def _start(turn: Turn, position: int, command: str) -> dict[str, Any]:
    """What is known of a cell before it runs."""
    plan = turn.plan
    recipe = turn.recipe.model_dump(mode="json")
    return {
        **blank_cell(),
        "name": plan.name,
        "label": plan.label,
        "parent": plan.parent,
        "gain": plan.gain,
        "repeat": turn.repeat,
        "order": position,
        "command": f"{command} --only {shlex.quote(plan.name)}",
        "overrides": dict(plan.overrides),
        "recipe": recipe,
        "recipe_hash": recipe_hash(recipe),
    }


def recipe_hash(recipe: Mapping[str, Any]) -> str:
    """A hash of the whole recipe, the same for the same content."""
    canonical = json.dumps(recipe, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def _run_turn(worker: Worker, turn: Turn, start: dict[str, Any], cells: Path, logs: Path) -> dict[str, Any]:
    """Run one cell and return its JSON; a process that left none gets a row with the reason."""
    stem = f"{file_stem(turn.plan.name)}-{turn.repeat}"
    plan_file, result, log = logs / f"{stem}.plan.json", cells / f"{stem}.json", logs / f"{stem}.log"
    write_json_atomic(plan_file, start)
    timeout_s = turn.recipe.bench.timeout_s
    began = time.monotonic()
    outcome = worker.run(["tunesmith.bench.cell", "run_cell", str(plan_file), str(result)], log, timeout_s)
    cell = dict(read_json(result)) if result.exists() else dict(start)
    verdict = outcome.verdict(timeout_s)
    if verdict is not None and not result.exists():
        cell["status"], cell["reason"] = verdict
    cell.update(wall_s=time.monotonic() - began, log=f"logs/{log.name}")
    write_json_atomic(result, cell)
    plan_file.unlink()
    return cell


def file_stem(name: str) -> str:
    """A file name for a cell: "lora+gc" becomes lora-gc; any other that is not plain gets a hash, so none are alike."""
    if re.fullmatch(r"[A-Za-z0-9]{1,40}(\+[A-Za-z0-9]{1,20})*", name):
        return name.replace("+", "-")
    plain = re.sub(r"[^A-Za-z0-9_.-]+", "-", name)[:60].strip("-.")
    return f"{plain or 'cell'}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
