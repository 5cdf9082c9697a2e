"""`tunesmith verify`: table, JSON and exit codes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tunesmith.cli.main import run


@pytest.fixture
def recipe_file(tiny_model_dir: Callable[..., Path], tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"model: {{path: '{tiny_model_dir('llama', hidden_size=64)}', device: cpu}}\n"
        "method: {kind: lora, rank: 4}\ndata: {format: tokens}\n",
        encoding="utf-8",
    )
    return path


def test_a_good_recipe(recipe_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["verify", str(recipe_file), "--json"]) == 0
    captured = capsys.readouterr()
    result = json.loads(captured.out.splitlines()[-1])
    assert result["passed"] is True
    assert len(result["checks"]) > 8
    assert "packing isolation" in captured.err


def test_a_failed_check_is_exit_code_1(
    recipe_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from tunesmith.verify.check import Outcome

    monkeypatch.setattr(
        "tunesmith.verify.certificate.mask_shown", lambda *_: Outcome(None, None, "nothing is trained", passed=False)
    )
    assert run(["verify", str(recipe_file), "--quick", "--set", "method.rank=5"]) == 1
    captured = capsys.readouterr()
    assert "FAILED" in captured.err
    assert "mask shown" in captured.err


def test_a_missing_recipe_is_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["verify", "nowhere.yaml"]) == 2
    assert "nowhere.yaml" in capsys.readouterr().err
