"""The part of a report that inference runs make, from a table made by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tunesmith.errors import RunDirError
from tunesmith.report.infer import infer_sections
from tunesmith.report.load import read_run
from tunesmith.report.strings import words_for
from tunesmith.report.write import write_report
from tunesmith.rundir.io import read_json, write_json_atomic


def _row(engine: str, rate: float | None, ratio: float | None = None, **changes: Any) -> dict[str, Any]:
    spread = {"median": rate, "min": rate, "max": rate, "count": 2}
    throughput = {"output_tokens_per_s": spread, "total_tokens_per_s": spread}
    row = {"engine": engine, "format": "bf16", "status": "ok", "reason": None, "short": 0, "weights_bytes": 2_000_000}
    ours = {} if ratio is None else {"throughput.output_tokens_per_s": ratio}
    return {**row, "measures": {} if rate is None else {"throughput": throughput}, "ours_is": ours, **changes}


def _run(path: Path, *rows: dict[str, Any], version: int = 1, busy: bool = False) -> Path:
    path.mkdir()
    info = {"schema_version": 1, "kind": "infer", "status": "finished", "name": "engines", "tunesmith_version": "0"}
    write_json_atomic(path / "run.json", {**info, "created_at": "2026-01-02T03:04:05+00:00", "facts": {}})
    key = {"chip": "A chip", "driver": None, "torch": "2.11", "commit": "abc"}
    machine = {"load_average": 3.0, "cores": 2, "is_busy": busy}
    table = {"schema_version": version, "key": key, "command": "tunesmith bench infer x", "machine": machine}
    write_json_atomic(path / "infer.json", {**table, "rows": list(rows)})
    return path


def test_engines_side_by_side(tmp_path: Path) -> None:
    failed = _row("slow", None, status="missing", reason="not <i>here</i>")
    path = _run(tmp_path / "run", _row("tunesmith", 2600.0), _row("vllm", 2000.0, 1.3), failed, busy=True)
    (section,) = infer_sections([read_run(path)], words_for("en"))
    assert section.rows[1][2:4] == ("2,000 (1.30×)", "2,000")
    assert section.rows[2][0].startswith("slow (missing") and set(section.rows[2][2:4]) == {"–"}
    texts = [sentence.text for sentence in section.sentences]
    assert texts[0] == "engines with bf16 weights: up to 2,600 output tokens/s; 1.30× as fast as the best other engine."
    assert texts[1] == "bf16, output tokens/s: tunesmith 2,600, vllm 2,000: 1.30× as fast."
    assert any("machine was busy" in text for text in texts) and "chip A chip" in section.note
    page = write_report([path]).html.read_text(encoding="utf-8")
    assert "<i>here</i>" not in page and "<svg" in page
    assert "2 MB" in write_report([path], language="zh").markdown.read_text(encoding="utf-8")


def test_cores_that_were_busy_are_said_not_the_minute_before(tmp_path: Path) -> None:
    """The load average held what had ended before the run; older runs have nothing else."""
    path = _run(tmp_path / "run", _row("tunesmith", 2600.0), busy=True)
    table = read_json(path / "infer.json")
    for machine, said in (({}, "load 3.0 on 2 cores"), ({"busy_cores": 1.4}, "load 1.4 on 2 cores")):
        write_json_atomic(path / "infer.json", {**table, "machine": {**table["machine"], **machine}})
        (section,) = infer_sections([read_run(path)], words_for("en"))
        assert any(said in sentence.text for sentence in section.sentences)


def test_marks_are_explained_where_they_are_and_only_there(tmp_path: Path) -> None:
    """There was a word about brackets where there were none, and two columns had the name weights."""
    alone = _run(tmp_path / "alone", _row("tunesmith", 2600.0))
    (section,) = infer_sections([read_run(alone)], words_for("en"))
    assert "brackets" not in section.note and "says why" not in section.note
    assert len(set(section.head)) == len(section.head)
    row = _row("tunesmith", 15.4)
    spread = {"median": 15.4, "min": 14.9, "max": 30.1, "count": 3}
    one = {"ttft_s": {**spread, "median": 0.5}, "tpot_s": {**spread, "median": 0.25}}
    row["measures"] = {"batch-1": {"output_tokens_per_s": spread, **one}, "batch-4": {"output_tokens_per_s": spread}}
    (section,) = infer_sections([read_run(_run(tmp_path / "many", row))], words_for("en"))
    assert "15.4 [14.9–30.1]" in section.rows[0] and "square brackets" in section.note
    assert section.sentences[0].text == (
        "engines with bf16 weights: up to 15.4 output tokens/s; one request: 250 ms a token."
    )


def test_a_newer_table_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunDirError, match="version 99"):
        read_run(_run(tmp_path / "run", version=99))


def test_a_chinese_page_says_what_was_measured_in_chinese(tmp_path: Path) -> None:
    """It began with "chip A chip, ..."."""
    (section,) = infer_sections([read_run(_run(tmp_path / "run", _row("tunesmith", 2600.0)))], words_for("zh"))
    assert section.note.startswith("芯片 A chip，torch 2.11，提交 abc。")
