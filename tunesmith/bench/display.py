"""What a person watching a bench sees on stderr: one line for each cell."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.text import Text

from tunesmith.bench.matrix import Event
from tunesmith.bench.statistics import estimate
from tunesmith.units import format_bytes, format_count, format_seconds


class BenchDisplay:
    """A line for each cell that has ended, and a spinner for the one that runs (on a terminal only)."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True, highlight=False)
        columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
        self._progress = Progress(*columns, console=self.console, transient=True, disable=not self.console.is_terminal)
        self._task: TaskID | None = None

    def __enter__(self) -> BenchDisplay:
        self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._progress.stop()

    def __call__(self, event: Event) -> None:
        """A cell began or ended."""
        if event.cell is None:
            title = f"{event.position + 1}/{event.count}  {event.plan.label}"
            self._task = self._progress.add_task(title, total=None)
            return
        if self._task is not None:
            self._progress.remove_task(self._task)
        self.console.print(cell_line(event))


def cell_line(event: Event) -> Text:
    """One line about a cell that has ended."""
    cell = event.cell or {}
    ok = cell.get("status") == "ok"
    line = Text("✓ " if ok else "✗ ", style="green" if ok else "red")
    line.append(f"{event.position + 1:>2}/{event.count}  ", style="dim")
    line.append(f"{event.plan.label:<24}", style="bold" if ok else "red")
    line.append(_facts(cell) if ok else f"{cell.get('status', '?')}: {cell.get('reason') or ''}", style="default")
    return line


def _facts(cell: Mapping[str, Any]) -> str:
    step = estimate([cell["times"]["steps_s"]])
    parts = [f"{format_seconds(step.median)} per step" if step else ""]
    parts.append(f"{format_count(cell['throughput']['tokens_per_s'])} tokens/s")
    memory = cell["memory"]
    if memory["allocated_peak_bytes"] is not None:
        parts.append(f"{format_bytes(memory['allocated_peak_bytes'])} allocated")
    parts.append(f"{format_bytes(memory['resident_peak_bytes'])} resident")
    if cell["losses"]["validation"] is not None:
        parts.append(f"validation loss {cell['losses']['validation']:.4f}")
    return "  ".join(part for part in parts if part)
