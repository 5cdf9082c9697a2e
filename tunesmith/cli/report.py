"""`tunesmith report RUN...`: one page from run directories."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tunesmith.cli import console

app = typer.Typer(add_completion=False)


@app.command()
def report(
    runs: Annotated[
        list[Path], typer.Argument(help="run directories (of train, bench, profile), or the JSON files of evaluations")
    ],
    output: Annotated[Path | None, typer.Option(help="a folder, or the HTML file; else the first run's folder")] = None,
    language: Annotated[str, typer.Option(help="the page's language: en, zh; auto: of your locale")] = "auto",
) -> None:
    """Write report.html (self-contained) and report.md from the JSON of run directories, and from nothing else."""
    from rich.markup import escape

    from tunesmith.report.write import write_report

    files = write_report(runs, output, language)
    console.err.print(f"[bold]{escape(files.headline)}[/bold]")
    for sentence in files.sentences:
        console.err.print(f"  {escape(sentence)}")
    console.err.print(f"Written (and as Markdown beside it, {files.markdown.name}). Open in a browser:", markup=False)
    console.out.print(str(files.html), markup=False)
    console.emit({"html": files.html, "markdown": files.markdown, "verdict": files.headline})
