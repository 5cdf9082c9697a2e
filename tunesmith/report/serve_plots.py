"""The plots of serving runs: a number against the load, a line for each server and percentile."""

from __future__ import annotations

import math
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


def log_ticks(low: float, high: float) -> list[float]:
    """Round numbers for a logarithmic axis, from the last below `low` to the first above `high`: two at least.

    Steps of 1, 2, 5 in a decade; of 1 where those are fewer than three; of 1, 10, 100 where they are more than seven.
    """
    for steps, fewest in (((1, 2, 5), 3), ((1, 2, 3, 4, 5, 6, 7, 8, 9), 2), ((1,), 2)):
        decades = range(math.floor(math.log10(low)) - 1, math.floor(math.log10(high)) + 2)
        known = [step * 10.0**decade for decade in decades for step in steps]
        first = max(i for i, value in enumerate(known) if value <= low * (1 + 1e-9))
        last = min(i for i, value in enumerate(known) if value >= high * (1 - 1e-9))
        found = known[first : max(last, first + 1) + 1]
        if fewest <= len(found) <= 7:
            return found
    return found


def _frame(axes: Any, ticks: Sequence[str], axis: str, show: Callable[[float], str], is_log: bool) -> None:
    if is_log:
        axes.set_yscale("log")
        drawn = [y for line in axes.get_lines() for y in line.get_ydata()]
        ticks_y = log_ticks(min(drawn), max(drawn))
        axes.set_ylim(min(ticks_y[0], min(drawn) / 1.1), max(ticks_y[-1], max(drawn) * 1.1))
        axes.set_yticks(ticks_y)
        axes.tick_params(which="minor", length=0, labelleft=False)
    else:
        axes.set_ylim(bottom=0)
    axes.set_xticks(range(len(ticks)), list(ticks))
    axes.yaxis.set_major_formatter(lambda value, _: show(value) if value > 0 else "0")
    axes.grid(axis="y")
    axes.set_axisbelow(True)
    axes.spines["left"].set_visible(False)
    axes.set_xlabel(axis, loc="right")
