"""`tunesmith bench train RECIPE`: a matrix of methods, measured in equal conditions."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tunesmith.cli import console

if TYPE_CHECKING:
    from tunesmith.bench.matrix import BenchResult

app = typer.Typer(add_completion=False, no_args_is_help=True)


@app.callback()
def bench() -> None:
    """Measure a matrix of recipes: every cell in a fresh process, repeats in shuffled order."""


@app.command()
def train(
    recipe: Annotated[Path, typer.Argument(help="the recipe; its bench section says how many steps and repeats")],
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="KEY=VALUE over the recipe, such as bench.repeats=3")
    ] = None,
    matrix: Annotated[str | None, typer.Option(help="methods, ladder or grid; else the recipe's")] = None,
    only: Annotated[str | None, typer.Option(help="cells to run, separated by spaces: --only 'full lora'")] = None,
    output: Annotated[Path | None, typer.Option(help="the run directory (new or empty)")] = None,
    report: Annotated[bool, typer.Option(help="write report.html into the run directory")] = True,
    language: Annotated[str, typer.Option(help="the report's language: en or zh")] = "en",
) -> int:
    """Train every cell of a matrix for a few steps: time, memory by owner, losses, one JSON per cell.

    Exit codes: 0 at least one cell was measured, 1 none was.
    """
    from tunesmith.bench.display import BenchDisplay
    from tunesmith.bench.matrix import bench as run_bench
    from tunesmith.recipe.load import load_recipe
    from tunesmith.report.strings import words_for

    words_for(language)
    loaded = load_recipe(recipe, overrides or [])
    with BenchDisplay(console.err) as display:
        result = run_bench(
            loaded,
            matrix,
            only=split_names(only),
            run_dir=output,
            command=_command(recipe, overrides or [], matrix),
            progress=display,
        )
    page = _report(result, language) if report else None
    facts = {"run_dir": result.run_dir, "cells": len(result.cells), "ok": result.num_ok, "report": page}
    console.emit(facts)
    return 0 if result.num_ok else 1


def split_names(only: str | None) -> list[str]:
    """The names of --only: separated by spaces, or by commas where no name of a grid cell can hold one."""
    if not only:
        return []
    return only.split() if "=" in only else only.replace(",", " ").split()


def _command(recipe: Path, overrides: list[str], matrix: str | None) -> str:
    """What was typed, without what chooses cells and folders."""
    words = ["tunesmith", "bench", "train", str(recipe)]
    words += [word for override in overrides for word in ("--set", override)]
    return shlex.join([*words, "--matrix", matrix] if matrix else words)


def _report(result: BenchResult, language: str) -> Path:
    from rich.markup import escape

    from tunesmith.report.write import write_report

    files = write_report([result.run_dir], language=language)
    console.err.print(f"\n[bold]{escape(files.headline)}[/bold]")
    for sentence in files.sentences:
        console.err.print(f"  {escape(sentence)}")
    console.out.print(str(files.html), markup=False)
    return files.html
