"""The memory timeline of a profile: allocated bytes over one step, with its phases and what is held throughout."""

from __future__ import annotations

from typing import Any

from tunesmith.report.load import Node
from tunesmith.report.plots import WIDE, spread
from tunesmith.report.strings import Words
from tunesmith.report.style import INK, MUTED, OWNER_COLOURS, RULE, SERIES, canvas, standalone, to_svg
from tunesmith.units import format_bytes, format_seconds

HELD = ("weights", "adapters", "optimizer")  # in memory during the whole step


def timeline_svg(memory: Node, words: Words) -> str | None:
    """The timeline in profile/memory.json as an SVG file, or None where it has no points."""
    svg = timeline_plot(memory, words, "timeline")
    return None if svg is None else standalone(svg)


def timeline_plot(memory: Node, words: Words, key: str) -> str | None:
    """The timeline in profile/memory.json as an SVG element of a page, or None where it has no points."""
    points = [(time, held) for time, held in _pairs(memory.get("points"))]
    if len(points) < 2:
        return None
    with canvas(WIDE, 360) as (figure, axes):
        times, held = zip(*points, strict=True)
        axes.fill_between(times, held, step="post", color=SERIES[1], alpha=0.18, linewidth=0)
        axes.step(times, held, where="post", color=SERIES[1], linewidth=1.4)
        _owners(axes, memory, times[-1], words)
        _phases(axes, memory, max(held), words)
        _frame(axes, times[-1], max(held))
        peak = format_bytes(max(held))
        return to_svg(figure, title=words("memory"), description=f"{words('peak')} {peak}", key=key)


def _pairs(value: Any) -> list[tuple[float, float]]:
    pairs = value if isinstance(value, list) else []
    return [(float(pair[0]), float(pair[1])) for pair in pairs if isinstance(pair, list) and len(pair) == 2]


def _owners(axes: Any, memory: Node, end: float, words: Words) -> None:
    """Bands from the bottom: what each owner holds all the time."""
    sizes = [(owner, memory.number("owners", f"{owner}_bytes") or 0.0) for owner in HELD]
    held = [(owner, size) for owner, size in sizes if size]
    middles, bottom = [], 0.0
    for owner, size in held:
        axes.fill_between((0, end), bottom, bottom + size, color=OWNER_COLOURS[owner], alpha=0.55, linewidth=0)
        middles.append(bottom + size / 2)
        bottom += size
    gap = (memory.number("peak_bytes") or bottom) * 0.055
    for y, (owner, size) in zip(spread(middles[::-1], gap)[::-1], held, strict=True):
        note = {"xytext": (8, 0), "textcoords": "offset points", "va": "center", "annotation_clip": False}
        axes.annotate(f"{words(owner)} {format_bytes(size)}", (end, y), color=OWNER_COLOURS[owner], **note)


def _phases(axes: Any, memory: Node, peak: float, words: Words) -> None:
    phases = memory.get("phases")
    for entry in phases if isinstance(phases, list) else []:
        time, name = float(entry[0]), words.data(str(entry[1]))
        axes.axvline(time, color=RULE, linewidth=1, zorder=0)
        axes.annotate(name, (time, peak * 1.1), xytext=(5, 0), textcoords="offset points", va="top", color=MUTED)


def _frame(axes: Any, end: float, peak: float) -> None:
    axes.set_xlim(0, end)
    axes.set_ylim(0, peak * 1.12)
    axes.grid(axis="y")
    axes.set_axisbelow(True)
    axes.spines["left"].set_visible(False)
    axes.axhline(peak, color=INK, linewidth=0.8, linestyle=(0, (4, 3)))
    axes.annotate(format_bytes(peak), (end, peak), xytext=(8, 0), textcoords="offset points", va="center", color=INK)
    axes.xaxis.set_major_formatter(lambda value, _: format_seconds(value) if value else "0")
    axes.yaxis.set_major_formatter(lambda value, _: format_bytes(value))
