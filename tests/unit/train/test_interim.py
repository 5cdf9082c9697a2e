"""A run that was stopped before its end is used from its newest whole checkpoint."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from tunesmith.checkpoint.state import list_states
from tunesmith.cli import console, main
from tunesmith.engine.llm import LLM
from tunesmith.errors import CheckpointError, RunDirError
from tunesmith.rundir.layout import RunDir, open_run
from tunesmith.train.interim import write_interim
from tunesmith.train.metrics import StepMetrics
from tunesmith.train.run import train

Recipe = dict[str, Any]
METHODS: dict[str, Recipe] = {
    "lora": {"kind": "lora", "rank": 4},
    "dora": {"kind": "lora", "rank": 4, "dora": True},
    "qlora": {"kind": "qlora", "rank": 4},
    "full": {"kind": "full"},
    "freeze": {"kind": "freeze", "trainable": ["last:1"]},
}


@pytest.fixture
def recipe(tiny_model_dir: Callable[..., Path], tmp_path: Path) -> Recipe:
    """A run of 3 steps with a checkpoint at each."""
    rows = [{"instruction": f"问题 {i}", "output": f"答案 {i}。"} for i in range(8)]
    (tmp_path / "数据.json").write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    return {
        "output": str(tmp_path / "runs"),
        "model": {"path": str(tiny_model_dir("qwen2", hidden_size=64)), "device": "cpu"},
        "method": METHODS["lora"],
        "data": {
            "train": [str(tmp_path / "数据.json")],
            "max_length": 64,
            "validation_fraction": 0,
            "workers": 0,
            "cache": False,
        },
        "train": {"max_steps": 3, "micro_batch_tokens": 64, "learning_rate": 1e-2},
        "checkpoint": {"every_steps": 1, "keep": 3},
        "log": {"trackers": []},
    }


def killed(recipe: Recipe, at: int) -> RunDir:
    """A run that died in the step after `at`."""

    def die(metrics: StepMetrics) -> None:
        if metrics.step > at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(recipe, on_step=die, quiet=True)
    (run,) = Path(recipe["output"]).iterdir()
    return open_run(run)


def content(path: Path) -> Any:
    """What is in a file; of tensors, their bytes and the metadata (which a file holds in any order)."""
    if path.suffix != ".safetensors":
        return path.read_bytes()
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name).view(torch.uint8).numpy().tobytes() for name in file.keys()}  # noqa: SIM118
        return tensors, file.metadata()


@pytest.mark.parametrize("method", METHODS)
def test_the_last_checkpoints_outcome_is_the_final_one(recipe: Recipe, method: str) -> None:
    run = open_run(train({**recipe, "method": METHODS[method]}, quiet=True).run_dir)
    assert write_interim(run) is None, "a finished run has its outcome"
    kept = run.final.rename(run.path / "kept")
    interim = write_interim(run)
    assert interim is not None and (interim.step, interim.total_steps) == (3, 3)
    names = sorted(path.name for path in kept.iterdir())
    assert sorted(path.name for path in interim.path.iterdir()) == names
    assert [name for name in names if content(interim.path / name) != content(kept / name)] == []


def test_a_killed_run_is_used_from_its_newest_checkpoint_until_it_goes_on(recipe: Recipe) -> None:
    run = killed(recipe, at=2)
    with pytest.raises(RunDirError, match=r"no trained model yet .*tunesmith train --resume"):
        LLM(run.path, device="cpu")
    interim = write_interim(run)
    assert interim is not None and interim.step == 2
    llm = LLM(run.path, device="cpu")
    assert llm.source is not None and llm.source.adapter == interim.path
    shutil.rmtree(run.checkpoints / "step-00000002")
    older = write_interim(run)
    assert older is not None and older.step == 1 and not interim.path.exists()
    result = train(recipe, resume=run.path, quiet=True)
    assert result.final == run.final and not older.path.exists()


def test_a_torn_checkpoint_is_passed_over(recipe: Recipe) -> None:
    run = killed(recipe, at=2)
    (run.checkpoints / "step-00000002" / "tensors.safetensors").write_bytes(b"torn")
    interim = write_interim(run)
    assert interim is not None and interim.step == 1
    for state in list_states(run.checkpoints):
        (state / "tensors.safetensors").write_bytes(b"torn")
    with pytest.raises(CheckpointError, match="no usable checkpoint"):
        write_interim(run)


def test_chat_eval_and_merge_say_which_step_they_use(recipe: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    """They refused a stopped run, though its checkpoint holds all that it had learnt."""
    run, data = killed(recipe, at=2), recipe["data"]["train"][0]
    for arguments in (
        ["chat", str(run.path), "--prompt", "问题 1", "--max-tokens", "2"],
        ["eval", str(run.path), "--data", data, "--limit", "2"],
        ["merge", str(run.path), "--output", str(run.path / "merged"), "--device", "cpu"],
    ):
        console._console.cache_clear()
        code = main.run(arguments)
        said = capsys.readouterr().err
        console._console.cache_clear()
        assert code == 0, said
        assert "using what it had learnt at step 2 of 3" in said
        assert f"tunesmith train --resume {run.path}" in said


def test_a_run_without_a_checkpoint_says_what_to_type(recipe: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    run = killed({**recipe, "checkpoint": {"every_steps": None}}, at=1)
    assert main.run(["chat", str(run.path), "--prompt", "hi"]) == 2
    assert f"tunesmith train --resume {run.path}" in capsys.readouterr().err
    assert main.run(["merge", str(run.path), "--output", str(run.path / "merged")]) == 2
    assert f"tunesmith train --resume {run.path}" in capsys.readouterr().err
