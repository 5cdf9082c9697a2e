"""`tunesmith report`: what is said on the way."""

from __future__ import annotations

from pathlib import Path

import pytest

from tunesmith.cli import console, main
from tunesmith.recipe.schema import Recipe
from tunesmith.rundir.layout import create_run


def test_where_the_page_is_and_what_to_do_with_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The path is alone on stdout, for programs; people are told what it is."""
    run = create_run(Recipe(), path=tmp_path / "run")
    (run.metrics).write_text('{"event": "step", "step": 2, "loss": 1.5}\n', encoding="utf-8")
    run.set_status("finished")
    console._console.cache_clear()
    assert main.run(["report", str(run.path)]) == 0
    console._console.cache_clear()
    out, err = capsys.readouterr()
    assert out == f"{run.path}/report.html\n"
    assert "training loss 1.500 after 2 steps" in err
    assert err.splitlines()[-1] == "Written (and as Markdown beside it, report.md). Open in a browser:"


def test_a_file_that_is_no_evaluation_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It wrote a page that said nothing, beside the file."""
    (tmp_path / "mine.json").write_text('[{"question": "?", "answer": "!"}]', encoding="utf-8")
    assert main.run(["report", str(tmp_path / "mine.json")]) == 2
    assert "mine.json is no evaluation" in capsys.readouterr().err
    assert not (tmp_path / "report.html").exists()
