"""`tunesmith data`: what training would see, as a person types it."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

Run = Callable[..., "subprocess.CompletedProcess[str]"]


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def test_shows_format_counts_and_mask(tunesmith_cli: Run, tiny_model_dir: Callable[..., Path], tmp_path: Path) -> None:
    file = write(tmp_path / "问答.jsonl", [{"instruction": "你好", "output": f"答案{i}"} for i in range(20)])
    done = tunesmith_cli("data", file, "--model", tiny_model_dir(), "--json", check=True)
    result = json.loads(done.stdout.splitlines()[-1])
    assert set(result["formats"].values()) == {"alpaca"}
    assert (result["rows"], result["documents"]) == (20, 20)
    assert next(p["text"] for p in result["example"]["pieces"] if p["trained"]).startswith("答案")
    assert "format alpaca" in done.stderr
    assert "你好" in done.stderr


def test_what_was_read_is_said_beside_the_format(
    tunesmith_cli: Run, tiny_model_dir: Callable[..., Path], tmp_path: Path
) -> None:
    """Rows with 问题 and 答案 were "format alpaca", and nothing said which of their columns are trained."""
    chinese = write(tmp_path / "问答.jsonl", [{"编号": i, "问题": "你好", "答案": f"答案{i}"} for i in range(3)])
    plain = write(tmp_path / "plain.jsonl", [{"instruction": "hi", "output": "there"}])
    done = tunesmith_cli("data", chinese, plain, "--model", tiny_model_dir(), "--json", check=True)
    assert "4 rows in 2 files, format alpaca and alpaca (read from 问题, 答案)" in done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["formats"] == {str(chinese): "alpaca", str(plain): "alpaca"}
    assert result["columns"] == {str(chinese): ["问题", "答案"], str(plain): []}


def test_one_document_is_one(tunesmith_cli: Run, tiny_model_dir: Callable[..., Path], tmp_path: Path) -> None:
    """It was "1 documents to train on"."""
    file = tmp_path / "one.txt"
    file.write_text("Once upon a time.\n", encoding="utf-8")
    done = tunesmith_cli("data", file, "--model", tiny_model_dir(), check=True)
    assert "1 row in 1 file" in done.stderr and "1 document to train on, 0 to validate on" in done.stderr


def test_mistake_is_one_line(tunesmith_cli: Run, tiny_model_dir: Callable[..., Path], tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", [{"instruction": "a", "output": 3}])
    done = tunesmith_cli("data", file, "--model", tiny_model_dir())
    assert done.returncode == 2
    assert "a.jsonl:1: 'output' must be a string" in done.stderr
    assert "Traceback" not in done.stderr


PAIRS = [{"prompt": "你好", "chosen": f"好答案{i}", "rejected": f"坏{i}"} for i in range(20)]


def test_shows_a_preference_pair_with_both_masks(
    tunesmith_cli: Run, tiny_model_dir: Callable[..., Path], tmp_path: Path
) -> None:
    file = write(tmp_path / "偏好.jsonl", PAIRS)
    done = tunesmith_cli("data", file, "--model", tiny_model_dir(), "--example", "3", "--json", check=True)
    result = json.loads(done.stdout.splitlines()[-1])
    assert set(result["formats"].values()) == {"preference"}
    assert (result["rows"], result["pairs"], result["validation_pairs"]) == (20, 20, 0)
    assert set(result["lengths"]) == {"prompt", "chosen", "rejected"}
    for side, start in (("chosen", "好答案"), ("rejected", "坏")):
        (trained,) = (piece["text"] for piece in result["example"][side]["pieces"] if piece["trained"])
        assert trained.startswith(start)
        assert trained.endswith("<|im_end|>")
    for shown in ("format preference", "20 pairs to train on, 0 to validate on", "chosen: ", "rejected: "):
        assert shown in done.stderr


def test_training_on_preference_pairs_is_refused_in_a_line(
    tunesmith_cli: Run, tiny_model_dir: Callable[..., Path], tmp_path: Path
) -> None:
    file = write(tmp_path / "偏好.jsonl", PAIRS)
    done = tunesmith_cli("train", tiny_model_dir(), "--data", file, "--set", "data.bad_rows=skip", cwd=tmp_path)
    assert done.returncode == 2
    assert "preference training (DPO) isn't there yet" in " ".join(done.stderr.split())
    assert "tunesmith data" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "runs").exists()
