"""Which cells a scaling run has, and a whole one on two processes of a CPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tunesmith.bench.scale import Extension, judged, plan_scaling, scale
from tunesmith.bench.worker import Outcome
from tunesmith.cost.collectives import Link
from tunesmith.errors import ParallelError, RecipeError
from tunesmith.recipe.schema import Recipe
from tunesmith.report.write import write_report

MakeRecipe = Callable[..., Recipe]


def _steps(plans: Any) -> list[tuple[str, int, int | None, int]]:
    return [
        (plan.name, plan.micro_batches, plan.recipe.parallel.micro_batches, plan.recipe.train.accumulation)
        for plan in plans
    ]


def test_weak_scaling_grows_the_batch(tiny_recipe: MakeRecipe) -> None:
    plans = plan_scaling(tiny_recipe(train={"accumulation": 2}), [4, 1, 2], "weak")
    assert _steps(plans) == [("weak-1", 2, 2, 2), ("weak-2", 4, 4, 2), ("weak-4", 8, 8, 2)]


def test_strong_scaling_divides_it(tiny_recipe: MakeRecipe) -> None:
    plans = plan_scaling(tiny_recipe(), [1, 2, 4], "strong")
    assert _steps(plans) == [("strong-1", 4, 4, 4), ("strong-2", 4, 4, 2), ("strong-4", 4, 4, 1)]
    fixed = plan_scaling(tiny_recipe(parallel={"micro_batches": 12}), [2, 4], "strong")
    assert _steps(fixed) == [("strong-2", 12, 12, 6), ("strong-4", 12, 12, 3)]


def test_both_and_model_parallel_groups(tiny_recipe: MakeRecipe) -> None:
    plans = plan_scaling(tiny_recipe(parallel={"tensor": 2}), [2, 4], "both")
    assert _steps(plans) == [("weak-2", 1, 1, 1), ("weak-4", 2, 2, 1), ("strong-2", 2, 2, 2), ("strong-4", 2, 2, 1)]


@pytest.mark.parametrize(
    ("sections", "gpus", "mode", "message"),
    [
        ({}, [], "weak", "1,2,4"),
        ({}, [0, 1], "weak", "1,2,4"),
        ({"parallel": {"tensor": 2}}, [1, 2], "weak", "--gpus 1 can't be divided"),
        ({"parallel": {"micro_batches": 4}}, [1, 2], "weak", "--mode strong"),
        ({"parallel": {"micro_batches": 3}}, [1, 2], "strong", "3 micro-batches can't be divided among 2"),
    ],
)
def test_what_can_not_be_measured(
    tiny_recipe: MakeRecipe, sections: dict[str, Any], gpus: list[int], mode: Any, message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        plan_scaling(tiny_recipe(**sections), gpus, mode)


def test_refused_before_anything_runs(tiny_recipe: MakeRecipe, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="--gpus 1,2"):
        scale(tiny_recipe(), gpus=[1], extension=Extension(2, Link(1e9, 0.0)))
    with pytest.raises(ParallelError, match="add --cpu"):
        scale(tiny_recipe(model={"device": "auto"}), gpus=[1, 4096])
    assert not (tmp_path / "runs").exists()


def test_one_and_two_processes(tiny_recipe: MakeRecipe) -> None:
    """Full fine-tuning under zero3: half of the states each, the same batch's losses, a report, a projection."""
    recipe = tiny_recipe(method={"kind": "full"}, bench={"steps": 2}, parallel={"strategy": "zero3"})
    told: list[Any] = []
    result = scale(recipe, gpus=[1, 2], mode="strong", extension=Extension(2, Link(1e9, 1e-5)), progress=told.append)
    assert [(cell["name"], cell["status"], cell["reason"]) for cell in result.cells] == [
        ("strong-1", "ok", None),
        ("strong-2", "ok", None),
    ]
    assert len(told) == 2
    one, two = (cell["summary"] for cell in result.cells)
    assert one["losses"] == pytest.approx(two["losses"], rel=1e-5)
    assert one["tokens_per_step"] == two["tokens_per_step"]
    # What a process holds is measured, and the formula's to a percent: norms and biases are padded.
    assert abs(one["states"]["difference_percent"]) < 1
    assert abs(two["states"]["difference_percent"]) < 1
    assert two["states"]["measured"]["total_bytes"] == pytest.approx(
        one["states"]["measured"]["total_bytes"] / 2, rel=0.01
    )
    assert sum(two["parts"].values()) == pytest.approx(two["step_s"])
    assert two["parts"]["exposed_s"] > 0
    assert two["parts"]["optimizer_s"] > 0
    assert two["link"] is None or two["link"]["bandwidth_bytes_per_s"] > 0
    assert len(result.cells[1]["ranks"]) == 2
    assert (result.run_dir / "scaling.json").is_file()
    assert sorted(path.name for path in (result.run_dir / "cells").iterdir()) == ["strong-1-0.json", "strong-2-0.json"]
    text = write_report([result.run_dir]).markdown.read_text()
    assert "| 2, strong |" in text
    assert "--set parallel.micro_batches=2 --gpus 1 --mode strong" in text


def _failed(rank: int, status: str, reason: str) -> dict[str, Any]:
    return {"rank": rank, "status": status, "reason": reason}


def test_what_went_wrong_is_the_first_cause(tiny_recipe: MakeRecipe) -> None:
    """Whoever ran out of memory is named, not the process before it that then waited in vain."""
    (plan,) = plan_scaling(tiny_recipe(bench={"timeout_s": 30}), [2], "weak")
    ended = Outcome(exit=1, signal=None, timed_out=False)
    waited, full = _failed(0, "failed", "RuntimeError: connection closed"), _failed(1, "out_of_memory", "no room")
    found = judged([waited, full], plan, ended)
    assert (found["status"], found["reason"]) == ("out_of_memory", "process 1: no room")
    assert judged([waited], plan, ended)["reason"] == "process 0: RuntimeError: connection closed"
    assert judged([], plan, ended)["reason"] == "the process exited with code 1; see its log"
    late = judged([], plan, Outcome(exit=None, signal=9, timed_out=True))
    assert (late["status"], late["reason"]) == ("timeout", "stopped after 30 s (bench.timeout_s)")
    assert judged([{"rank": 0, "status": "ok"}], plan, Outcome(0, None, False))["status"] == "failed"
