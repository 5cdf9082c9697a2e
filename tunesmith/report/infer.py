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
    """A number of a row. path: where it lies; ratio: its name in `ours_is`, where ours is compared by it; note: what a
    plot of it says below its title. A path that ends in `median` has `min`, `max` and `count` beside it."""

    name: str
    path: tuple[str, ...]
    show: Show
    ratio: str | None = None
    note: str = "infer_output_note"


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
        note=_note(run, rows, columns, words),
        head=(words("engine"), words("format"), *(column.name for column in columns)),
        rows=tuple(_texts(row, columns, words) for row in rows),
        sentences=(*_headline(run, rows, words), *_sentences(run, rows, columns, words)),
        figures=tuple(_figures(rows, columns, words)),
        commands=((run.name, command),) if command else (),
    )


def _note(run: Run, rows: Sequence[Node], columns: Sequence[Column], words: Words) -> str:
    """Where the numbers are from, and what marks in the table mean: of the marks that it has."""
    parts = [_key(run, words), words("infer_table_note")]
    if any(_range(row, column) for row in rows for column in columns):
        parts.append(words("infer_spread_note"))
    if any(row.get("ours_is") for row in rows):
        parts.append(words("infer_ratio_note"))
    if any(row.get("status") != "ok" for row in rows):
        parts.append(words("infer_missing_note"))
    return " ".join([*parts, words("units")]).strip()


def _headline(run: Run, rows: Sequence[Node], words: Words) -> Iterator[Sentence]:
    """Ours in one sentence: the most tokens, the time of one, and how it stands beside the others."""
    ours = [row for row in rows if row.text("engine") == OURS and row.get("status") == "ok"]
    measured = [(row, name) for row in ours for name in (row.get("measures") or {}) if name != "prefill"]
    rates = [rate for row, name in measured if (rate := row.number("measures", name, "output_tokens_per_s", "median"))]
    if not rates:
        return
    parts = [words("infer_up_to", value=_rate(max(rates)))]
    single = [
        tpot
        for row, name in measured
        if name in ("latency", "batch-1") and (tpot := row.number("measures", name, "tpot_s", "median"))
    ]
    if single:
        parts.append(words("infer_one", value=format_seconds(min(single))))
    ratios = [_worst(rows, name) for name in dict.fromkeys(key for row in rows for key in row.get("ours_is") or {})]
    if ratios:
        span = dict.fromkeys((f"{min(ratios):.2f}", f"{max(ratios):.2f}"))
        parts.append(words("infer_ratios", span="–".join(span)))
    formats = ", ".join(dict.fromkeys(row.text("format") or "?" for row in ours))
    model = run.table.text("key", "model") or run.name
    yield Sentence(words("infer_headline", model=model, formats=formats, parts="; ".join(parts)))


def _worst(rows: Sequence[Node], name: str) -> float:
    """Ours over the best other engine's: the smallest of the ratios."""
    return min(ratio for row in rows if (ratio := row.number("ours_is", name)) is not None)


def _key(run: Run, words: Words) -> str:
    """What was measured, and by what, as one sentence; empty where it is unknown."""
    key = run.table.get("key")
    shown = {str(name): str(value) for name, value in key.items() if value} if isinstance(key, dict) else {}
    pairs = words("comma").join(" ".join(words.environment(name, value)) for name, value in shown.items())
    return words("infer_key", pairs=pairs) if pairs else ""


def _columns(rows: Sequence[Node], words: Words) -> list[Column]:
    """The columns that at least one row has a number for."""
    names = dict.fromkeys(name for row in rows for name in (row.get("measures") or {}))
    found: list[Column] = []
    for name in names:
        found += _measure_columns(name, words)
    found.append(
        Column(words("first_token"), ("first_token_s", "median"), format_seconds, "first_token_s", "infer_start_note")
    )
    found.append(Column(words("weights_bytes"), ("weights_bytes",), format_bytes))
    found.append(Column(words("peak_device"), ("device_peak_bytes",), format_bytes))
    found.append(Column(words("resident"), ("resident_peak_bytes",), format_bytes))
    return [column for column in found if any(row.number(*column.path) is not None for row in rows)]


def _measure_columns(name: str, words: Words) -> list[Column]:
    def column(title: str, key: str, show: Show, note: str = "infer_output_note") -> Column:
        return Column(title, ("measures", name, key, "median"), show, f"{name}.{key}", note)

    if name == "throughput":
        return [
            column(words("output_per_s"), "output_tokens_per_s", _rate),
            Column(words("total_per_s"), ("measures", name, "total_tokens_per_s", "median"), _rate),
        ]
    if name == "prefill":
        return [column(words("prefill"), "prompt_tokens_per_s", _rate, "infer_prompt_note")]
    if name in ("latency", "batch-1"):
        return [
            column(words("ttft_one"), "ttft_s", format_seconds, "infer_ttft_note"),
            column(words("per_token"), "tpot_s", format_seconds, "infer_token_note"),
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
    text = column.show(value) + _range(row, column)
    return text if ratio is None else f"{text} ({ratio:.2f}×)"


def _range(row: Node, column: Column) -> str:
    """The smallest and the largest sample, where there were several and they differ; else nothing."""
    if column.path[-1] != "median" or (row.number(*column.path[:-1], "count") or 0) < 2:
        return ""
    low, high = (row.number(*column.path[:-1], end) for end in ("min", "max"))
    return "" if low is None or high is None or low == high else f" [{column.show(low)}–{column.show(high)}]"


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
        # Runs of before have the load average alone.
        load = machine.number("busy_cores") or machine.number("load_average") or 0.0
        cores = int(machine.number("cores") or 0)
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
            yield Drawn(column.name, words(column.note), _drawing(bars, column))


def _drawing(bars: Sequence[Bar], column: Column) -> Callable[[str], str | None]:
    show = column.show if column.show is format_seconds else format_count
    return lambda key: bars_plot(bars, title=column.name, show=show, key=key)
