"""A whole bench on a tiny model: fresh processes, rows for what failed, equal work, and the same cell twice."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tunesmith.bench import matrix
from tunesmith.bench.matrix import Event, bench
from tunesmith.bench.statistics import ratio
from tunesmith.bench.worker import Worker
from tunesmith.recipe.schema import Recipe
from tunesmith.report.load import read_run
from tunesmith.report.rows import rows_of

MakeRecipe = Callable[..., Recipe]
SAME = {"grid": {"train.eps": [1e-8, 2e-8]}, "matrix": "grid"}


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    with Worker(tmp_path_factory.mktemp("worker") / "worker.log") as started:
        yield started


@pytest.fixture
def _started_before(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    """The worker that forks the cells is that of the test before: its imports are all that would be new."""

    def started(log: Path) -> contextlib.AbstractContextManager[Worker]:
        log.touch()
        return contextlib.nullcontext(worker)

    monkeypatch.setattr(matrix, "Worker", started)


def test_methods_are_measured_in_equal_conditions(tiny_recipe: MakeRecipe) -> None:
    events: list[Event] = []
    recipe = tiny_recipe(bench={"steps": 2}, method={"rank": 4})
    result = bench(recipe, command="tunesmith bench train x.yaml", progress=events.append)
    assert [(cell["name"], cell["reason"]) for cell in result.cells if cell["status"] != "ok"] == []
    assert len({json.dumps(cell["work"]) for cell in result.cells}) == 1
    rows = rows_of(read_run(result.run_dir))
    assert [row.name for row in rows] == ["full", "lora", "lora+gc", "qlora", "qlora+gc"]
    assert not any(row.unequal for row in rows)
    cells = {cell["name"]: cell for cell in result.cells}
    assert cells["qlora"]["owners"]["weights_bytes"] < cells["lora"]["owners"]["weights_bytes"]
    assert cells["lora+gc"]["owners"]["activations_bytes"] < cells["lora"]["owners"]["activations_bytes"]
    # Recomputation gives the same numbers on a CPU, so checkpointing may change no loss at all.
    assert cells["lora+gc"]["losses"] == cells["lora"]["losses"]
    assert cells["full"]["command"] == "tunesmith bench train x.yaml --only full"
    assert len(events) == 10
    assert len(list((result.run_dir / "logs").glob("*.plan.json"))) == 0


@pytest.mark.usefixtures("_started_before")
def test_the_same_cell_twice_differs_by_no_more_than_its_interval(tiny_recipe: MakeRecipe) -> None:
    """A/A: two cells that differ in nothing that takes time. On a busy machine a process may be slowed as a whole, so
    the interval of the ratio is widened by a quarter on either side."""
    result = bench(tiny_recipe(bench={**SAME, "steps": 12, "repeats": 3, "count_memory": False}))
    times = {
        name: [cell["times"]["steps_s"] for cell in result.cells if cell["name"] == name]
        for name in ("baseline", "eps=2e-08")
    }
    found = ratio(times["eps=2e-08"], times["baseline"])
    assert found is not None
    assert found.low / 1.25 <= 1 <= found.high * 1.25
    work = {json.dumps(cell["work"]) for cell in result.cells}
    assert len(work) == 1


@pytest.mark.usefixtures("_started_before")
def test_what_fails_is_a_row_with_its_reason(tiny_recipe: MakeRecipe) -> None:
    """One cell fails in Python, one takes too long; the other is measured all the same."""
    overrides = {
        "full": {"data.max_rows": 1, "data.validation_fraction": 0.0, "model.path": "/nowhere/model"},
        "lora": {"bench.timeout_s": 0.02},
    }
    result = bench(tiny_recipe(bench={"overrides": overrides, "steps": 1}), only=["full", "lora", "qlora"])
    cells = {cell["name"]: cell for cell in result.cells}
    assert cells["qlora"]["status"] == "ok"
    assert cells["full"]["status"] == "failed"
    assert "nowhere" in cells["full"]["reason"]
    assert cells["lora"]["status"] == "timeout"
    assert result.num_ok == 1
    rows = rows_of(read_run(result.run_dir))
    assert {row.name: row.status for row in rows} == {"full": "failed", "lora": "timeout", "qlora": "ok"}
    assert "Traceback" in (result.run_dir / cells["full"]["log"]).read_text()
