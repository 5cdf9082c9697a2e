"""What inference runs say: engines and weight formats side by side, and how many times better ours is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from tunesmith.report.infer_plots import Bar, bars_plot
from tunesmith.report.load import Node, Run
from tunesmith.report.section import Drawn, Section
from tunesmith.report.strings import Words
from tunesmith.report.verdict import Sentence
from tunesmith.units import format_bytes, format_count, format_seconds

OURS, MISSING = "tunesmith", "–"
Show = Callable[[float], str]


@dataclass(frozen=True)
class Column:
    """A number of a row. path: where it lies; ratio: its name in `ours_is`, where ours is compared by it."""

    name: str
    path: tuple[str, ...]
    show: Show
    ratio: str | None = None


def infer_sections(runs: Sequence[Run], words: Words) -> list[Section]:
    """A section for each inference run that wrote its table."""
    return [_section(run, words) for run in runs if run.kind == "infer" and run.table.get("rows")]


def _rows(run: Run) -> list[Node]:
    rows = run.table.get("rows")
    return [Node(row) for row in rows] if isinstance(rows, list) else []


def _section(run: Run, words: Words) -> Section:
    rows, columns = _rows(run), _columns(_rows(run), words)
    command = run.table.text("command")
    return Section(
        name=run.name,
        title=words("infer_table"),
        note=f"{_key(run)} {words('infer_table_note')} {words('units')}".strip(),
        head=(words("engine"), words("format"), *(column.name for column in columns)),
        rows=tuple(_texts(row, columns, words) for row in rows),
        sentences=tuple(_sentences(run, rows, columns, words)),
        figures=tuple(_figures(rows, columns, words)),
        commands=((run.name, command),) if command else (),
    )


def _key(run: Run) -> str:
    key = run.table.get("key")
    shown = {name: value for name, value in key.items() if value} if isinstance(key, dict) else {}
    return ", ".join(f"{name} {value}" for name, value in shown.items()) + ("." if shown else "")


def _columns(rows: Sequence[Node], words: Words) -> list[Column]:
    """The columns that at least one row has a number for."""
    names = dict.fromkeys(name for row in rows for name in (row.get("measures") or {}))
    found: list[Column] = []
    for name in names:
        found += _measure_columns(name, words)
    found.append(Column(words("first_token"), ("first_token_s", "median"), format_seconds, "first_token_s"))
    found.append(Column(words("weights_bytes"), ("weights_bytes",), format_bytes))
    found.append(Column(words("peak_device"), ("device_peak_bytes",), format_bytes))
    found.append(Column(words("resident"), ("resident_peak_bytes",), format_bytes))
    return [column for column in found if any(row.number(*column.path) is not None for row in rows)]


def _measure_columns(name: str, words: Words) -> list[Column]:
    def column(title: str, key: str, show: Show) -> Column:
        return Column(title, ("measures", name, key, "median"), show, f"{name}.{key}")

    if name == "throughput":
        return [
            column(words("output_per_s"), "output_tokens_per_s", _rate),
            Column(words("total_per_s"), ("measures", name, "total_tokens_per_s", "median"), _rate),
        ]
    if name == "prefill":
        return [column(words("prefill"), "prompt_tokens_per_s", _rate)]
    if name in ("latency", "batch-1"):
        return [
            column(words("ttft_one"), "ttft_s", format_seconds),
            column(words("per_token"), "tpot_s", format_seconds),
        ]
    size = name.removeprefix("batch-")
    return [column(words("batch_n", n=size), "output_tokens_per_s", _rate)]


def _rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:,.1f}"


def _texts(row: Node, columns: Sequence[Column], words: Words) -> tuple[str, ...]:
    status = row.text("status") or "failed"
    engine = row.text("engine") or "?"
    label = engine if status == "ok" else f"{engine} ({words.status(status)}: {(row.text('reason') or '')[:100]})"
    return (label, row.text("format") or "?", *(_text(row, column) for column in columns))


def _text(row: Node, column: Column) -> str:
    value = row.number(*column.path)
    if value is None:
        return MISSING
    ratio = row.number("ours_is", column.ratio) if column.ratio else None
    return column.show(value) if ratio is None else f"{column.show(value)} ({ratio:.2f}×)"


def _sentences(run: Run, rows: Sequence[Node], columns: Sequence[Column], words: Words) -> Iterator[Sentence]:
    for name in dict.fromkeys(row.text("format") for row in rows):
        here = [row for row in rows if row.text("format") == name and row.get("status") == "ok"]
        ours = next((row for row in here if row.text("engine") == OURS), None)
        if ours is None:
            continue
        for column in columns:
            if column.ratio is not None and (value := ours.number(*column.path)) is not None:
                yield _compared(f"{name}, {column.name}", value, column, here, words)
    if Node(run.table.get("machine")).get("is_busy"):
        machine = Node(run.table.get("machine"))
        load, cores = machine.number("load_average") or 0.0, int(machine.number("cores") or 0)
        yield Sentence(words("infer_busy", load=f"{load:.1f}", cores=cores), "warning")
    for row in rows:
        names = {"engine": row.text("engine") or "?", "format": row.text("format") or "?"}
        if row.get("status") not in ("ok", "not_applicable"):
            status = words.status(row.text("status") or "failed")
            yield Sentence(
                words("infer_failed", **names, status=status, reason=(row.text("reason") or "")[:140]), "warning"
            )
        elif short := row.number("short"):
            yield Sentence(words("infer_unequal", **names, reason=f"{short:.0f}"), "warning")


def _compared(what: str, value: float, column: Column, rows: Sequence[Node], words: Words) -> Sentence:
    """Ours against the best of the others: the one by which ours is the fewest times better."""
    ratios = [(row.number("ours_is", column.ratio or ""), row) for row in rows]
    others = [(ratio, row) for ratio, row in ratios if ratio is not None]
    if not others:
        return Sentence(words("infer_alone", what=what, value=column.show(value)))
    ratio, row = min(others, key=lambda pair: pair[0])
    names = {"what": what, "value": column.show(value), "ratio": f"{ratio:.2f}", "other": row.text("engine") or "?"}
    return Sentence(words("infer_best", **names, other_value=column.show(row.number(*column.path) or 0.0)))


def _figures(rows: Sequence[Node], columns: Sequence[Column], words: Words) -> Iterator[Drawn]:
    for column in columns:
        if column.ratio is None:
            continue
        bars = [
            Bar(f"{row.text('engine')} {row.text('format')}", value, row.text("engine") == OURS)
            for row in rows
            if (value := row.number(*column.path)) is not None
        ]
        if len(bars) > 1:
            is_time = column.show is format_seconds
            note = words("infer_token_note") if is_time else words("infer_output_note")
            yield Drawn(column.name, note, _drawing(bars, column))


def _drawing(bars: Sequence[Bar], column: Column) -> Callable[[str], str | None]:
    show = column.show if column.show is format_seconds else format_count
    return lambda key: bars_plot(bars, title=column.name, show=show, key=key)
