"""A part of a report that is a heading, plots, one table and the commands: what serving and inference runs make."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from tunesmith.report.verdict import Sentence


@dataclass(frozen=True)
class Drawn:
    """A plot of a section. draw: from a key that no other plot has to its SVG, or None where nothing was measured."""

    title: str
    note: str
    draw: Callable[[str], str | None]
    legend: tuple[tuple[str, str], ...] = ()
    is_wide: bool = False


@dataclass(frozen=True)
class Section:
    """A part of a report. rows: texts, the first of each its name; commands: what reproduces it, by a label."""

    name: str
    title: str
    note: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    sentences: tuple[Sentence, ...] = ()
    figures: tuple[Drawn, ...] = ()
    commands: tuple[tuple[str, str], ...] = field(default_factory=tuple)
