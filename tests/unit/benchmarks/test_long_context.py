"""The search for the longest sequence: its arithmetic, and the whole of it on a tiny model with a cap of its own."""

from __future__ import annotations

import gc
import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from tunesmith.model import cpu_attention
from tunesmith.recipe.load import recipe_from_mapping
from tunesmith.train.resolve import resolve_recipe

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    spec = importlib.util.spec_from_file_location("long_context", ROOT / "benchmarks" / "long_context.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def _little_to_collect() -> Iterator[None]:
    """Every step collects garbage, and would look at all that the tests before have imported."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Six blocks, as builtin:tiny, but narrow ones."""
    folder = tmp_path_factory.mktemp("narrow")
    config = json.loads((ROOT / "tunesmith" / "models" / "tiny" / "config.json").read_text(encoding="utf-8"))
    config |= {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 256}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    raw = {
        "model": {"path": str(folder), "weights": "random", "device": "cpu"},
        "method": {"kind": "qlora", "rank": 4},
        "data": {"format": "tokens", "max_length": 64, "validation_fraction": 0},
        "train": {"micro_batch_tokens": 64, "checkpointing": "block", "loss_chunk_tokens": 64},
    }
    return resolve_recipe(recipe_from_mapping(raw))


def test_a_surface_through_four_peaks(bench: ModuleType) -> None:
    truth = bench.Peaks(1000.0, 50.0, 7.0, 2.0)
    peaks = {(n, t): int(truth.bytes_for(n, t)) for n in bench.BLOCKS for t in (10, 30)}
    found = bench.Peaks.through((10, 30), peaks)
    assert found == truth
    most = found.most_tokens(32, 20_000)
    assert found.bytes_for(32, most) <= 20_000 < found.bytes_for(32, most + 1)
    assert found.most_tokens(32, 2000) == 0


def test_the_longest_step_is_found_and_taken(bench: ModuleType, recipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under a cap in bytes of live storages; a sixteenth longer would not have fitted.

    Without the CPU's attention that holds probabilities for some lengths: peaks would not grow with the length.
    """
    monkeypatch.setattr(cpu_attention, "LONGEST", 0)
    cap = 2_800_000
    answer = bench.find(recipe, cap, (64, 128), 100_000, 3)
    assert answer["stopped_by"] == "device memory"
    assert answer["tokens"] >= 256
    assert answer["steps"][-1]["peak_bytes"] <= cap
    assert answer["predicted_peak_bytes"] == pytest.approx(answer["steps"][-1]["peak_bytes"], rel=0.1)
    longer = bench.take_step(bench.of_length(recipe, answer["tokens"] * 17 // 16))
    assert longer.peak_bytes > cap * 0.95


def test_other_bounds_stop_it_too(bench: ModuleType, recipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = bench.find(recipe, 10**9, (64, 128), 256, 1)
    assert (answer["stopped_by"], answer["tokens"]) == ("--most", 256)
    monkeypatch.setattr(bench, "available_memory_bytes", lambda: 10**9)
    offloaded = recipe_from_mapping({"model": {"path": "recipes/configs/llama-3.1-8b"}, "method": {"kind": "qlora"}})
    train = offloaded.train.model_copy(update={"checkpointing": "offload-block", "precision": "bfloat16"})
    monkeypatch.chdir(ROOT)
    tokens = bench.host_tokens(offloaded.model_copy(update={"train": train}))
    assert tokens == pytest.approx(0.95 * 10**9 / (31 * 4096 * 2), abs=2)
    assert bench.host_tokens(recipe) is None


def test_a_step_that_does_not_fit_is_an_answer(bench: ModuleType, recipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(recipe: Any) -> Any:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(bench, "take_step", fails)
    assert bench._tried(recipe, 1).error == "device memory"
