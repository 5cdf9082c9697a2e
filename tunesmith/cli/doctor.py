"""`tunesmith doctor`: is this machine ready? Exit code 1 when something must be mended."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

import typer
from rich.table import Table
from rich.text import Text

from tunesmith.cli.console import emit, err, print_table
from tunesmith.parallel.deepspeed_install import deepspeed_findings
from tunesmith.watch.doctor import Finding, check_up, has_errors

app = typer.Typer(add_completion=False)
_MARKS = {
    "ok": ("ok", "green"),
    "note": ("note", "cyan"),
    "warning": ("warning", "yellow"),
    "error": ("ERROR", "bold red"),
}


@app.command()
def doctor() -> int:
    """Look at driver, torch, compiler, memory, disk and packages; name the command that mends each lack."""
    findings = check_up()
    findings += deepspeed_findings(with_cuda=any(finding.name == "cuda" for finding in findings))
    show(findings)
    levels = [finding.level for finding in findings]
    emit(
        {
            "ready": not has_errors(findings),
            "errors": levels.count("error"),
            "warnings": levels.count("warning"),
            "findings": [asdict(finding) for finding in findings],
        }
    )
    return int(has_errors(findings))


def show(findings: Sequence[Finding]) -> None:
    """Print findings as a table on stderr, and the verdict."""
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")  # a command to copy is never cut
    for finding in findings:
        mark, style = _MARKS[finding.level]
        table.add_row(Text(mark, style=style), finding.name, Text(finding.detail))
        if finding.mend is not None:
            table.add_row("", "", Text(f"mend: {finding.mend}", style="bold" if finding.level != "note" else "dim"))
    print_table(table, [f"mend: {finding.mend}" for finding in findings if finding.mend is not None])
    err.print(verdict(findings), markup=False)


def verdict(findings: Sequence[Finding]) -> str:
    """One sentence about the whole."""
    if has_errors(list(findings)):
        names = ", ".join(finding.name for finding in findings if finding.level == "error")
        return f"Not ready: mend {names}."
    return "Ready."
