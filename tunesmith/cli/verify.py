"""`tunesmith verify RECIPE.yaml`: the correctness certificate of a recipe on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tunesmith.cli import console

if TYPE_CHECKING:
    from rich.table import Table

    from tunesmith.verify.certificate import Certificate
    from tunesmith.verify.check import Check

app = typer.Typer(add_completion=False)


@app.command()
def verify(
    target: Annotated[str, typer.Argument(metavar="RECIPE.yaml | RUN", help="a recipe, or a run directory's recipe")],
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="KEY=VALUE over the recipe, such as method.kind=qlora")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="only what every training run checks at its start")] = False,
) -> int:
    """Check that a run of a recipe computes what it should, on this machine.

    A run directory gets the certificate written into it. Exit codes: 0 every check passed, 1 one failed.
    """
    from tunesmith.recipe.load import load_recipe
    from tunesmith.rundir.layout import is_run, open_run
    from tunesmith.verify.certificate import certify

    run = open_run(target) if is_run(Path(target)) else None
    recipe = load_recipe(run.recipe if run is not None else target, overrides or [])
    certificate = certify(recipe, full=not quick, run_dir=None if run is None else run.path)
    console.err.print(certificate_table(certificate))
    console.err.print(_closing_line(certificate))
    console.emit(certificate.to_dict())
    return 0 if certificate.passed else 1


def certificate_table(certificate: Certificate) -> Table:
    """The certificate for people."""
    from rich.table import Table

    table = Table(
        title=f"Certificate on {certificate.chip}, torch {certificate.versions['torch']}", title_justify="left"
    )
    for name in ("check", "", "value", "limit", "time"):
        table.add_column(name, justify="right" if name in ("value", "limit", "time") else "left", no_wrap=True)
    table.add_column("detail", overflow="fold")
    for check in certificate.checks:
        table.add_row(*_cells(check))
    for name, reason in certificate.skipped.items():
        table.add_row(name, "[dim]–[/dim]", "", "", "", f"[dim]{reason}[/dim]")
    return table


def _cells(check: Check) -> tuple[str, ...]:
    from rich.markup import escape

    from tunesmith.units import format_seconds

    verdict = "[green]passed[/green]" if check.passed else "[bold red]FAILED[/bold red]"
    numbers = ("" if number is None else f"{number:.3g}" for number in (check.value, check.limit))
    return (check.name, verdict, *numbers, format_seconds(check.duration_s), escape(check.detail))


def _closing_line(certificate: Certificate) -> str:
    from tunesmith.units import format_seconds

    failed = [check.name for check in certificate.checks if not check.passed]
    if failed:
        return f"[bold red]{len(failed)} of {len(certificate.checks)} checks failed: {', '.join(failed)}[/bold red]"
    when = "kept from an earlier run" if certificate.cached else f"in {format_seconds(certificate.duration_s)}"
    return f"[green]all {len(certificate.checks)} checks passed[/green] ({when})"
