"""`tunesmith merge`: finds the adapter, prints the divergence, refuses with the right exit code."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tunesmith.checkpoint.adapter import save_adapter
from tunesmith.checkpoint.load import load_decoder
from tunesmith.cli.main import run
from tunesmith.model.methods import adapted_linears, apply_method
from tunesmith.recipe.schema import MethodSection


@pytest.fixture
def finished_run(tiny_model_dir: Callable[..., Path], tmp_path: Path) -> Path:
    """A folder as a run leaves it: the adapter in final/."""
    base = tiny_model_dir("qwen2")
    model = load_decoder(base)
    apply_method(model, MethodSection(kind="lora", rank=4), seed=0)
    with torch.no_grad():
        for linear in adapted_linears(model).values():
            for parameter in linear.adapters.parameters():
                parameter.add_(0.05)
    save_adapter(model, tmp_path / "run" / "final", base)
    return tmp_path / "run"


def test_merges_a_run(finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("Hello there\n\n你好，世界\n", encoding="utf-8")
    out = tmp_path / "merged"
    arguments = ["--output", str(out), "--dtype", "bfloat16", "--prompts", str(prompts), "--device", "cpu", "--json"]
    assert run(["merge", str(finished_run), *arguments]) == 0
    captured = capsys.readouterr()
    result = json.loads(captured.out.splitlines()[-1])
    assert result["dtype"] == "bfloat16"
    assert result["base_checked"] is True
    (hop,) = result["hops"]
    assert hop["divergence"]["num_tokens"] == len(b"Hello there") + len("你好，世界".encode())
    assert "merge in bfloat16" in captured.err
    assert "because the base's files are" not in captured.err  # it was asked for
    assert load_decoder(out).embedding.weight.dtype == torch.bfloat16


def test_a_dtype_that_nobody_asked_for_has_its_reason(
    tmp_path: Path, tiny_model_dir: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """A run in float32 was merged in bfloat16 without a word about why."""
    base = tiny_model_dir("qwen2", dtype="bfloat16")
    model = load_decoder(base)
    apply_method(model, MethodSection(kind="lora", rank=4), seed=0)
    save_adapter(model, tmp_path / "run" / "final", base)
    assert run(["merge", str(tmp_path / "run"), "--output", str(tmp_path / "out"), "--device", "cpu"]) == 0
    assert "Stored in bfloat16, as the base's files are" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--kl-limit", "0.0000000001", "--dtype", "bfloat16"], 1, "breaks the model"),
        (["--base", "nowhere"], 2, "directory 'nowhere'"),
        (["--dtype", "int8"], 2, "int8"),
    ],
)
def test_refusals(
    finished_run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    code: int,
    message: str,
) -> None:
    out = tmp_path / "merged"
    assert run(["merge", str(finished_run), "--output", str(out), "--device", "cpu", *arguments]) == code
    assert message in capsys.readouterr().err
    assert not out.exists()


def test_a_folder_without_adapter(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["merge", str(tmp_path), "--output", str(tmp_path / "x")]) == 2
    assert "adapter_config.json" in capsys.readouterr().err


def test_a_run_of_a_whole_model_has_nothing_to_merge(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It was "neither an adapter nor a run that made one"."""
    (tmp_path / "run" / "final").mkdir(parents=True)
    (tmp_path / "run" / "final" / "config.json").write_text("{}", encoding="utf-8")
    assert run(["merge", str(tmp_path / "run"), "--output", str(tmp_path / "x")]) == 2
    assert f"{tmp_path / 'run' / 'final'} is a whole model already" in capsys.readouterr().err
