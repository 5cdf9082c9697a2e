"""The part of a report that a scaling run makes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from tunesmith.errors import RunDirError
from tunesmith.report.load import read_run
from tunesmith.report.scale import scale_head, scale_of, scale_rows
from tunesmith.report.strings import words_for
from tunesmith.report.write import write_report
from tunesmith.rundir.io import read_json, write_json_atomic


def _point(gpus: int, step_s: float, efficiency: float, exposed_s: float) -> dict[str, Any]:
    parts = {"exposed_s": exposed_s, "data_s": 0.0, "optimizer_s": 0.1}
    return {
        "gpus": gpus,
        "step_s": step_s,
        "tokens_per_s": gpus * 1000 * efficiency,
        "efficiency_ratio": efficiency,
        "parts": {**parts, "compute_s": step_s - sum(parts.values())},
    }


def _cell(gpus: int, **changes: Any) -> dict[str, Any]:
    summary = {
        "device": {"type": "cuda", "name": "A chip"},
        "memory": {"allocated_peak_bytes": 40e9},
        "states": {
            "measured": {"total_bytes": 30.3e9},
            "formula": {"total_bytes": 30e9},
            "difference_percent": 1.0,
        },
    }
    cell = {"mode": "weak", "gpus": gpus, "name": f"weak-{gpus}", "status": "ok", "summary": summary}
    return {"schema_version": 1, "command": f"tunesmith bench scale x.yaml --gpus {gpus}", **cell, **changes}


def test_a_batch_that_did_not_grow_is_told(scale_run: Path) -> None:
    """Twelve documents on two processes were "85.8 % of ideal (weak)": both had all of them in every step."""
    for gpus, tokens in ((1, 276), (4, 276)):
        file = scale_run / "cells" / f"weak-{gpus}-0.json"
        cell = read_json(file)
        write_json_atomic(file, {**cell, "summary": {**cell["summary"], "tokens_per_step": tokens}})
    files = write_report([scale_run])
    assert any(
        text.startswith("With 4 a step had 276 tokens instead of 1,104, so this is no weak scaling")
        for text in files.sentences
    )
    assert "instead of" not in " ".join(text for text in files.sentences if text.startswith("With 1 "))


@pytest.fixture
def scale_run(tmp_path: Path) -> Path:
    """One and four GPUs measured, eight projected, two out of memory."""
    path = tmp_path / "scale"
    (path / "cells").mkdir(parents=True)
    info = {"schema_version": 1, "kind": "scale", "status": "finished", "name": "grow", "tunesmith_version": "0"}
    write_json_atomic(path / "run.json", {**info, "created_at": "2026-01-02T03:04:05+00:00", "facts": {}})
    failed = _cell(2, status="out_of_memory", reason="process 1: no room <b>", summary=None)
    for cell in (_cell(1), failed, _cell(4)):
        write_json_atomic(path / "cells" / f"{cell['name']}-0.json", cell)
    points = [_point(1, 1.0, 1.0, 0.0), _point(4, 1.25, 0.8, 0.2)]
    limit = {
        "limit": "communication",
        "lost_s": 0.2,
        "gpus": 4,
        "from_gpus": 1,
        "efficiency_ratio": 0.8,
        "step_s": 1.25,
    }
    ahead = {"gpus": 8, "step_s": 2.0, "tokens_per_s": 4000.0, "efficiency_ratio": 0.5, "is_projected": True}
    fitted = {"hidden_ratio": 0.75, "error_ratio": 0.02, "points": [ahead]}
    scaling = {
        "schema_version": 1,
        "curves": {"weak": points},
        "limits": {"weak": limit},
        "projection": {"nodes": 2, "modes": {"weak": fitted}},
    }
    write_json_atomic(path / "scaling.json", scaling)
    return path


def test_the_limit_is_one_line_and_the_headline(scale_run: Path) -> None:
    files = write_report([scale_run])
    assert files.headline == (
        "4 GPUs: 3.2 k tokens/s, 80.0 % of ideal against 1 (weak scaling). What limits: communication that nothing "
        "hides, 200 ms more of a step of 1.25 s."
    )
    assert "Model states of a process differ from the formula by 1.00 % at most." in files.sentences
    assert any("8 GPUs on 2 nodes" in text and "75 %" in text and "2.0 %" in text for text in files.sentences)
    assert any(text.startswith("weak-2: out of memory") for text in files.sentences)


def test_every_row_has_its_columns(scale_run: Path) -> None:
    words = words_for("en")
    scale = scale_of(read_run(scale_run), words)
    rows = scale_rows(scale, words)
    assert {len(row) for row in rows} == {len(scale_head(scale, words))}
    assert [row[0] for row in rows] == ["1, weak", "4, weak", "8, weak (projected)"]
    assert rows[1][1:9] == ("1.25 s", "3,200", "800", "80.0 %", "76.0 %", "16.0 %", "8.0 %", "0.0 %")
    assert rows[1][9:] == ("40 GB", "30.3 GB", "30 GB", "+1.00 %")
    assert set(rows[2][5:]) == {"–"}


@pytest.mark.parametrize("language", ["en", "zh"])
def test_page_and_markdown(scale_run: Path, language: str) -> None:
    files = write_report([scale_run], language=language)
    page, text = files.html.read_text(encoding="utf-8"), files.markdown.read_text(encoding="utf-8")
    plots = re.findall(r'<svg class="plot".*?</svg>', page, flags=re.DOTALL)
    assert len(plots) == 2
    assert "stroke-dasharray" in plots[0]  # what is projected
    assert "no room &lt;b&gt;" in page
    assert "<b>" not in page
    assert len(re.findall(r"^\| \d", text, flags=re.MULTILINE)) == 3
    assert "tunesmith bench scale x.yaml --gpus 4" in text


def test_processes_of_a_cpu_are_called_so(scale_run: Path) -> None:
    cell = _cell(1)
    cell["summary"]["device"]["type"] = "cpu"
    write_json_atomic(scale_run / "cells" / "weak-1-0.json", cell)
    assert "4 CPU processes" in write_report([scale_run]).headline


def test_states_far_from_the_formula_are_a_warning(scale_run: Path) -> None:
    cell = _cell(4)
    cell["summary"]["states"]["difference_percent"] = -7.5
    write_json_atomic(scale_run / "cells" / "weak-4-0.json", cell)
    scale = scale_of(read_run(scale_run), words_for("en"))
    assert [sentence.kind for sentence in scale.sentences if "7.50 %" in sentence.text] == ["warning"]


def test_a_run_that_did_not_finish_is_still_a_report(scale_run: Path) -> None:
    (scale_run / "scaling.json").unlink()
    assert "weak-2" in write_report([scale_run]).markdown.read_text(encoding="utf-8")


def test_curves_of_a_newer_version_are_refused(scale_run: Path) -> None:
    write_json_atomic(scale_run / "scaling.json", {"schema_version": 99})
    with pytest.raises(RunDirError, match="version 99"):
        write_report([scale_run])
