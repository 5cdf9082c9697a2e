"""The plots of a scaling run: speed against GPUs with the ideal line, and where a step's time goes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tunesmith.report.plots import BAR, HALF
from tunesmith.report.scale import MODES, PARTS, Point, Scale
from tunesmith.report.strings import Words
from tunesmith.report.style import INK, MUTED, PAPER, RULE, SERIES, canvas, to_svg
from tunesmith.units import format_count, format_seconds

MODE_SERIES = {"weak": 1, "strong": 3}
PART_SERIES = {"compute": 1, "exposed": 3, "optimizer": 5, "data": 4}


def curve_plot(scale: Scale, words: Words, key: str) -> str | None:
    """Tokens per second against GPUs, both doubling; the ideal line is thin, what is projected dashed."""
    shown = [mode for mode in MODES if scale.curve(mode, projected=False)]
    if len({point.gpus for point in scale.points}) < 2:
        return None
    with canvas(HALF, 300) as (figure, axes):
        for mode in shown:
            _curve(axes, scale, mode, words)
        _frame(axes, sorted({point.gpus for point in scale.points}), scale.unit, words)
        text = "; ".join(f"{p.gpus}: {format_count(p.tokens_per_s)}/s" for p in scale.points)
        return to_svg(figure, title=words("scale_curve"), description=text, key=key)


def _curve(axes: Any, scale: Scale, mode: str, words: Words) -> None:
    colour = SERIES[MODE_SERIES[mode]]
    measured, ahead = (scale.curve(mode, projected=projected) for projected in (False, True))
    first, most = measured[0], max(point.gpus for point in (*measured, *ahead))
    ideal = first.tokens_per_s / first.gpus
    axes.plot((first.gpus, most), (ideal * first.gpus, ideal * most), color=RULE, linewidth=1.4, zorder=1)
    axes.plot(*_xy(measured), color=colour, marker="o", zorder=3)
    if ahead:
        axes.plot(*_xy([measured[-1], *ahead]), color=colour, linestyle=(0, (4, 3)), zorder=2)
        axes.plot(*_xy(ahead), color=colour, marker="o", markerfacecolor=PAPER, linestyle="none", zorder=3)
    last = (ahead or measured)[-1]
    note = {"xytext": (8, 0), "textcoords": "offset points", "va": "center", "annotation_clip": False}
    axes.annotate(words(f"mode_{mode}"), (last.gpus, last.tokens_per_s), color=colour, **note)


def _xy(points: Sequence[Point]) -> tuple[list[int], list[float]]:
    return [point.gpus for point in points], [point.tokens_per_s for point in points]


def _frame(axes: Any, counts: Sequence[int], unit: str, words: Words) -> None:
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.tick_params(which="minor", length=0)
    axes.yaxis.set_major_formatter(lambda value, _: format_count(value))
    axes.grid(axis="y")
    axes.set_axisbelow(True)
    axes.spines["left"].set_visible(False)
    axes.set_xlabel(unit, loc="right")
    axes.set_title(words("tokens_per_s"), loc="left", fontsize=13, color=MUTED, pad=10)


def parts_plot(scale: Scale, words: Words, key: str) -> str | None:
    """A bar for every measured point: compute, exposed communication, optimiser and data of a step."""
    shown = [point for mode in MODES for point in scale.curve(mode, projected=False)]
    if not shown:
        return None
    with canvas(HALF, max(120, 24 + 34 * len(shown))) as (figure, axes):
        for y, point in enumerate(shown):
            left = 0.0
            for name in PARTS:
                width = point.parts[name]
                axes.barh(y, width, BAR, left=left, color=SERIES[PART_SERIES[name]], edgecolor=PAPER, linewidth=1)
                left += width
            note = {"xytext": (7, 0), "textcoords": "offset points", "va": "center", "color": INK}
            axes.annotate(format_seconds(point.step_s), (left, y), **note)
        labels = [f"{point.gpus}, {words(f'mode_{point.mode}')}" for point in shown]
        axes.set_yticks(range(len(shown)), labels)
        axes.tick_params(axis="y", labelcolor=INK)
        axes.set_ylim(len(shown) - 0.5, -0.5)
        axes.set_xlim(0, max(point.step_s for point in shown) * 1.02)
        axes.set_xticks([])
        axes.spines["bottom"].set_visible(False)
        text = "; ".join(f"{label}: {_spoken(p, words)}" for label, p in zip(labels, shown, strict=True))
        return to_svg(figure, title=words("scale_parts"), description=text, key=key)


def _spoken(point: Point, words: Words) -> str:
    return ", ".join(f"{words(f'part_{name}')} {format_seconds(point.parts[name])}" for name in PARTS)
