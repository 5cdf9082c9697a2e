"""The plots of inference runs: a bar for every engine and weight format."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tunesmith.report.plots import BAR, HALF
from tunesmith.report.style import INK, RULE, SERIES, canvas, to_svg


@dataclass(frozen=True)
class Bar:
    """A named number; ours have the accent's colour."""

    label: str
    value: float
    is_ours: bool


def bars_plot(bars: Sequence[Bar], *, title: str, show: Callable[[float], str], key: str) -> str | None:
    """Horizontal bars, the first on top; None where there is none."""
    if not bars:
        return None
    with canvas(HALF, 12 + 30 * len(bars)) as (figure, axes):
        for y, bar in enumerate(bars):
            axes.barh(y, bar.value, BAR, color=SERIES[1 if bar.is_ours else 0])
            note = {"xytext": (7, 0), "textcoords": "offset points", "va": "center", "color": INK}
            axes.annotate(show(bar.value), (bar.value, y), **note)
        axes.set_yticks(range(len(bars)), [bar.label.replace("$", r"\$")[:34] for bar in bars])
        axes.tick_params(axis="y", labelcolor=INK)
        axes.set_ylim(len(bars) - 0.5, -0.5)
        axes.set_xlim(0, max(bar.value for bar in bars) * 1.02 or 1)
        axes.set_xticks([])
        axes.spines["bottom"].set_visible(False)
        axes.spines["left"].set_color(RULE)
        text = "; ".join(f"{bar.label} {show(bar.value)}" for bar in bars)
        return to_svg(figure, title=title, description=text, key=key)
