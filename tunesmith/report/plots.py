"""The plots of a comparison, each an inline SVG, or None where nothing was measured for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tunesmith.report.load import Run
from tunesmith.report.rows import OWNERS, Row
from tunesmith.report.strings import Words
from tunesmith.report.style import INK, MUTED, OWNER_COLOURS, PAPER, RULE, SERIES, canvas, to_svg
from tunesmith.units import format_bytes, format_count, format_seconds

WIDE, HALF = 1016.0, 484.0  # pixels: the page's column, and half of it
BAR = 0.62


def colour_of(index: int) -> str:
    """The colour of the row at `index` of the matrix, the same in every plot."""
    return SERIES[index % len(SERIES)]


def memory_plot(rows: Sequence[Row], words: Words, key: str) -> str | None:
    """Stacked bytes by owner; a row whose owners were not counted has no bar."""
    shown = [row for row in rows if row.owners]
    if not shown:
        return None
    with canvas(WIDE, _height(len(shown))) as (figure, axes):
        for y, row in enumerate(shown):
            _stack(axes, y, row.owners or {})
        widest = max(sum((row.owners or {}).values()) for row in shown)
        for y, row in enumerate(shown):
            total = sum((row.owners or {}).values())
            _value(axes, total, y, format_bytes(total))
        _bars_frame(axes, [words.data(row.label) for row in shown], widest)
        text = "; ".join(f"{words.data(r.label)} {format_bytes(sum((r.owners or {}).values()))}" for r in shown)
        return to_svg(figure, title=words("memory"), description=text, key=key)


def _stack(axes: Any, y: int, owners: dict[str, float]) -> None:
    left = 0.0
    for owner in OWNERS:
        size = owners.get(owner, 0.0)
        axes.barh(y, size, BAR, left=left, color=OWNER_COLOURS[owner], edgecolor=PAPER, linewidth=1)
        left += size


def bar_plot(
    rows: Sequence[Row],
    words: Words,
    key: str,
    *,
    title: str,
    value: Callable[[Row], float | None],
    show: Callable[[float], str],
    interval: Callable[[Row], tuple[float, float] | None] = lambda row: None,
    width: float = HALF,
) -> str | None:
    """A bar for every row that has a value, with its interval where there is one."""
    shown = [(i, row, number) for i, row in enumerate(rows) if (number := value(row)) is not None]
    if not shown:
        return None
    spans = [interval(row) for _, row, _ in shown]
    widest = max(max(number, span[1] if span else 0.0) for (_, _, number), span in zip(shown, spans, strict=True))
    with canvas(width, _height(len(shown))) as (figure, axes):
        for y, ((index, _, number), span) in enumerate(zip(shown, spans, strict=True)):
            axes.barh(y, number, BAR, color=colour_of(index))
            if span is not None and span[1] > span[0]:
                axes.plot(span, (y, y), color=INK, linewidth=1.4)
            _value(axes, max(number, span[1] if span else 0.0), y, show(number))
        _bars_frame(axes, [words.data(row.label) for _, row, _ in shown], widest)
        text = "; ".join(f"{words.data(row.label)} {show(number)}" for _, row, number in shown)
        return to_svg(figure, title=title, description=text, key=key)


def _height(bars: int) -> float:
    return 12 + 34 * bars


def _value(axes: Any, x: float, y: int, text: str) -> None:
    axes.annotate(text, (x, y), xytext=(7, 0), textcoords="offset points", va="center", ha="left", color=INK)


def _bars_frame(axes: Any, labels: Sequence[str], widest: float) -> None:
    axes.set_yticks(range(len(labels)), [_clip(label) for label in labels])
    axes.tick_params(axis="y", labelcolor=INK)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.set_xlim(0, widest * 1.02 if widest else 1)
    axes.set_xticks([])
    axes.spines["bottom"].set_visible(False)
    axes.spines["left"].set_color(RULE)


def _clip(text: str, size: int = 34) -> str:
    """One line without what matplotlib would read as mathematics."""
    flat = " ".join(text.split()).replace("$", r"\$")
    return flat if len(flat) <= size else flat[: size - 1] + "…"


def time_plot(rows: Sequence[Row], words: Words, key: str) -> str | None:
    """Median time per step with its interval."""
    return bar_plot(
        rows,
        words,
        key,
        title=words("time"),
        value=lambda row: row.step_s.median if row.step_s else None,
        show=format_seconds,
        interval=lambda row: (row.step_s.low, row.step_s.high) if row.step_s else None,
    )


def throughput_plot(rows: Sequence[Row], words: Words, key: str) -> str | None:
    """Tokens per second."""
    return bar_plot(
        rows,
        words,
        key,
        title=words("throughput"),
        value=lambda row: row.tokens_per_s,
        show=lambda number: f"{format_count(number)}/s",
    )


def resident_plot(rows: Sequence[Row], words: Words, key: str) -> str | None:
    """The high-water mark of the process."""
    return bar_plot(
        rows, words, key, title=words("resident"), value=lambda row: row.resident_bytes, show=format_bytes, width=WIDE
    )


def loss_plot(rows: Sequence[Row], words: Words, key: str) -> str | None:
    """Training loss over steps; every curve named at its end."""
    curves = [
        (colour_of(i), words.data(row.label), list(enumerate(row.training_losses, start=1)))
        for i, row in enumerate(rows)
        if row.training_losses
    ]
    return _curves(curves, words, key, title=words("losses"))


def train_plot(run: Run, words: Words, key: str) -> str | None:
    """Training and validation loss of one training run."""
    curves = []
    for index, (name, column) in enumerate((("training", "loss"), ("validation", "validation_loss"))):
        points = [(n.number("step"), n.number(column)) for n in run.metrics]
        clean = [(int(step), loss) for step, loss in points if step is not None and loss is not None]
        if clean:
            curves.append((colour_of(index * 3), words(name), clean))
    return _curves(curves, words, key, title=words("training_run_of", name=run.name), width=WIDE)


Curve = tuple[str, str, list[tuple[int, float]]]


def _curves(curves: Sequence[Curve], words: Words, key: str, *, title: str, width: float = HALF) -> str | None:
    if not curves:
        return None
    with canvas(width, 280) as (figure, axes):
        for colour, _, points in curves:
            steps, losses = zip(*points, strict=True)
            axes.plot(steps, losses, color=colour, marker="o" if len(points) == 1 else None, clip_on=False)
        _grid(axes, words("steps_axis"), words("loss_axis"))
        axes.xaxis.get_major_locator().set_params(integer=True)
        _end_labels(figure, axes, curves)
        text = "; ".join(f"{label} {points[0][1]:.3f} to {points[-1][1]:.3f}" for _, label, points in curves)
        return to_svg(figure, title=title, description=text, key=key)


def _grid(axes: Any, x: str, y: str) -> None:
    axes.grid(axis="y")
    axes.set_axisbelow(True)
    axes.spines["left"].set_visible(False)
    axes.set_xlabel(x, loc="right")
    axes.set_title(y, loc="left", fontsize=13, color=MUTED, pad=10)


def _end_labels(figure: Any, axes: Any, curves: Sequence[Curve]) -> None:
    """A label at the end of every curve, pushed apart where two would touch."""
    last = max(points[-1][0] for _, _, points in curves)
    low, high = axes.get_ylim()
    gap = (high - low) * 0.075
    ends = sorted(((points[-1][1], colour, label) for colour, label, points in curves), reverse=True)
    for y, (_, colour, label) in zip(
        within(spread([end[0] for end in ends], gap), low + gap / 2, high), ends, strict=True
    ):
        note = {"xytext": (8, 0), "textcoords": "offset points", "va": "center", "annotation_clip": False}
        axes.annotate(_clip(label, 26), (last, y), color=colour, **note)


def within(values: Sequence[float], low: float, high: float) -> list[float]:
    """Descending values moved together into low ... high; where they are too many for that, they begin at `high`."""
    shift = max(0.0, low - values[-1])
    shift -= max(0.0, values[0] + shift - high)
    return [value + shift for value in values]


def spread(values: Sequence[float], gap: float) -> list[float]:
    """Descending values moved as little as needed so that neighbours are `gap` apart, around their own middle."""
    groups: list[list[float]] = []
    for value in values:
        groups.append([value])
        while len(groups) > 1 and _bottom(groups[-2], gap) - _top(groups[-1], gap) < gap:
            groups[-2:] = [groups[-2] + groups[-1]]
    return [_top(group, gap) - gap * i for group in groups for i in range(len(group))]


def _top(group: Sequence[float], gap: float) -> float:
    return sum(group) / len(group) + gap * (len(group) - 1) / 2


def _bottom(group: Sequence[float], gap: float) -> float:
    return _top(group, gap) - gap * (len(group) - 1)


def frontier_plot(rows: Sequence[Row], words: Words, key: str) -> str | None:
    """Peak memory against time per step; the line joins what nothing beats in both."""
    points = [
        (i, row, row.peak_bytes, row.step_s.median)
        for i, row in enumerate(rows)
        if row.peak_bytes is not None and row.step_s is not None
    ]
    if len(points) < 2:
        return None
    with canvas(HALF, 280) as (figure, axes):
        best = frontier([(memory, time) for _, _, memory, time in points])
        axes.plot(*zip(*best, strict=True), color=RULE, linewidth=1.6, zorder=1)
        for index, _, memory, time in points:
            axes.scatter([memory], [time], s=64, color=colour_of(index), edgecolors=PAPER, linewidths=1.2, zorder=2)
        _frontier_frame(axes, points, words)
        figure.draw_without_rendering()
        _label_points(axes, [(m, t, words.data(r.label), colour_of(i)) for i, r, m, t in points])
        text = "; ".join(f"{words.data(r.label)}: {format_bytes(m)}, {format_seconds(t)}" for _, r, m, t in points)
        return to_svg(figure, title=words("frontier"), description=text, key=key)


SIDES: tuple[tuple[float, float, str], ...] = (
    (10, 0, "left"),
    (-10, 0, "right"),
    (0, 16, "center"),
    (0, -16, "center"),
    (8, 15, "left"),
    (8, -15, "left"),
    (-8, 15, "right"),
    (-8, -15, "right"),
)
Box = tuple[float, float, float, float]


def _label_points(axes: Any, points: Sequence[tuple[float, float, str, str]]) -> None:
    """A label beside every point, on the side where it covers the least of what is there already."""
    places = [tuple(axes.transData.transform((x, y))) for x, y, _, _ in points]
    taken: list[Box] = [(x - 6, y - 6, x + 6, y + 6) for x, y in places]
    frame = axes.get_window_extent()
    for (px, py), (x, y, label, colour) in zip(places, points, strict=True):
        text = _clip(label, 26)

        def cost(side: tuple[float, float, str], px: float = px, py: float = py, text: str = text) -> float:
            box = _label_box(px, py, text, side)
            outside = max(0.0, frame.x0 - box[0]) + max(0.0, box[2] - frame.x1)
            return sum(_overlap(box, other) for other in taken) + 100 * outside

        dx, dy, align = best = min(SIDES, key=cost)
        taken.append(_label_box(px, py, text, best))
        note = {"xytext": (dx, dy), "textcoords": "offset points", "va": "center", "ha": align}
        axes.annotate(text, (x, y), color=colour, **note)


def _label_box(x: float, y: float, text: str, side: tuple[float, float, str]) -> Box:
    """About where a label will stand, in pixels: Chinese characters are a whole size wide, others half of one."""
    width = sum(13.0 if ord(character) > 0x2E7F else 7.2 for character in text)
    dx, dy, align = side
    left = x + dx - {"left": 0.0, "center": width / 2, "right": width}[align]
    return left, y + dy - 8, left + width, y + dy + 8


def _overlap(one: Box, other: Box) -> float:
    wide = min(one[2], other[2]) - max(one[0], other[0])
    high = min(one[3], other[3]) - max(one[1], other[1])
    return max(0.0, wide) * max(0.0, high)


def _frontier_frame(axes: Any, points: Sequence[tuple[int, Row, float, float]], words: Words) -> None:
    _grid(axes, words("memory_axis"), words("time_axis"))
    axes.grid(axis="both")
    axes.set_xlim(0, max(point[2] for point in points) * 1.08)
    axes.set_ylim(0, max(point[3] for point in points) * 1.15)
    axes.xaxis.set_major_formatter(lambda value, _: format_bytes(value))
    axes.yaxis.set_major_formatter(lambda value, _: format_seconds(value) if value else "0")
    axes.xaxis.get_major_locator().set_params(nbins=5)
    axes.yaxis.get_major_locator().set_params(nbins=5)


def frontier(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that no other beats in both coordinates, from left to right."""
    best: list[tuple[float, float]] = []
    for x, y in sorted(points):
        if not best or y < best[-1][1]:
            best.append((x, y))
    return best
