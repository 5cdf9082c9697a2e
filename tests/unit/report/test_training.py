"""What a report says of a single training run, and of an evaluation without questions."""

from __future__ import annotations

from pathlib import Path

import pytest

from tunesmith.report.write import write_report
from tunesmith.rundir.io import read_json, write_json_atomic

RECIPE = """
model: {path: builtin:tiny}
method: {kind: lora, rank: 16}
data: {train: [我的 数据.json]}
train: {learning_rate: 0.0016, schedule: cosine}
"""


@pytest.fixture
def tuned(train_run: Path) -> Path:
    """The training run with what the trainer writes beside its metrics."""
    info = read_json(train_run / "run.json")
    facts = {"trainable_parameters": 467_000, "total_parameters": 6_240_000, "duration_s": 24.2}
    command = ["tunesmith", "train", "builtin:tiny", "--data", "我的 数据.json"]
    write_json_atomic(train_run / "run.json", {**info, "command": command, "facts": facts})
    (train_run / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
    rows = "".join(
        f'{{"event": "step", "step": {step}, "epoch": {step}, "loss": 1, "tokens_per_s": {700 + step}, '
        f'"host_resident_bytes": {450_000_000 + step}}}\n'
        for step in (1, 2, 3)
    )
    (train_run / "metrics.jsonl").write_text(rows, encoding="utf-8")
    return train_run


def test_a_training_run_says_by_what_method_and_command(tuned: Path) -> None:
    """It showed the loss curve alone: neither the command nor the method, on the page; nothing at all in Markdown."""
    files = write_report([tuned])
    page, markdown = (path.read_text(encoding="utf-8") for path in (files.html, files.markdown))
    for text in (
        "LoRA, rank 16 (467 k of 6.24 M parameters trained)",
        "builtin:tiny",
        "3 steps (3 epochs)",
        "0.0016, cosine",
        "702 tokens/s (median)",
        "450 MB",
        "24.2 s",
    ):
        assert f"<b>{text}</b>" in page
        assert text.replace("_", r"\_") in markdown
    assert "<code>tunesmith train builtin:tiny --data &#39;我的 数据.json&#39;</code><button" in page
    assert "The command of this run: `tunesmith train builtin:tiny --data '我的 数据.json'`" in markdown


def test_the_same_in_chinese(tuned: Path) -> None:
    checks = [{"name": "packing isolation", "passed": True, "value": 0.0, "limit": 0.0, "detail": ""}]
    write_json_atomic(tuned / "certificate.json", {"checks": checks})
    page = write_report([tuned], language="zh").html.read_text(encoding="utf-8")
    assert "LoRA，秩 16（共 6.24 M 参数，训练 467 k）" in page
    assert "打包隔离" in page and "packing isolation" not in page
    assert "本次运行的命令" in page


def test_a_run_that_recorded_little_has_no_empty_facts(train_run: Path) -> None:
    page = write_report([train_run]).html.read_text(encoding="utf-8")
    assert '<p class="facts"><span>length <b>3 steps</b></span></p>' in page
    assert "The command of this run" not in page


def test_an_evaluation_without_questions_lists_no_answers(train_run: Path) -> None:
    """Perplexity alone stood under the heading "Answers", and in no sentence."""
    (train_run / "evaluations").mkdir()
    measured = {"model": "x", "accuracy": None, "perplexity": {"data": "zh.json", "perplexity": 1.7162}}
    write_json_atomic(train_run / "evaluations" / "quality.json", measured)
    files = write_report([train_run])
    page = files.html.read_text(encoding="utf-8")
    assert "<h2>Evaluation: tuned</h2>" in page and "Answers" not in page
    assert "Perplexity 1.72 on zh.json." in files.sentences
