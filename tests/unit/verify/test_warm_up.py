"""The worker that compiles ahead: when it is started, what it answers, and that it can't hurt."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tunesmith.kernels.compiling_worker import chip_numbers
from tunesmith.recipe.load import recipe_from_mapping
from tunesmith.recipe.schema import Recipe
from tunesmith.verify import warm_up, warm_up_worker
from tunesmith.verify.warm_up import marker_of, start_compiling

RECIPE = {"model": {"path": "builtin:tiny"}, "data": {"max_length": 64}, "train": {"micro_batch_tokens": 64}}


def _recipe(**train: object) -> Recipe:
    return recipe_from_mapping({**RECIPE, "train": {**RECIPE["train"], **train}})


def test_nothing_is_started_for_a_cpu() -> None:
    assert start_compiling(recipe_from_mapping({**RECIPE, "model": {"path": "builtin:tiny", "device": "cpu"}})) is None


def test_nothing_is_started_where_all_is_compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(warm_up, "_is_wanted", lambda recipe: True)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    marker_of(_recipe()).touch()
    assert start_compiling(_recipe()) is None


def test_the_marker_goes_by_what_decides_the_kernels(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    assert marker_of(_recipe()) == marker_of(recipe_from_mapping({**RECIPE, "name": "other"}))
    assert marker_of(_recipe()) != marker_of(_recipe(precision="float16"))
    assert marker_of(_recipe()).parent == tmp_path


def test_a_worker_without_a_gpu_has_nothing_to_say(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(warm_up, "_is_wanted", lambda recipe: True)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    if chip_numbers() is not None:
        pytest.skip("there is a GPU here")
    compiling = start_compiling(_recipe())
    assert compiling is not None
    assert compiling.wait() is None
    assert not marker_of(_recipe()).exists()


def test_a_recipe_need_not_name_its_device() -> None:
    """As a recipe is written by hand; the product sends a whole one."""
    request = json.dumps({"recipe": RECIPE, "marker": "unused"})
    command = [sys.executable, "-m", "tunesmith.verify.warm_up_worker"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, input=request, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"kernels": 0}


@pytest.mark.parametrize("device", ["auto", "cuda:3"])
def test_the_device_is_the_recipes(device: str) -> None:
    assert warm_up_worker.device_of({"recipe": {"model": {"path": "x", "device": device}}}) == device


def test_the_work_compiles_a_recipes_kernels(torch_forks: Callable[..., str], tmp_path: Path) -> None:
    """In a process of its own, as the worker is, in which two compile."""
    pytest.importorskip("triton")
    code = (
        "import json; from tunesmith.recipe.load import recipe_from_mapping\n"
        "from tunesmith.kernels.compiling_worker import work\n"
        "from tunesmith.verify.warm_up_worker import find\n"
        f"raw = recipe_from_mapping({{**{RECIPE!r}, 'method': {{'kind': 'lora', 'targets': ['q_proj']}}}})\n"
        "print(json.dumps(work(find, {'recipe': raw.model_dump(mode='json')}, (9, 0, 132), 2)))"
    )
    answer = json.loads(torch_forks(code, TRITON_CACHE_DIR=str(tmp_path)))
    assert answer["failed"] == []
    assert answer["kernels"] >= 8
    assert len(list(tmp_path.rglob("*.cubin"))) == answer["kernels"]
