"""Rows as text: the cells of the tables, shared by the page and the Markdown file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeGuard

from tunesmith.report.load import Node, Run
from tunesmith.report.rows import Row
from tunesmith.report.strings import Words
from tunesmith.units import format_bytes, format_count, format_seconds


@dataclass(frozen=True)
class Value:
    """A cell: its text, its interval where it has one, and whether it was not measured."""

    text: str
    interval: str = ""
    missing: bool = False


@dataclass(frozen=True)
class TableRow:
    """A row: `flags` are warnings beside its label, `index` its place in the matrix."""

    label: str
    index: int
    ok: bool
    flags: tuple[str, ...]
    reason: str | None
    cells: tuple[Value, ...]


@dataclass(frozen=True)
class Table:
    """A head and rows; columns that no row measured are left out."""

    head: tuple[str, ...]
    rows: tuple[TableRow, ...]


def bench_table(rows: Sequence[Row], words: Words) -> Table:
    """Every row of a bench, failed ones too."""
    columns = [(head, [_value(row, kind, words) for row in rows]) for head, kind in _columns(words)]
    kept = [(head, values) for head, values in columns if not all(value.missing for value in values)]
    table = [
        TableRow(
            words.data(row.label),
            index,
            row.ok,
            _flags(row, words),
            row.reason,
            tuple(values[index] for _, values in kept),
        )
        for index, row in enumerate(rows)
    ]
    return Table((words("cell"), *(head for head, _ in kept)), tuple(table))


def _columns(words: Words) -> list[tuple[str, str]]:
    keys = {
        "step": "step_s",
        "tokens_per_s": "tokens_per_s",
        "peak": "allocated_bytes",
        "reserved": "reserved_bytes",
        "device": "device_bytes",
        "resident_short": "resident_bytes",
        "first_step": "first_step_s",
        "total": "total_s",
        "epoch": "epoch_s",
        "training": "training_loss",
        "validation": "validation_loss",
        "trainable": "trainable",
    }
    return [(words(head), attribute) for head, attribute in keys.items()]


def _value(row: Row, attribute: str, words: Words) -> Value:
    if attribute == "step_s" and row.step_s is not None:
        low, high = format_seconds(row.step_s.low), format_seconds(row.step_s.high)
        return Value(format_seconds(row.step_s.median), f"{low} – {high}")
    if attribute == "training_loss":
        number = row.training_losses[-1] if row.training_losses else None
    else:
        number = getattr(row, attribute)
    if number is None:
        return Value(words("not_measured"), missing=True)
    return Value(_format(attribute, number))


def _format(attribute: str, number: float) -> str:
    if attribute.endswith("_bytes"):
        return format_bytes(number)
    if attribute in ("tokens_per_s", "trainable"):
        return format_count(number)
    return f"{number:.4f}" if attribute.endswith("loss") else format_seconds(number)


def _flags(row: Row, words: Words) -> tuple[str, ...]:
    flags = [] if row.ok else [words.status(row.status)]
    if row.ok and row.num_ok < row.num_repeats:
        flags.append(f"{row.num_ok}/{row.num_repeats}")
    return (*flags, words("unequal")) if row.unequal else tuple(flags)


def work_note(rows: Sequence[Row], words: Words) -> str:
    """Whether all measured cells did the same work, in words."""
    if any(row.unequal for row in rows):
        return words("unequal_note")
    done = next((row.work for row in rows if row.ok), None)
    if done is None or None in done:
        return ""
    steps, tokens, trained = (f"{number:,.0f}" for number in done if number is not None)
    return words("equal_note", steps=steps, tokens=tokens, trained=trained)


@dataclass(frozen=True)
class CheckRow:
    """One check of a certificate, as text."""

    name: str
    passed: bool | None
    status: str
    value: str
    limit: str
    detail: str


def certificate_rows(certificate: Node, words: Words) -> list[CheckRow]:
    """The checks of a certificate."""
    checks = certificate.get("checks")
    return [_check(Node(check), words) for check in checks] if isinstance(checks, list) else []


def _check(check: Node, words: Words) -> CheckRow:
    passed = check.get("passed")
    known = passed if isinstance(passed, bool) else None
    status = words("not_measured") if known is None else words("passed" if known else "not_passed")
    value, limit = (_plain(check.get(key)) for key in ("value", "limit"))
    return CheckRow(
        words.data(check.text("name") or "?"), known, status, value, limit, words.detail(check.text("detail") or "")
    )


def _plain(value: object) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "" if value is None else str(value)
    return f"{value:.3g}"


def environment_items(runs: Sequence[Run]) -> list[tuple[str, str]]:
    """The first environment there is, as names and values; nested values by their path."""
    for run in runs:
        node = run.environment.data or (run.cells[0].get("environment") if run.cells else None)
        if isinstance(node, dict) and node:
            return list(_flatten("", node))
    return []


def _is_count(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _flatten(prefix: str, node: dict[str, object]) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    for key, value in node.items():
        name = f"{prefix}{key.removesuffix('_bytes')}"
        if isinstance(value, dict):
            found += _flatten(f"{name} · ", value)
        elif isinstance(value, list):
            found += _flatten(f"{name} · ", {str(i): item for i, item in enumerate(value)})
        elif value is not None and value != "":
            found.append((name, format_bytes(value) if key.endswith("_bytes") and _is_count(value) else str(value)))
    return found
