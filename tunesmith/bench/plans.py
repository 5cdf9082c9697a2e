"""The cells of a matrix: what each changes in the recipe, and which cell it is compared with."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

from tunesmith.errors import RecipeError, nearest
from tunesmith.recipe.schema import BenchSection, Recipe

# The best learning rate of LoRA is about ten times that of training all weights, whatever the model's size.
# Source: Schulman et al., "LoRA Without Regret", Thinking Machines Lab, 2025.
LORA_OVER_FULL = 10.0


@dataclass(frozen=True)
class CellPlan:
    """One cell. `parent` names the cell it stands on (None: the baseline), `gain` what it adds to that.

    `gain` is None for a cell that replaces its parent's method instead of adding to it.
    """

    name: str
    label: str
    overrides: Mapping[str, Any]
    parent: str | None = None
    gain: str | None = None
    inherits: tuple[str, ...] = field(default=())

    def with_overrides(self, more: Mapping[str, Any]) -> CellPlan:
        """This cell with more of the recipe changed."""
        return replace(self, overrides={**self.overrides, **more})


def plan_matrix(recipe: Recipe, matrix: str | None = None, only: Sequence[str] = ()) -> list[CellPlan]:
    """The cells of a recipe's matrix, its own per-cell overrides applied; `only` keeps the cells that it names.

    Raises: RecipeError for a matrix or a cell that is not there.
    """
    name = matrix or recipe.bench.matrix
    makers = {"methods": _methods, "ladder": _ladder, "grid": _grid}
    if name not in makers:
        raise RecipeError(
            f"matrix {name!r} is not one of {', '.join(makers)}{nearest(name, makers)}; "
            "see: tunesmith bench train --help"
        )
    plans = makers[name](recipe)
    names = [plan.name for plan in plans]
    _check_names("bench.overrides", recipe.bench.overrides, names)
    _check_names("--only", only, names)
    plans = [_with_recipe_overrides(plan, recipe.bench.overrides) for plan in plans]
    return [plan for plan in plans if not only or plan.name in only]


def _check_names(where: str, given: Iterable[str], names: Sequence[str]) -> None:
    for name in given:
        if name not in names:
            hint = nearest(name, names)
            raise RecipeError(f"{where} names the cell {name!r}{hint or ','} the cells are: {', '.join(names)}")


def _with_recipe_overrides(plan: CellPlan, overrides: Mapping[str, Mapping[str, Any]]) -> CellPlan:
    """What the recipe changes for a cell also holds for the cells that stand on it, unless they change it again."""
    for name in (*plan.inherits, plan.name):
        plan = plan.with_overrides(overrides.get(name, {}))
    return plan


def _methods(recipe: Recipe) -> list[CellPlan]:
    """full, LoRA, LoRA+GC, QLoRA, QLoRA+GC; a rate that the recipe leaves out each method resolves for itself."""
    adapters = recipe.method.kind in ("lora", "qlora")
    rate = recipe.train.learning_rate
    full_rate = rate / LORA_OVER_FULL if rate is not None and adapters else rate
    lora_rate = rate * LORA_OVER_FULL if rate is not None and not adapters else rate
    plans = [CellPlan("full", "full", _method("full", full_rate) | _fp8("full", recipe))]
    for kind, label in (("lora", "LoRA"), ("qlora", "QLoRA")):
        changes = _method(kind, lora_rate) | _fp8(kind, recipe)
        plan = CellPlan(kind, label, changes, "full")
        plans += [plan, *_checkpointed(plan, recipe.bench)]
    return plans


def _method(kind: str, learning_rate: float | None) -> dict[str, Any]:
    changes: dict[str, Any] = {"method.kind": kind, "train.checkpointing": "none", "train.learning_rate": learning_rate}
    return {**changes, "method.adapter": None} if kind == "full" else changes


def _fp8(kind: str, recipe: Recipe) -> dict[str, Any]:
    """A recipe with products in fp8 has them with every method that can, each in its own key."""
    if not recipe.method.uses_fp8:
        return {}
    return {"method.base": "fp8" if kind == "lora" else "checkpoint", "method.fp8_compute": kind != "lora"}


def _checkpointed(plan: CellPlan, bench: BenchSection) -> list[CellPlan]:
    """The cell with checkpointing, of the kind that the recipe names; with `all`, block's own cell after it."""
    kind = "selective" if bench.checkpointing == "all" else bench.checkpointing
    cells = [_checkpointed_as(plan, kind, f"{plan.name}+gc", "checkpointing")]
    if bench.checkpointing == "all":
        cells.append(_checkpointed_as(plan, "block", f"{plan.name}+block", "block checkpointing"))
    return cells


def _checkpointed_as(plan: CellPlan, kind: str, name: str, gain: str) -> CellPlan:
    changes = {**plan.overrides, "train.checkpointing": kind}
    return CellPlan(name, f"{plan.label} + {gain}", changes, plan.name, gain, (*plan.inherits, plan.name))


def _ladder(recipe: Recipe) -> list[CellPlan]:
    """float32, then mixed precision, then checkpointing on top: the recipe's own method throughout."""
    wide = {"train.precision": "float32", "model.dtype": "float32", "train.checkpointing": "none"}
    half = recipe.train.precision if recipe.train.precision in ("bfloat16", "float16") else "bfloat16"
    mixed = {"train.precision": half, "model.dtype": "auto", "train.checkpointing": "none"}
    plans = [
        CellPlan("fp32", "float32", wide),
        CellPlan("mixed", "mixed precision", mixed, "fp32", "mixed precision"),
    ]
    return [*plans, *_checkpointed(plans[-1], recipe.bench)]


def _grid(recipe: Recipe) -> list[CellPlan]:
    """Every combination of the grid's values; the first value of each key is the baseline's."""
    grid = recipe.bench.grid
    if not grid or not all(grid.values()):
        raise RecipeError(
            "matrix 'grid' needs bench.grid with values, for instance {train.checkpointing: [none, block]}"
        )
    baseline = {key: values[0] for key, values in grid.items()}
    combinations = [dict(zip(grid, values, strict=True)) for values in product(*grid.values())]
    return sorted((_grid_cell(chosen, baseline) for chosen in combinations), key=lambda plan: plan.name.count(","))


def _grid_cell(chosen: Mapping[str, Any], baseline: Mapping[str, Any]) -> CellPlan:
    """A cell that changes several keys stands on the one that changes all of them but the last."""
    changed = [key for key in chosen if chosen[key] != baseline[key]]
    if not changed:
        return CellPlan("baseline", "baseline", dict(chosen))
    under = {key: chosen[key] for key in changed[:-1]}
    name, parent = _grid_name({key: chosen[key] for key in changed}), _grid_name(under)
    label = " + ".join(_grid_name({key: chosen[key]}) for key in changed)
    return CellPlan(name, label, dict(chosen), parent, _grid_name({changed[-1]: chosen[changed[-1]]}))


def _grid_name(changes: Mapping[str, Any]) -> str:
    return ",".join(f"{key.rpartition('.')[2]}={value}" for key, value in changes.items()) or "baseline"
