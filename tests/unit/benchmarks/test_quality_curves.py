"""The quality benchmark on a CPU: every case runs on the same data, verdicts follow the losses, all of it is kept."""

from __future__ import annotations

import importlib.util
import json
import lzma
import random
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

SCRIPT = Path(__file__).resolve().parents[3] / "benchmarks" / "quality_curves.py"
SMALL = ["--steps", "3", "--window", "2", "--every", "2", "--micro-batch-tokens", "64", "--max-length", "64"]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("quality_curves", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def text(tmp_path: Path) -> Path:
    words = random.Random(0).choices(["the", "cat", "sat", "on", "a", "mat", "and", "saw", "dogs.", "Then"], k=1200)
    path = tmp_path / "text.txt.xz"
    path.write_bytes(lzma.compress(" ".join(words).encode()))
    return path


def test_every_case_has_a_curve_and_every_fp8_case_a_verdict(
    script: ModuleType, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    arguments = [*SMALL, "--text", str(text), "--device", "cpu", "--tolerance", "0.05", "--out", str(out)]
    assert script.main([*arguments, "--validation-batches", "1"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    ends = {row["case"]: row for row in lines if "end_loss" in row and "case" in row}
    assert list(ends) == list(script.CASES)
    assert [row["step"] for row in lines if row.get("case") == "lora" and "step" in row] == [2, 3]
    verdicts = [row for row in lines if "verdict" in row]
    assert [row["verdict"] for row in verdicts] == [
        "full fp8",
        "full adamw8bit",
        "lora fp8",
        "lora fp8 all",
        "qlora fp8",
    ]
    assert all(row["within"] for row in verdicts)
    in_fp8 = {case: beside for case, beside in script.BESIDE.items() if case not in script.OPTIMIZERS}
    for case in in_fp8:
        assert ends[case]["validation_loss_of_weights"] == pytest.approx(ends[case]["validation_loss"], rel=0.05)
        assert ends[case]["validation_loss_of_weights"] != ends[case]["validation_loss"]
    kept = json.loads((out / "quality_curves.json").read_text(encoding="utf-8"))
    firsts = {row["case"]: row["losses"][0] for row in kept["cases"]}
    assert firsts["full"] == firsts["lora"]  # the same data in the same order
    for case, beside in in_fp8.items():
        assert firsts[case] != firsts[beside]  # fp8 is really in use
        assert firsts[case] == pytest.approx(firsts[beside], rel=0.02)
    lasts = {row["case"]: row["losses"][-1] for row in kept["cases"]}
    assert firsts["full adamw8bit"] == firsts["full"] and lasts["full adamw8bit"] != lasts["full"]
    assert kept["verdicts"] == verdicts
    assert "<svg" in (out / "quality_curves_0.svg").read_text(encoding="utf-8")


def test_text_is_cut_so_that_nothing_is_trained_and_validated_on(
    script: ModuleType, text: Path, tmp_path: Path
) -> None:
    options = SimpleNamespace(text=[text], out=tmp_path, held_out=0.25)
    training, held_out = script.split_text(options)
    parts = [Path(name).read_text(encoding="utf-8") for name in (*training, *held_out)]
    assert "".join(parts) == lzma.decompress(text.read_bytes()).decode()
    assert len(parts[1]) == pytest.approx(len(parts[0]) / 3, rel=0.01)


@pytest.mark.parametrize(
    ("mine", "within"),
    [
        ({"end_loss": 2.005, "validation_loss": 3.01}, True),
        ({"end_loss": 1.9, "validation_loss": 2.9}, False),
        ({"end_loss": 2.02, "validation_loss": 3.0}, False),
        ({"end_loss": 2.0, "validation_loss": 3.02}, False),
        ({"error": "loss is NaN"}, False),
    ],
)
def test_a_verdict_needs_both_losses_near(script: ModuleType, mine: dict[str, Any], within: bool) -> None:
    """Near, not just not above: a loss that is much lower is another run's."""
    theirs = {"model": "m", "end_loss": 2.0, "validation_loss": 3.0}
    found = {"lora": theirs, "lora fp8": {"model": "m", **mine}}
    row = script.verdict(SimpleNamespace(tolerance=0.005), found, "lora fp8")
    assert row["within"] == within
    assert ("not" in row["words"]) != within


def test_a_case_that_fails_is_a_row_that_says_so(
    script: ModuleType, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*SMALL, "--models", str(tmp_path / "nothing"), "--text", str(text), "--device", "cpu"]
    assert script.main([*arguments, "--cases", "lora", "lora fp8", "--out", str(tmp_path / "out")]) == 1
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert all("nothing" in row["error"] for row in lines if "case" in row)
    assert lines[-1]["words"] == "lora fp8: not measured"
