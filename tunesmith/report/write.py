"""Write a report: report.html and report.md from run directories."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tunesmith.errors import RunDirError
from tunesmith.report.content import gather
from tunesmith.report.html import render_page
from tunesmith.report.load import read_runs
from tunesmith.report.markdown import render_markdown
from tunesmith.report.strings import words_for
from tunesmith.rundir.io import write_text_atomic


@dataclass(frozen=True)
class ReportFiles:
    """Where the report is, and its headline."""

    html: Path
    markdown: Path
    headline: str
    sentences: tuple[str, ...]


def write_report(runs: Sequence[Path | str], output: Path | None = None, language: str = "en") -> ReportFiles:
    """One self-contained page and a Markdown file on these runs.

    Args: `output`: a folder, or the name of the HTML file; None: the folder of the first run.
    Raises: RunDirError for a run that can't be read; RecipeError for a language that is not there.
    """
    if not runs:
        raise RunDirError("a report needs at least one run directory; make one with: tunesmith bench train RECIPE")
    paths = [Path(run) for run in runs]
    content = gather(read_runs(paths), words_for(language))
    page = _page_path(paths[0], output)
    page.parent.mkdir(parents=True, exist_ok=True)
    files = ReportFiles(
        page, page.with_suffix(".md"), content.headline, tuple(sentence.text for sentence in content.sentences)
    )
    write_text_atomic(files.html, render_page(content))
    write_text_atomic(files.markdown, render_markdown(content))
    return files


def _page_path(first: Path, output: Path | None) -> Path:
    if output is None:
        return (first if first.is_dir() else first.parent) / "report.html"
    return output if output.suffix in (".html", ".htm") else output / "report.html"
