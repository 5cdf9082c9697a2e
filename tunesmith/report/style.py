"""How plots look: matplotlib drawn with stand-in colours, which become the page's own (light and dark) in the SVG."""

from __future__ import annotations

import html
import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# Stand-ins: no two alike, none that a plot would use by itself. In the SVG each becomes var(--name) of the page.
INK, MUTED, RULE, PAPER = "#010203", "#020304", "#030405", "#040506"
SERIES = tuple(f"#0a0b{index:02x}" for index in range(16, 24))
OWNER_COLOURS = {
    "weights": "#0b0c10",
    "adapters": "#0b0c11",
    "gradients": "#0b0c12",
    "optimizer": "#0b0c13",
    "activations": "#0b0c14",
}
VARIABLES = {
    INK: "ink",
    MUTED: "muted",
    RULE: "rule",
    PAPER: "paper",
    **{colour: f"series-{index}" for index, colour in enumerate(SERIES)},
    **{colour: f"owner-{owner}" for owner, colour in OWNER_COLOURS.items()},
}

RC: dict[str, Any] = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 13,
    "figure.constrained_layout.use": True,
    "figure.constrained_layout.h_pad": 0.04,
    "figure.constrained_layout.w_pad": 0.02,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "text.color": INK,
    "axes.edgecolor": RULE,
    "axes.labelcolor": MUTED,
    "axes.linewidth": 1,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": False,
    "grid.color": RULE,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.major.pad": 6,
    "ytick.major.pad": 8,
    "lines.linewidth": 2,
    "lines.solid_capstyle": "round",
    "lines.solid_joinstyle": "round",
}


@contextmanager
def canvas(width: float, height: float) -> Iterator[tuple[Any, Any]]:
    """A figure of width x height pixels of the page and its axes, in the report's style."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(RC), warnings.catch_warnings():
        # Chinese has no glyph in matplotlib's own font; the browser draws the text with the system's.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure = Figure(figsize=(width / 72, height / 72), dpi=72)
        axes = figure.subplots()
        yield figure, axes


def to_svg(figure: Any, *, title: str, description: str, key: str) -> str:
    """The figure as an inline SVG element: with the page's colours and fonts, a title and a description for readers."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({**RC, "svg.hashsalt": key}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return _inline(buffer.getvalue(), title, description, key)


def _inline(svg: str, title: str, description: str, key: str) -> str:
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = svg.replace("xlink:href", "href")
    for colour, name in VARIABLES.items():
        svg = svg.replace(colour, f"var(--{name})")
    svg = re.sub(r"font: ([\d.]+px)[^;\"]*", r"font-size: \1", svg)
    svg = re.sub(r"font-family: [^;\"]*", "font-family: inherit", svg)
    box = re.search(r'viewBox="([^"]+)"', svg)
    head = (
        f'<svg class="plot" role="img" viewBox="{box.group(1) if box else "0 0 1 1"}" '
        f'aria-labelledby="{key}-title {key}-desc">'
        f'<title id="{key}-title">{html.escape(title)}</title>'
        f'<desc id="{key}-desc">{html.escape(description)}</desc>'
    )
    return head + svg[svg.index(">") + 1 :]


def standalone(svg: str) -> str:
    """An inline SVG made into a file of its own: with the namespace, the colours of the page, and its fonts."""
    from pathlib import Path

    css = (Path(__file__).parent / "page.css").read_text(encoding="utf-8")
    colours = css[: css.index("* {")].replace(":root", "svg")
    font = 'svg { font-family: system-ui, "Noto Sans", "PingFang SC", "Noto Sans CJK SC", sans-serif; }'
    start = svg.index(">") + 1
    head = svg[: start - 1] + ' xmlns="http://www.w3.org/2000/svg">'
    return f"{head}<style>{colours}{font} svg {{ background: var(--paper); }}</style>{svg[start:]}"
