"""What serving runs say: latency and throughput against load, goodput, errors; several servers side by side."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tunesmith.report.load import Node, Run, as_number
from tunesmith.report.section import Drawn, Section
from tunesmith.report.serve_plots import Line, load_plot
from tunesmith.report.strings import Words
from tunesmith.report.verdict import Sentence
from tunesmith.units import format_count, format_seconds

MODES = ("open", "closed", "trace")
LATENCIES = ("ttft_s", "tpot_s", "itl_s", "e2e_s")
GOOD_ENOUGH = 0.9
"""The share of good answers up to which a load counts as carried."""
MISSING = "–"


@dataclass(frozen=True)
class Load:
    """One server under one load, the medians of its repeats. numbers: by name, those that were measured."""

    server: str
    mode: str
    value: float
    label: str
    numbers: dict[str, float]
    is_stopped: bool = False
    errors: tuple[tuple[str, int], ...] = ()
    saturated: str | None = None
    reason: str | None = None
    num_whole: int = 0
    num_answers: int = 0


def serve_sections(runs: Sequence[Run], words: Words) -> list[Section]:
    """One section for all serving runs together, so that servers stand beside each other; none without such a run."""
    found = [run for run in runs if run.kind == "serve"]
    loads = [load for run in found for load in loads_of(run, words)]
    if not loads:
        return []
    return [
        Section(
            name=" · ".join(dict.fromkeys(run.name for run in found)),
            title=words("serve_table"),
            note=_note(found, words),
            head=_head(words, _is_judged(loads)),
            rows=tuple(_row(load, words, _is_judged(loads)) for load in loads),
            sentences=(*_sentences(loads, words), *_busy(found, words)),
            figures=tuple(_figures(loads, words)),
            commands=tuple(_commands(found)),
        )
    ]


def loads_of(run: Run, words: Words) -> list[Load]:
    """The loads of a run: by mode, lightest first."""
    groups: dict[tuple[str, float], list[Node]] = {}
    for cell in run.cells:
        groups.setdefault((_mode(cell), _value(cell)), []).append(cell)
    order = sorted(groups, key=lambda key: (MODES.index(key[0]), key[1]))
    return [_load(run.name, mode, value, groups[mode, value], words) for mode, value in order]


def _mode(cell: Node) -> str:
    mode = cell.text("point", "mode")
    return mode if mode in MODES else MODES[0]


def _value(cell: Node) -> float:
    """A load's number; an infinite rate is null in JSON."""
    value = as_number(cell.get("point", "value"))
    return math.inf if value is None else value


def _load(server: str, mode: str, value: float, cells: Sequence[Node], words: Words) -> Load:
    done = [
        cell
        for cell in cells
        if cell.get("status") in ("ok", "interrupted") and cell.number("measures", "completed") != 0
    ]
    errors: dict[str, int] = {}
    for cell in cells:
        for text, count in (cell.get("measures", "errors") or {}).items():
            errors[text] = errors.get(text, 0) + int(count)
    return Load(
        server=server,
        mode=mode,
        value=value,
        label=load_label(mode, value, words),
        numbers=_numbers(done),
        is_stopped=any(cell.get("status") == "interrupted" for cell in cells),
        errors=tuple(errors.items()),
        saturated=next((text for cell in done if (text := cell.text("client", "saturated"))), None),
        reason=None if done else next((cell.text("reason") for cell in cells), None),
        num_whole=_count(done, "answers_whole"),
        num_answers=_count(done, "completed"),
    )


def _count(cells: Sequence[Node], name: str) -> int:
    """The sum of a count over repeats; cells of older versions may lack it."""
    return int(sum(cell.number("measures", name) or 0 for cell in cells))


def load_label(mode: str, value: float, words: Words) -> str:
    """A load in words."""
    if mode == "open" and math.isinf(value):
        return words("load_all")
    return words(f"load_{mode}", value=f"{value:g}")


def _numbers(cells: Sequence[Node]) -> dict[str, float]:
    paths: dict[str, tuple[str, ...]] = {
        name: (name,) for name in ("requests_per_s", "output_tokens_per_s", "total_tokens_per_s")
    }
    paths |= {f"{name}.{p}": (name, p) for name in LATENCIES for p in ("p50", "p90", "p95", "p99")}
    paths |= {"good_ratio": ("goodput", "good_ratio"), "good_per_s": ("goodput", "requests_per_s")}
    found = {}
    for name, path in paths.items():
        values = [value for cell in cells if (value := cell.number("measures", *path)) is not None]
        if values:
            found[name] = statistics.median(values)
    return found


def _is_judged(loads: Sequence[Load]) -> bool:
    """Whether there were objectives: else nothing is good or bad."""
    return any("good_ratio" in load.numbers for load in loads)


def _busy(runs: Sequence[Run], words: Words) -> Iterator[Sentence]:
    """What the machine did before a run, where that was much."""
    for run in runs:
        machine = Node(run.manifest.get("machine"))
        if machine.get("is_busy"):
            # Runs of before have the load average alone.
            load = machine.number("busy_cores") or machine.number("load_average") or 0.0
            cores = int(machine.number("cores") or 0)
            yield Sentence(words("infer_busy", load=f"{load:.1f}", cores=cores), "warning")


def _head(words: Words, is_judged: bool) -> tuple[str, ...]:
    names = ("server", "load", "requests_per_s", "output_per_s")
    pairs = [f"{name} {p}" for name in ("TTFT", "TPOT", "ITL", "E2E") for p in ("p50", "p99")]
    good = (words("good"),) if is_judged else ()
    return (*(words(name) for name in names), *pairs, *good, words("errors"))


def _row(load: Load, words: Words, is_judged: bool) -> tuple[str, ...]:
    numbers = load.numbers
    latencies = [_seconds(numbers.get(f"{name}.{p}")) for name in LATENCIES for p in ("p50", "p99")]
    good, rate, tokens = (numbers.get(name) for name in ("good_ratio", "requests_per_s", "output_tokens_per_s"))
    marks = [words("client_limit")] if load.saturated else []
    marks += [words("stopped_early")] if load.is_stopped else []
    marked = f"{load.label} ({', '.join(marks)})" if marks else load.label
    return (
        load.server,
        marked,
        MISSING if rate is None else f"{rate:,.2f}",
        MISSING if tokens is None else f"{tokens:,.0f}",
        *latencies,
        *((MISSING if good is None else f"{good * 100:.1f} %",) if is_judged else ()),
        str(sum(count for _, count in load.errors)),
    )


def _seconds(value: float | None) -> str:
    return MISSING if value is None else format_seconds(value)


def _note(runs: Sequence[Run], words: Words) -> str:
    objectives = [cell.get("measures", "goodput", "objectives") for run in runs for cell in run.cells]
    asked = next((o for o in objectives if isinstance(o, dict) and o), None)
    parts = [words("serve_table_note")]
    if asked:
        text = ", ".join(f"{name.upper()} ≤ {format_seconds(limit)}" for name, limit in asked.items())
        parts.append(words("good_note", objectives=text))
    else:
        parts.append(words("no_slo_note"))
    notes = dict.fromkeys(note for run in runs for cell in run.cells for note in cell.get("notes") or [])
    return " ".join([*parts, *(f"{note[:1].upper()}{note[1:]}." for note in notes)])


def _sentences(loads: Sequence[Load], words: Words) -> Iterator[Sentence]:
    servers = list(dict.fromkeys(load.server for load in loads))
    if len(servers) > 1:
        yield from _comparisons(loads, servers, words)
    for load in loads:
        if load.reason and not load.numbers:
            yield Sentence(
                words("serve_nothing", server=load.server, load=load.label, why=load.reason[:200]), "warning"
            )
    for server in servers:
        mine = [load for load in loads if load.server == server]
        yield from _server_sentences(server, mine, words)
    for load in loads:
        if load.saturated:
            yield Sentence(words("serve_saturated", server=load.server, load=load.label, why=load.saturated), "warning")
        if load.num_whole:
            counts = {"count": load.num_whole, "total": load.num_answers}
            yield Sentence(words("serve_whole", server=load.server, load=load.label, **counts), "warning")
        if load.is_stopped:
            yield Sentence(words("serve_stopped", server=load.server, load=load.label), "warning")
        if load.errors:
            text, count = max(load.errors, key=lambda pair: pair[1])
            total = sum(number for _, number in load.errors)
            names = {"server": load.server, "load": load.label, "count": total, "most": count, "text": text[:140]}
            yield Sentence(words("serve_errors", **names), "warning")


def _server_sentences(server: str, loads: Sequence[Load], words: Words) -> Iterator[Sentence]:
    rated = [load for load in loads if "output_tokens_per_s" in load.numbers]
    if not rated:
        return
    best = max(rated, key=lambda load: load.numbers["output_tokens_per_s"])
    yield Sentence(
        words(
            "serve_best",
            server=server,
            tokens=format_count(best.numbers["output_tokens_per_s"]),
            load=best.label,
            ttft=_seconds(best.numbers.get("ttft_s.p50")),
            ttft99=_seconds(best.numbers.get("ttft_s.p99")),
            tpot=_seconds(best.numbers.get("tpot_s.p50")),
        )
    )
    judged = [load for load in rated if "good_ratio" in load.numbers]
    if judged:
        carried = [load for load in judged if load.numbers["good_ratio"] >= GOOD_ENOUGH]
        last = max(carried, key=lambda load: load.numbers["good_per_s"], default=None)
        text = words("serve_none_good", server=server, percent=f"{GOOD_ENOUGH * 100:.0f} %")
        if last is not None:
            ratio = f"{last.numbers['good_ratio'] * 100:.1f} %"
            rate = f"{last.numbers['good_per_s']:.2f}"
            text = words("serve_carried", server=server, load=last.label, ratio=ratio, rate=rate)
        yield Sentence(text)


def _comparisons(loads: Sequence[Load], servers: Sequence[str], words: Words) -> Iterator[Sentence]:
    """The first server against each other one, at the heaviest load that both had."""
    by_load = {(load.server, load.mode, load.value): load for load in loads if "output_tokens_per_s" in load.numbers}
    first = servers[0]
    for other in servers[1:]:
        shared = [key for key in by_load if key[0] == first and (other, *key[1:]) in by_load]
        if not shared:
            continue
        ours = by_load[max(shared, key=lambda key: (-MODES.index(key[1]), key[2]))]
        theirs = by_load[other, ours.mode, ours.value]
        yield Sentence(
            words(
                "serve_against",
                server=first,
                other=other,
                load=ours.label,
                tokens=_times(ours, theirs, "output_tokens_per_s"),
                ttft=_times(ours, theirs, "ttft_s.p50"),
                ttft99=_times(ours, theirs, "ttft_s.p99"),
                tpot=_times(ours, theirs, "tpot_s.p50"),
            )
        )


def _times(ours: Load, theirs: Load, name: str) -> str:
    mine, other = ours.numbers.get(name), theirs.numbers.get(name)
    return MISSING if mine is None or not other else f"{mine / other:.2f}"


def _figures(loads: Sequence[Load], words: Words) -> Iterator[Drawn]:
    by_mode = {mode: [load for load in loads if load.mode == mode and load.numbers] for mode in MODES}
    drawn = {mode: shown for mode, shown in by_mode.items() if len({load.value for load in shown}) > 1}
    for mode, shown in drawn.items():
        by = f" ({words(f'axis_{mode}')})" if len(drawn) > 1 else ""  # else a page has the same titles twice
        yield _figure(shown, mode, "ttft", ("ttft_s.p50", "ttft_s.p99"), words, by)
        yield _figure(shown, mode, "tpot", ("tpot_s.p50", "tpot_s.p99"), words, by)
        yield _figure(shown, mode, "tokens", ("output_tokens_per_s",), words, by)
        if any("good_per_s" in load.numbers for load in shown):
            yield _figure(shown, mode, "good", ("good_per_s",), words, by)


def _figure(loads: Sequence[Load], mode: str, what: str, names: Sequence[str], words: Words, by: str) -> Drawn:
    servers = list(dict.fromkeys(load.server for load in loads))
    values = sorted({load.value for load in loads})
    lines = [
        Line(
            label=f"{server} {name.rpartition('.')[2]}" if len(names) > 1 else server,
            series=2 * index + 1,
            is_dashed=number > 0,
            points=tuple(
                (values.index(load.value), load.numbers[name])
                for load in loads
                if load.server == server and name in load.numbers
            ),
        )
        for index, server in enumerate(servers)
        for number, name in enumerate(names)
    ]
    ticks = tuple("∞" if math.isinf(value) else f"{value:g}" for value in values)
    title = words(f"serve_{what}") + by
    show = format_seconds if what in ("ttft", "tpot") else _short if what == "good" else format_count
    axis = words(f"axis_{mode}")
    is_log = what in ("ttft", "tpot")
    legend = tuple((line.label, f"series-{line.series}") for line in lines if not line.is_dashed) if servers[1:] else ()
    note = words("serve_latency_note") if is_log else words(f"serve_{what}_note")

    def draw(key: str) -> str | None:
        return load_plot(lines, ticks, title=title, axis=axis, show=show, is_log=is_log, key=key)

    return Drawn(title, note, draw, legend)


def _short(value: float) -> str:
    return f"{value:.3g}"


def _commands(runs: Sequence[Run]) -> Iterator[tuple[str, str]]:
    for run in runs:
        for text in dict.fromkeys(text for cell in run.cells if (text := cell.text("command"))):
            yield run.name, text
