"""The part of a report that serving runs make, from cells made by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tunesmith.report.load import read_run, read_runs
from tunesmith.report.serve import loads_of, serve_sections
from tunesmith.report.serve_plots import log_ticks
from tunesmith.report.strings import words_for
from tunesmith.report.write import write_report
from tunesmith.rundir.io import write_json_atomic

EN = words_for("en")


def _cell(value: float | None, tokens: float, ttft: float, good: float | None = None, **changes: Any) -> dict[str, Any]:
    spread = {"count": 3, "mean": ttft, "p50": ttft, "p90": ttft, "p95": ttft, "p99": 2 * ttft, "max": 2 * ttft}
    measures = {
        "output_tokens_per_s": tokens,
        "requests_per_s": tokens / 10,
        "ttft_s": spread,
        "tpot_s": {**spread, "p50": 0.01},
        "errors": changes.pop("errors", {}),
        "goodput": {
            "objectives": {"ttft": 0.2} if good is not None else {},
            "good_ratio": good,
            "requests_per_s": good,
        },
    }
    cell = {
        "schema_version": 1,
        "status": "ok",
        "point": {"mode": "open", "value": value},
        "command": "tunesmith bench serve x",
    }
    client = {"saturated": changes.pop("saturated", None)}
    return {**cell, "measures": measures, "client": client, "notes": ["3 requests were left out"], **changes}


@pytest.fixture
def serve_run(tmp_path: Path) -> Any:
    def make(name: str, *cells: dict[str, Any]) -> Path:
        path = tmp_path / name
        (path / "cells").mkdir(parents=True)
        info = {"schema_version": 1, "kind": "serve", "status": "finished", "name": name, "tunesmith_version": "0"}
        write_json_atomic(path / "run.json", {**info, "created_at": "2026-01-02T03:04:05+00:00", "facts": {}})
        for number, cell in enumerate(cells):
            write_json_atomic(path / "cells" / f"{number}.json", cell)
        return path

    return make


def test_answers_that_came_whole_are_told(serve_run: Any) -> None:
    cell = _cell(2, 20, 0.1)
    cell["measures"] |= {"answers_whole": 11, "completed": 16, "tpot_s": {"count": 0, "p50": None}}
    files = write_report([serve_run("a", cell)])
    assert "11 of 16 answers came whole, faster than they were read" in files.sentences[0]
    assert files.headline.endswith("time per token p50 –.")


def test_loads_are_medians_of_their_repeats_and_all_at_once_is_last(serve_run: Any) -> None:
    path = serve_run("a", _cell(None, 90, 1.0), _cell(4, 40, 0.1), _cell(4, 60, 0.3), _cell(2, 20, 0.1))
    loads = loads_of(read_run(path), EN)
    assert [load.label for load in loads] == ["2 requests/s", "4 requests/s", "all at once"]
    assert loads[1].numbers["output_tokens_per_s"] == 50
    assert loads[1].numbers["ttft_s.p50"] == pytest.approx(0.2)


def test_what_a_reader_is_told(serve_run: Any) -> None:
    mine = serve_run("ours", _cell(2, 30, 0.1, 1.0), _cell(8, 90, 0.4, 0.5, errors={"<b>full</b>": 3}))
    other = serve_run("other", _cell(2, 20, 0.2, 1.0), _cell(8, 60, 0.8, 0.2, saturated="its core was busy"))
    (section,) = serve_sections(read_runs([mine, other]), EN)
    texts = [sentence.text for sentence in section.sentences]
    assert texts[0].startswith("ours against other (8 requests/s): 1.50× the output tokens/s, 0.50× the TTFT")
    assert "ours: 100.0 % of answers are good at 2 requests/s, 1.00 good answers a second." in texts
    assert any("measured the client" in text for text in texts) and any("3 requests failed" in text for text in texts)
    assert len(section.figures) == 4 and "TTFT ≤ 200 ms" in section.note and "left out" in section.note
    page = write_report([mine, other]).html.read_text(encoding="utf-8")
    assert "<b>full</b>" not in page and "&lt;b&gt;full" in page


def test_a_load_without_an_answer(serve_run: Any) -> None:
    path = serve_run("a", _cell(2, 0, 0.1, status="failed", reason="nobody there", errors={"refused": 8}))
    (section,) = serve_sections([read_run(path)], EN)
    assert section.rows[0][:4] == ("a", "2 requests/s", "–", "–") and section.rows[0][-1] == "8"
    assert section.figures == ()
    assert write_report([path], language="zh").html.exists()


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0.0032, 0.0084, [0.002, 0.005, 0.01]),
        (0.066, 0.106, [0.05, 0.1, 0.2]),
        (0.0061, 0.0064, [0.006, 0.007]),
        (0.003, 4.0, [0.001, 0.01, 0.1, 1.0, 10.0]),
    ],
)
def test_a_logarithmic_axis_has_labels(low: float, high: float, ticks: list[float]) -> None:
    """The time per token had an axis without one label."""
    assert log_ticks(low, high) == pytest.approx(ticks)


def test_a_run_that_measured_nothing_says_so(serve_run: Any) -> None:
    """Its page was called "What it cost, what it gained"."""
    text = write_report([serve_run("a")]).markdown.read_text(encoding="utf-8")
    assert text.startswith("# Nothing was measured (the run: finished).")


def test_good_is_a_column_only_where_there_were_objectives(serve_run: Any) -> None:
    judged, free = serve_run("judged", _cell(2, 30, 0.1, 1.0)), serve_run("free", _cell(2, 30, 0.1))
    (with_slo,), (without,) = (serve_sections([read_run(path)], EN) for path in (judged, free))
    assert "good" in with_slo.head and "--slo" not in with_slo.note
    assert "good" not in without.head and "--slo" in without.note and len(without.rows[0]) == len(without.head)


def test_figures_of_two_kinds_of_load_are_told_apart(serve_run: Any) -> None:
    """Rates and requests in flight had figures of the same titles, one below the other."""
    flying = {"mode": "closed"}
    cells = [_cell(n, 20, 0.1) for n in (1, 2)]
    more = [_cell(n, 20, 0.1, point={**flying, "value": n}) for n in (1, 4)]
    (alone,) = serve_sections(read_runs([serve_run("a", *cells)]), EN)
    (both,) = serve_sections(read_runs([serve_run("b", *cells, *more)]), EN)
    assert alone.figures[0].title == "Time to the first token, p50 and p99"
    titles = [figure.title for figure in both.figures]
    assert len(set(titles)) == len(titles) == 6 and titles[0] == f"{alone.figures[0].title} (requests a second)"
