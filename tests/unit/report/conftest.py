"""Run directories made by hand, as the bench and the trainer write them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tunesmith.rundir.io import append_jsonl, write_json_atomic

OWNERS = ("weights", "adapters", "gradients", "optimizer", "activations")


def make_cell(name: str, **changes: Any) -> dict[str, Any]:
    """A measured cell: 100 MB, 100 ms a step, loss 2."""
    sizes = changes.pop("owners_bytes", (40e6, 0, 20e6, 20e6, 20e6))
    step_s, loss = changes.pop("step_s", 0.1), changes.pop("loss", 2.0)
    return {
        "schema": "tunesmith.bench.cell",
        "schema_version": 1,
        "name": name,
        "label": name,
        "parent": None,
        "gain": None,
        "repeat": 0,
        "status": "ok",
        "reason": None,
        "command": f"tunesmith bench train x.yaml --only {name}",
        "recipe": {"model": {"weights": "checkpoint"}},
        "device": {"type": "cpu", "name": "A processor"},
        "times": {"steps_s": [step_s * (1 + i / 1000) for i in range(8)], "first_step_s": 0.3, "total_s": 0.8},
        "throughput": {"tokens_per_s": 1000.0},
        "memory": {
            "allocated_peak_bytes": sum(sizes),
            "allocated_source": "live storages",
            "resident_peak_bytes": 6e8,
        },
        "owners": {f"{owner}_bytes": size for owner, size in zip(OWNERS, sizes, strict=True)},
        "losses": {"training": [3.0, 2.5, 2.1], "validation": loss},
        "parameters": {"trainable": 1000, "total": 2000},
        "work": {"steps": 8, "tokens": 800, "trained_tokens": 300},
        **changes,
    }


def make_failed(name: str, status: str, reason: str, **changes: Any) -> dict[str, Any]:
    """A cell that was not measured."""
    return {"schema_version": 1, "name": name, "label": name, "status": status, "reason": reason, **changes}


def write_run(path: Path, kind: str, name: str, **facts: Any) -> Path:
    """run.json of a finished run."""
    path.mkdir(parents=True)
    run = {"schema_version": 1, "kind": kind, "status": "finished", "name": name, "tunesmith_version": "0"}
    write_json_atomic(path / "run.json", {**run, "created_at": "2026-01-02T03:04:05+00:00", "facts": facts})
    return path


@pytest.fixture
def cell() -> Callable[..., dict[str, Any]]:
    """The function that makes a measured cell."""
    return make_cell


@pytest.fixture
def failed() -> Callable[..., dict[str, Any]]:
    """The function that makes a cell that failed."""
    return make_failed


@pytest.fixture
def bench_run(tmp_path: Path) -> Callable[..., Path]:
    """A function from cells to a bench's run directory."""

    def make(*cells: dict[str, Any], name: str = "shop", order: list[str] | None = None) -> Path:
        names = order or list(dict.fromkeys(one["name"] for one in cells))
        path = write_run(tmp_path / "bench", "bench", name, matrix="methods", order=names)
        (path / "cells").mkdir()
        for index, one in enumerate(cells):
            write_json_atomic(path / "cells" / f"{index}.json", one)
        return path

    return make


@pytest.fixture
def train_run(tmp_path: Path) -> Path:
    """A training run of three steps and one validation."""
    path = write_run(tmp_path / "train", "train", "tuned")
    for step in range(1, 4):
        append_jsonl(path / "metrics.jsonl", {"event": "step", "step": step, "loss": 3.0 / step})
    append_jsonl(path / "metrics.jsonl", {"event": "validation", "step": 3, "validation_loss": 1.25})
    return path


METHODS = (
    make_cell("full", owners_bytes=(40e6, 0, 40e6, 80e6, 40e6)),
    make_cell("lora", label="LoRA", parent="full", step_s=0.07, loss=2.02, owners_bytes=(40e6, 1e6, 1e6, 2e6, 36e6)),
    make_cell(
        "qlora", label="QLoRA", parent="full", step_s=0.104, loss=2.006, owners_bytes=(12e6, 1e6, 1e6, 2e6, 72e6)
    ),
    make_cell(
        "qlora+gc",
        label="QLoRA + checkpointing",
        parent="qlora",
        gain="checkpointing",
        step_s=0.14,
        loss=2.006,
        owners_bytes=(12e6, 1e6, 1e6, 2e6, 71.9e6),
    ),
)


@pytest.fixture
def methods_run(bench_run: Callable[..., Path]) -> Path:
    """A bench of methods where checkpointing saved nothing."""
    return bench_run(*METHODS)
