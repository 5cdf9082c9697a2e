"""What runs side by side before a first step: results, errors, its end; and the order of loading and checking."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tunesmith.errors import DataError, ModelError, TrainingError
from tunesmith.recipe.load import recipe_from_mapping
from tunesmith.recipe.schema import Recipe
from tunesmith.rundir.layout import open_run
from tunesmith.train import run as run_module
from tunesmith.train import session as session_module
from tunesmith.train import start
from tunesmith.train.run import train
from tunesmith.train.session import build_session
from tunesmith.train.start import Beside, loads_first


@pytest.fixture
def raw(tmp_path: Path) -> dict[str, Any]:
    rows = tmp_path / "rows.json"
    rows.write_text(json.dumps([{"instruction": "Say hello", "output": "Hello"}] * 3), encoding="utf-8")
    return {
        "model": {"path": "builtin:tiny", "device": "cpu"},
        "data": {"train": [str(rows)], "max_length": 64, "validation_fraction": 0, "cache": False},
        "train": {"max_steps": 1, "micro_batch_tokens": 64},
        "output": str(tmp_path / "runs"),
    }


def test_what_is_made_beside_is_taken() -> None:
    with Beside(lambda is_wanted: threading.current_thread().name, "other") as made:
        assert made.take() == "other"
        assert made.take() == "other"


def test_its_error_is_the_takers() -> None:
    def fail(is_wanted: Callable[[], None]) -> None:
        raise DataError("row 3")

    with Beside(fail, "other") as made, pytest.raises(DataError, match="row 3"):
        made.take()


def test_what_nobody_wants_is_stopped() -> None:
    seen: list[bool] = []

    def work(is_wanted: Callable[[], None]) -> None:
        try:
            while True:
                is_wanted()
                time.sleep(0.001)
        finally:
            seen.append(True)

    with pytest.raises(KeyboardInterrupt), Beside(work, "other"):
        raise KeyboardInterrupt
    assert seen == [True]


def test_errors_of_the_data_surface_and_the_models_come_first(raw: dict[str, Any], tmp_path: Path) -> None:
    raw["data"]["train"] = [str(tmp_path / "missing.json")]
    with pytest.raises(DataError, match="missing"):
        build_session(recipe_from_mapping(raw))
    raw["model"]["path"] = str(tmp_path / "no-model")
    with pytest.raises(ModelError):
        build_session(recipe_from_mapping(raw))


def test_no_thread_is_left(raw: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    before = threading.active_count()
    monkeypatch.setattr(session_module, "load_trainable", interrupt)
    with pytest.raises(KeyboardInterrupt):
        build_session(recipe_from_mapping(raw))
    assert threading.active_count() == before


def test_libraries_that_fail_ahead_stop_nothing(raw: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[str] = []

    def fail(dtype: torch.dtype, device: torch.device) -> None:
        tried.append(f"{dtype} {device}")
        raise RuntimeError("out of memory")

    monkeypatch.setattr(start, "_multiply", fail)
    monkeypatch.setattr(start, "_attend", fail)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    start.warm_device(_on_a_gpu(raw, train={"precision": "bfloat16"}))
    assert tried == ["torch.bfloat16 cuda:0"] * 2
    start.warm_device(recipe_from_mapping(raw))
    assert len(tried) == 2


def test_what_warms_the_libraries_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the operators' own descriptions, on the meta device: the arguments fit."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    start._multiply(torch.bfloat16, torch.device("meta"))
    start._attend(torch.bfloat16, torch.device("meta"))


def _on_a_gpu(raw: dict[str, Any], **sections: dict[str, Any]) -> Recipe:
    merged = {**raw, "model": {**raw["model"], "device": "cuda:0", "dtype": "bfloat16"}}
    for name, keys in sections.items():
        merged[name] = {**merged.get(name, {}), **keys}
    return recipe_from_mapping(merged)


def test_weights_come_first_where_a_gpu_has_room_and_nothing_is_quantised(
    raw: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    held = start.held_bytes(_on_a_gpu(raw))
    assert held > 10**6
    assert start.held_bytes(_on_a_gpu(raw, model={"dtype": "float32"})) == 2 * held
    free = [4 * held]
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free[0], 100 * held))
    assert loads_first(_on_a_gpu(raw))
    assert not loads_first(recipe_from_mapping(raw))
    assert not loads_first(_on_a_gpu(raw, method={"kind": "qlora"}))
    assert not loads_first(_on_a_gpu(raw, train={"deterministic": True}))
    assert not loads_first(_on_a_gpu(raw, model={"weights": "random"}))
    free[0] -= 8
    assert not loads_first(_on_a_gpu(raw))


@pytest.mark.parametrize("first", [False, True])
def test_a_failed_preflight_stops_before_any_step(
    raw: dict[str, Any], monkeypatch: pytest.MonkeyPatch, first: bool
) -> None:
    order: list[str] = []

    def build(*arguments: Any, **options: Any) -> Any:
        order.append("load")
        return build_session(*arguments, **options)

    def refuse(recipe: Recipe, run_dir: Path) -> str:
        order.append("check")
        raise TrainingError("the certificate failed")

    monkeypatch.setattr(run_module, "loads_first", lambda recipe: first)
    monkeypatch.setattr(run_module, "build_session", build)
    with pytest.raises(TrainingError, match="certificate"):
        train(raw, preflight=refuse, quiet=True)
    assert order == (["load", "check"] if first else ["check"])
    (run,) = Path(raw["output"]).iterdir()
    assert open_run(run).info().status == "failed"
    assert not (run / "metrics.jsonl").exists()
    assert not (run / "checkpoints").exists()


def test_both_orders_give_the_same_run(raw: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    losses = []
    for first in (False, True):
        monkeypatch.setattr(run_module, "loads_first", lambda recipe, first=first: first)
        losses.append(train(raw, preflight=lambda recipe, run_dir: "checked", quiet=True).loss)
    assert losses[0] == losses[1]


def test_the_run_directory_says_where_the_time_went(raw: dict[str, Any]) -> None:
    raw["train"]["max_steps"] = 2
    result = train(raw, quiet=True)
    account = open_run(result.run_dir).info().facts["start_up"]
    seconds = account["seconds"]
    assert {"weights", "method", "data waited for", "data (aside)", "first step", "total"} <= seconds.keys()
    assert isinstance(account["imported"], list)
    summed = sum(value for name, value in seconds.items() if name != "total" and not name.endswith("(aside)"))
    assert summed == pytest.approx(seconds["total"], abs=0.02)


_ALONE = """
import json, sys, torch
brought = {name for name in sys.modules if name.startswith("torch.")}
from tunesmith.model.uncompiled import import_kernels
from tunesmith.recipe.load import recipe_from_mapping
from tunesmith.train.run import SLOW_IMPORTS, train
from tunesmith.train.determinism import set_determinism
from tunesmith.verify import certificate
import_kernels()
raw = json.loads(sys.argv[1])
train(raw, quiet=True)
gpu = recipe_from_mapping({**raw, "model": {**raw["model"], "device": "cuda:0"}})
set_determinism(gpu)
new = {name for name in sys.modules if name.startswith("torch.distributed")} - brought
print(sorted(new), [name for name in SLOW_IMPORTS if name in sys.modules])
"""


def test_a_run_of_one_process_imports_no_compiler_and_nothing_for_several(
    raw: dict[str, Any], torch_forks: Callable[..., str]
) -> None:
    """torch brings some of torch.distributed itself; the rest, its compiler and sympy take seconds."""
    raw["train"]["max_steps"] = 1
    assert torch_forks(_ALONE, json.dumps(raw)).strip() == "[] []"
