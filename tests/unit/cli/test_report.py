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
    console._console.cache_clear()
    assert main.run(["report", str(run.path)]) == 0
    console._console.cache_clear()
    out, err = capsys.readouterr()
    assert out == f"{run.path}/report.html\n"
    assert "training loss 1.500 after 2 steps" in err
    assert err.splitlines()[-1] == "Written (and as Markdown beside it, report.md). Open in a browser:"
