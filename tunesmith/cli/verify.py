"""`tunesmith verify RECIPE.yaml`: the correctness certificate of a recipe on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tunesmith.cli import console

if TYPE_CHECKING:
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
    for line in certificate_lines(certificate):
        console.err.print(line)
    console.err.print(_closing_line(certificate))
    console.emit(certificate.to_dict())
    return 0 if certificate.passed else 1


def certificate_lines(certificate: Certificate) -> list[str]:
    """The certificate for people: for each check its verdict, what was measured with its limit, and what that is."""
    from rich.markup import escape

    width = max(len(name) for name in (*(check.name for check in certificate.checks), *certificate.skipped))
    lines = [f"Certificate on {escape(certificate.chip)}, torch {escape(certificate.versions['torch'])}"]
    for check in certificate.checks:
        lines += [
            f"[bold]{escape(check.name):<{width}}[/bold]  {_numbers(check)}",
            f"  [dim]{escape(check.detail)}[/dim]",
        ]
    lines += [
        f"[dim]{escape(name):<{width}}  left out: {escape(why)}[/dim]" for name, why in certificate.skipped.items()
    ]
    return lines


def _numbers(check: Check) -> str:
    from tunesmith.units import format_seconds

    verdict = "[green]passed[/green]" if check.passed else "[bold red]FAILED[/bold red]"
    value = "" if check.value is None else f"  {check.value:.3g}"
    limit = "" if check.limit is None else f" (at most {check.limit:.3g})"
    return f"{verdict}{value}{limit}, {format_seconds(check.duration_s)}"


def _closing_line(certificate: Certificate) -> str:
    from tunesmith.units import format_seconds

    failed = [check.name for check in certificate.checks if not check.passed]
    if failed:
        return f"[bold red]{len(failed)} of {len(certificate.checks)} checks failed: {', '.join(failed)}[/bold red]"
    when = "kept from an earlier run" if certificate.cached else f"in {format_seconds(certificate.duration_s)}"
    return f"[green]all {len(certificate.checks)} checks passed[/green] ({when})"
