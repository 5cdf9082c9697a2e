"""What a profile says: the operators that a step's time goes into, the kernels of a GPU, and memory over one step."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Sequence

from tunesmith.report.load import Node, Run
from tunesmith.report.section import Drawn, Section
from tunesmith.report.strings import Words
from tunesmith.report.timeline import timeline_plot
from tunesmith.report.verdict import Sentence
from tunesmith.units import format_bytes, format_seconds

SHOWN = 15
"""Rows of a table; profile/operators.txt has more, operators.json all."""


def profile_sections(runs: Sequence[Run], words: Words) -> list[Section]:
    """A section for the operators of each profile, with its memory, and one for its kernels where there are any."""
    return [section for run in runs if run.kind == "profile" for section in _sections(run, words)]


def _sections(run: Run, words: Words) -> Iterator[Section]:
    operators, kernels = (_rows(run, name) for name in ("operators", "kernels"))
    if operators:
        yield Section(
            name=run.name,
            title=words("profile_operators"),
            note=_note(run, words),
            head=_head(run, words, "profile_operator"),
            rows=tuple(_texts(run, operators)),
            sentences=tuple(_sentences(run, operators, words)),
            figures=(
                Drawn(words("profile_memory"), words("profile_memory_note"), _timeline(run, words), is_wide=True),
            ),
            commands=((run.name, shlex.join(run.command)),) if run.command else (),
        )
    if kernels:
        head, rows = _head(run, words, "profile_kernel"), tuple(_texts(run, kernels))
        yield Section(run.name, words("profile_kernels"), words("profile_kernels_note"), head, rows)


def _rows(run: Run, name: str) -> list[Node]:
    rows = run.profile.get("operators", name)
    return [Node(row) for row in rows] if isinstance(rows, list) else []


def _key(run: Run) -> str:
    """The time that rows are compared by: their own, on the device where there is one."""
    return "self_device_s" if run.profile.text("operators", "by") == "device" else "self_host_s"


def _own_s(run: Run, row: Node) -> float:
    return row.number(_key(run)) or 0.0


def _head(run: Run, words: Words, what: str) -> tuple[str, ...]:
    time = words("profile_device" if _key(run) == "self_device_s" else "profile_host")
    return words(what), words("profile_calls"), time, words("profile_share")


def _texts(run: Run, rows: Sequence[Node]) -> Iterator[tuple[str, ...]]:
    """Those with the most time of their own, per step. The share is of the own time of all."""
    steps, total = _steps(run), sum(_own_s(run, row) for row in rows) or 1.0
    for row in sorted(rows, key=lambda row: -_own_s(run, row))[:SHOWN]:
        calls, own_s = row.number("calls"), _own_s(run, row)
        count = "–" if calls is None else f"{calls / steps:,.1f}"
        yield row.text("name") or "?", count, format_seconds(own_s / steps), f"{own_s / total * 100:.1f} %"


def _steps(run: Run) -> float:
    return run.profile.number("operators", "steps") or 1.0


def _note(run: Run, words: Words) -> str:
    return words("profile_note", steps=f"{_steps(run):.0f}")


def _sentences(run: Run, rows: Sequence[Node], words: Words) -> Iterator[Sentence]:
    top = next(iter(_texts(run, rows)))
    own_s = sum(_own_s(run, row) for row in rows) / _steps(run)
    shown = {"name": run.name, "operator": top[0], "share": top[3], "own": format_seconds(own_s)}
    yield Sentence(words("profile_verdict", **shown))
    if (peak := run.profile.number("memory", "peak_bytes")) is not None:
        yield Sentence(words("profile_peak", peak=format_bytes(peak)))


def _timeline(run: Run, words: Words) -> Callable[[str], str | None]:
    return lambda key: timeline_plot(Node(run.profile.get("memory")), words, key)
