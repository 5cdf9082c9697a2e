"""`tunesmith consolidate`: of a run or one checkpoint, with the right exit code."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tunesmith.cli.main import run as tunesmith
from tunesmith.train.run import train


@pytest.fixture
def finished(tiny_model_dir: Callable[..., Path], tmp_path: Path) -> Path:
    """A run of three steps with a checkpoint at each."""
    recipe = {
        "model": {"path": str(tiny_model_dir("qwen2")), "device": "cpu"},
        "method": {"kind": "full"},
        "data": {"format": "tokens", "max_length": 32, "max_rows": 8},
        "train": {"max_steps": 3, "micro_batch_tokens": 64, "learning_rate": 1e-2},
        "checkpoint": {"every_steps": 1, "keep": 3},
        "log": {"trackers": []},
    }
    return train(recipe, run_dir=tmp_path / "run", quiet=True).run_dir


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "model.safetensors")


def test_a_run(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert tunesmith(["consolidate", str(finished), "--output", str(out), "--json"]) == 0
    captured = capsys.readouterr()
    result = json.loads(captured.out.splitlines()[-1])
    assert (result["kind"], result["step"]) == ("model", 3)
    assert "as of step 3" in captured.err and f"tunesmith chat {out}" in captured.err
    final = weights(finished / "final")
    assert all(torch.equal(tensor, final[name]) for name, tensor in weights(out).items())


def test_one_checkpoint(finished: Path, tmp_path: Path) -> None:
    path = finished / "checkpoints" / "step-00000002"
    assert tunesmith(["consolidate", str(path), "--output", str(tmp_path / "out"), "--dtype", "bfloat16"]) == 0
    made, final = weights(tmp_path / "out"), weights(finished / "final")
    assert {tensor.dtype for tensor in made.values()} == {torch.bfloat16}
    assert any(not torch.equal(tensor, final[name].bfloat16()) for name, tensor in made.items())


def test_a_damaged_checkpoint_of_a_run_is_passed_over_and_a_named_one_refused(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damaged = finished / "checkpoints" / "step-00000003"
    (damaged / "tensors.safetensors").write_bytes(b"")
    assert tunesmith(["consolidate", str(damaged), "--output", str(tmp_path / "out")]) == 1
    assert "tensors.safetensors has 0 bytes" in capsys.readouterr().err
    assert tunesmith(["consolidate", str(finished), "--output", str(tmp_path / "out"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["step"] == 2


def test_refusals(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "out")
    assert tunesmith(["consolidate", str(tmp_path), "--output", out]) == 2
    assert "neither a run directory nor a checkpoint" in capsys.readouterr().err
    away = tmp_path / "away" / "step-00000003"
    shutil.copytree(finished / "checkpoints" / "step-00000003", away)
    assert tunesmith(["consolidate", str(away), "--output", out]) == 2
    assert "lies in no run directory" in capsys.readouterr().err
    (tmp_path / "out").mkdir()
    assert tunesmith(["consolidate", str(finished), "--output", out]) == 2
    assert "exists already" in capsys.readouterr().err
    shutil.rmtree(finished / "checkpoints")
    assert tunesmith(["consolidate", str(finished), "--output", out]) == 2
    assert "has no checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize("named", ["global_step200", "."])
def test_a_checkpoint_of_deepspeeds_own_is_refused_with_the_way_round(
    named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It was "neither a run directory nor a checkpoint of one"."""
    folder = tmp_path / "global_step200"
    folder.mkdir()
    (folder / "zero_pp_rank_0_mp_rank_00_model_states.pt").touch()
    assert tunesmith(["consolidate", str(tmp_path / named), "--output", str(tmp_path / "out")]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert f"python zero_to_fp32.py {tmp_path} DIR --safe_serialization" in said


def test_a_model_that_only_transformers_knows(
    tiny_model_dir: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = {
        "model": {"path": str(tiny_model_dir("qwen2")), "device": "cpu", "backend": "transformers"},
        "method": {"kind": "lora", "rank": 2},
        "data": {"format": "tokens", "max_length": 32, "max_rows": 8},
        "train": {"max_steps": 1, "micro_batch_tokens": 64},
        "log": {"trackers": []},
    }
    run = train(recipe, run_dir=tmp_path / "run", quiet=True).run_dir
    out = tmp_path / "out"
    assert tunesmith(["consolidate", str(run), "--output", str(out)]) == 0
    assert "has to be built in memory" in capsys.readouterr().err
    name = "adapter_model.safetensors"
    made, final = load_file(out / name), load_file(run / "final" / name)
    assert made.keys() == final.keys()
    assert all(torch.equal(made[key], final[key]) for key in final)
    assert tunesmith(["consolidate", str(run), "--output", str(out)]) == 2
    assert tunesmith(["consolidate", str(run), "--output", str(out), "--replace"]) == 0
