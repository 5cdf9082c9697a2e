"""The plots of serving runs: a number against the load, a line for each server and percentile."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tunesmith.report.plots import HALF
from tunesmith.report.style import MUTED, SERIES, canvas, to_svg


@dataclass(frozen=True)
class Line:
    """A line of a plot. points: (which load, value); dashed lines are the tails."""

    label: str
    series: int
    points: tuple[tuple[int, float], ...]
    is_dashed: bool = False


def load_plot(
    lines: Sequence[Line],
    ticks: Sequence[str],
    *,
    title: str,
    axis: str,
    show: Callable[[float], str],
    is_log: bool,
    key: str,
) -> str | None:
    """Values over loads that stand side by side, whatever their distance; None where nothing was measured."""
    shown = [line for line in lines if line.points]
    if not shown:
        return None
    with canvas(HALF, 280) as (figure, axes):
        for line in shown:
            _line(axes, line)
        _frame(axes, ticks, axis, show, is_log and all(y > 0 for line in shown for _, y in line.points))
        text = "; ".join(f"{ticks[x]}: {line.label} {show(y)}" for line in shown for x, y in line.points)
        return to_svg(figure, title=title, description=text, key=key)


def _line(axes: Any, line: Line) -> None:
    xs, ys = zip(*line.points, strict=True)
    style: Any = (0, (4, 3)) if line.is_dashed else "solid"
    axes.plot(xs, ys, color=SERIES[line.series % len(SERIES)], linestyle=style, marker="o", markersize=5)
    note = {"xytext": (7, 0), "textcoords": "offset points", "va": "center", "annotation_clip": False}
    axes.annotate(line.label.replace("$", r"\$")[-24:], (xs[-1], ys[-1]), color=MUTED, fontsize=11, **note)


def _frame(axes: Any, ticks: Sequence[str], axis: str, show: Callable[[float], str], is_log: bool) -> None:
    if is_log:
        axes.set_yscale("log")
        axes.tick_params(which="minor", length=0, labelleft=False)
    else:
        axes.set_ylim(bottom=0)
    axes.set_xticks(range(len(ticks)), list(ticks))
    axes.yaxis.set_major_formatter(lambda value, _: show(value) if value > 0 else "0")
    axes.grid(axis="y")
    axes.set_axisbelow(True)
    axes.spines["left"].set_visible(False)
    axes.set_xlabel(axis, loc="right")
