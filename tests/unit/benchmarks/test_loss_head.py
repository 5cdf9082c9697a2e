"""The loss head's benchmark on a CPU: every row is there, and all heads compute the same."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).resolve().parents[3] / "benchmarks" / "loss_head.py"
SMALL = ["--tokens", "40", "--hidden", "16", "--vocab", "100", "--chunks", "8,16", "--runs", "1", "--rounds", "1"]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("loss_head", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("trainable", [False, True])
def test_every_head_has_a_row_and_they_agree(
    script: ModuleType, trainable: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    extra = ["--trainable"] if trainable else []
    assert script.main([*SMALL, *extra, "--device", "cpu", "--dtype", "float32", "--out", str(tmp_path)]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    names = [row["head"] for row in rows]
    assert names == ["floor", "tunesmith", "tunesmith", "recomputed", "torch", "liger"]
    measured = [row for row in rows if "median_ms" in row and row["head"] != "floor"]
    assert all(row["agrees"] for row in measured)
    assert all(("grad_weight_norm" in row) == trainable for row in measured)
    assert all(row["products_ms"] > 0 and row["kernel_ms"] > 0 for row in rows if row["head"] == "tunesmith")
    kept = [json.loads(line) for line in (tmp_path / "loss_head.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["head"] for row in kept] == names
    assert all("packages" in row["environment"] for row in kept)


def test_a_head_that_computes_something_else_is_found_out(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    options = script.parse([*SMALL, "--device", "cpu", "--dtype", "float32", "--out", "."])
    inputs = script.Inputs(options)
    whole = script.F.cross_entropy
    monkeypatch.setattr(script.F, "cross_entropy", lambda *args, **keys: whole(*args, **keys) * 1.05)
    agrees = {row["head"]: row.get("agrees") for row in script.compare(inputs, options)}
    assert agrees == {"tunesmith": True, "recomputed": False, "torch": False, "liger": None}
