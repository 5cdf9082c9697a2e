"""What a report says of a single training run, and of an evaluation without questions."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from tunesmith import verify
from tunesmith.report.strings import words_for
from tunesmith.report.write import write_report
from tunesmith.rundir.io import read_json, write_json_atomic
from tunesmith.verify.certificate import MASK_SHOWN

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


DETAILS = (
    "457 of 879 tokens of the first 25 documents are trained, ends of turns among them (value: the share)",
    "gradients of the same documents in float32 (one micro-batch; two; one per document; padded, the last one ragged) "
    "on the same architecture with 2 layers, hidden 256, vocabulary 512, random weights",
    "hidden states in float32 when all neighbours are exchanged, on the recipe's model",
    "written out against operator by operator on the same architecture with 2 layers, random weights",
    "relative error 1.2e-07 in float32, as a multiple of torch's; 96 tokens, hidden 256",
    "relative error 2.9e-07 in float32, as a multiple of torch's; documents of 63, 1, 32 tokens, 4 heads, window 8",
    "relative error 3e-07 in float32, as a multiple of torch's; 48 trained of 96 tokens, 4096 words, chunks of 16",
    "relative error 3.5e-07 in float32, as a multiple of torch's; rank 16, 256 -> 512",
    "relative difference of logits, merged into the dequantised base, on the recipe's model, random",
    "distance beyond the nearest code, as a multiple of what rounding explains, 64 x 64, doubly quantised",
)


@pytest.mark.parametrize("detail", DETAILS)
def test_a_chinese_page_says_checks_in_chinese(detail: str) -> None:
    """Names of checks were Chinese, what they had compared was English."""
    said = words_for("zh").detail(detail)
    kept = re.sub(r"float32|torch|logits|[\d.e-]+", "", said)
    assert not re.search(r"[A-Za-z]{2,}", kept), said
    assert sorted(re.findall(r"\d+", said)) == sorted(re.findall(r"\d+", detail))
    assert words_for("en").detail(detail) == detail


def test_every_check_of_a_certificate_has_a_chinese_name() -> None:
    source = "".join(path.read_text(encoding="utf-8") for path in sorted(Path(verify.__file__).parent.glob("*.py")))
    named = set(re.findall(r'yield "([^"]+)", partial', source)) | {MASK_SHOWN}
    named |= {f"kernel: {name}" for name in re.findall(r'Case\(\s*"([^"]+)"', source)}
    assert named and all(words_for("zh").data(name) != name for name in named), named


def test_chinese_sentences_have_no_gaps_and_lists_their_own_comma() -> None:
    words = words_for("zh")
    assert (
        words("wins_unclear", fast="全参数、LoRA", time="1 ms", small="QLoRA + 梯度检查点", memory="3 MB").count(
            "点占用"
        )
        == 1
    )
    assert words.environment("cpu · usable_cores", "2") == ("cpu · 可用核数", "2")


@pytest.mark.parametrize(
    ("set_", "language"),
    [({"LANG": "zh_CN.UTF-8"}, "zh"), ({"LANG": "zh_CN.UTF-8", "LC_ALL": "C.UTF-8"}, "en"), ({}, "en")],
)
def test_auto_is_the_language_of_the_locale(
    set_: dict[str, str], language: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("LC_ALL", "LC_MESSAGES", "LANG"):
        monkeypatch.delenv(name, raising=False)
    for name, value in set_.items():
        monkeypatch.setenv(name, value)
    assert words_for("auto").language == language


def test_a_run_that_was_stopped_says_so(tuned: Path) -> None:
    """It read as finished: "training loss 1.000 after 3 steps"."""
    write_json_atomic(tuned / "run.json", {**read_json(tuned / "run.json"), "status": "interrupted"})
    files = write_report([tuned])
    assert files.headline == "tuned: training loss 1.000 at step 3: stopped before its end."
    assert "state <b>stopped before its end</b>" in files.html.read_text(encoding="utf-8")
    assert write_report([tuned], language="zh").headline == "tuned：第 3 步的训练损失 1.000，在结束之前停下。"


def test_certificates_of_several_runs_say_whose_they_are(tuned: Path, tmp_path: Path) -> None:
    """Two tables had the same heading."""
    write_json_atomic(tuned / "certificate.json", {"checks": [{"name": "mask shown", "passed": True}]})
    other = tmp_path / "other"
    shutil.copytree(tuned, other)
    files = write_report([tuned, other])
    page, markdown = (path.read_text(encoding="utf-8") for path in (files.html, files.markdown))
    for name in ("train", "other"):
        assert f"<h2>Certificate: {name}</h2>" in page and f"## Certificate: {name}" in markdown
    assert "<h2>Certificate</h2>" in write_report([tuned]).html.read_text(encoding="utf-8")


def test_an_accuracy_comes_with_its_interval_and_memory_with_its_unit(train_run: Path) -> None:
    (train_run / "evaluations").mkdir()
    accuracy = {"questions": "q.jsonl", "accuracy": 1.0, "low": 0.566, "high": 1.0, "num_right": 5, "num_questions": 5}
    write_json_atomic(train_run / "evaluations" / "quality.json", {"model": "x", "accuracy": accuracy})
    write_json_atomic(train_run / "environment.json", {"memory_bytes": 25_276_502_016})
    page = write_report([train_run]).html.read_text(encoding="utf-8")
    assert "exact answers <b>100 % (5 of 5; 95 % interval 57 % to 100 %)</b>" in page
    assert "<dt>memory</dt><dd>25.3 GB</dd>" in page
