"""The report as Markdown: the verdict and the tables, for a repository or a comment."""

from __future__ import annotations

import re
from collections.abc import Sequence

from tunesmith import __version__
from tunesmith.report.content import Bench, Content
from tunesmith.report.scale import Scale, scale_head, scale_rows
from tunesmith.report.section import Section
from tunesmith.report.strings import Words
from tunesmith.report.tables import TableRow, bench_table, certificate_rows, work_note
from tunesmith.report.training import Training

_SPECIAL = re.compile(r"([\\`*_{}\[\]<>#|~!])")


def render_markdown(content: Content) -> str:
    """The whole file."""
    words = content.words
    parts = [f"# {_escape(content.headline)}"]
    if content.device:
        parts.append(_escape(words("measured_on", device=content.device)))
    if content.random_weights:
        parts.append(f"**{words('random_weights')}**")
    if content.sentences:
        parts.append("\n".join(f"- {_escape(sentence.text)}" for sentence in content.sentences))
    for bench in content.benches:
        parts += _bench(bench, words)
    for scale in content.scales:
        parts += _scale(scale, words)
    for section in content.sections:
        parts += _section(section, words)
    for training in content.trains:
        parts += _training(training, words)
    parts += _evaluations(content)
    for title, certificate in content.certificates:
        parts += _certificate(title, words, [*certificate_rows(certificate, words)])
    if content.environment:
        parts += [f"## {words('environment')}", _table(("", ""), content.environment)]
    parts.append(f"<sub>{words('made_by', version=__version__)}</sub>")
    return "\n\n".join(part for part in parts if part) + "\n"


def _escape(text: str) -> str:
    """Text that Markdown shows as it is, on one line."""
    return _SPECIAL.sub(r"\\\1", " ".join(text.split())).replace("\\<", "&lt;").replace("\\>", "&gt;")


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], numeric: bool = False) -> str:
    rule = ["---", *(("---:" if numeric else "---") for _ in head[1:])]
    lines = [[_escape(cell) for cell in head], rule, *([_escape(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _bench(bench: Bench, words: Words) -> list[str]:
    table = bench_table(bench.rows, words)
    rows = [(_label(row), *(_cell(value.text, value.interval) for value in row.cells)) for row in table.rows]
    parts = [f"## {_escape(bench.name)}", _table(table.head, rows, numeric=True)]
    parts.append(" ".join(part for part in (work_note(bench.rows, words), words("units")) if part))
    commands = [f"- {_escape(words.data(row.label))}: {_code(row.command)}" for row in bench.rows if row.command]
    return [*parts, f"### {words('reproduce')}", "\n".join(commands)] if commands else parts


def _scale(scale: Scale, words: Words) -> list[str]:
    table = _table(scale_head(scale, words), scale_rows(scale, words), numeric=True)
    parts = [f"## {_escape(scale.name)}", table, f"{words('scale_table_note')} {words('units')}"]
    commands = "\n".join(f"- {_code(command)}" for command in scale.commands)
    return [*parts, f"### {words('reproduce')}", commands] if commands else parts


def _section(section: Section, words: Words) -> list[str]:
    parts = [f"## {_escape(section.name)}", _table(section.head, section.rows, numeric=True), _escape(section.note)]
    commands = "\n".join(f"- {_escape(label)}: {_code(command)}" for label, command in section.commands)
    return [*parts, f"### {words('reproduce')}", commands] if commands else parts


def _training(training: Training, words: Words) -> list[str]:
    facts = "\n".join(f"- {_escape(name)}: {_escape(text)}" for name, text in training.facts)
    parts = [f"## {_escape(words('training_run_of', name=training.run.name))}", facts]
    return [*parts, f"{words('run_command')}: {_code(training.command)}"] if training.command else parts


def _label(row: TableRow) -> str:
    notes = [*row.flags, *([row.reason] if row.reason else [])]
    return f"{row.label} ({': '.join(notes)})" if notes else row.label


def _cell(text: str, interval: str) -> str:
    return f"{text} ({interval})" if interval else text


def _code(command: str) -> str:
    """A code span whose fence is longer than any run of backticks inside."""
    flat = " ".join(command.split())
    fence = "`" * (max((len(run) for run in re.findall("`+", flat)), default=0) + 1)
    return f"{fence} {flat} {fence}" if "`" in flat else f"`{flat}`"


def _evaluations(content: Content) -> list[str]:
    parts: list[str] = []
    for evaluation in content.evaluations:
        parts.append(f"## {_escape(evaluation.title)}")
        parts.append("\n".join(f"- {_escape(name)}: {_escape(text)}" for name, text in evaluation.facts))
        if evaluation.examples:
            rows = [[answer.text for answer in example] for example in evaluation.examples]
            parts.append(_table(evaluation.head, rows))
    return parts


def _certificate(title: str, words: Words, rows: Sequence[object]) -> list[str]:
    head = (words("check"), words("status"), words("value"), words("limit"))
    cells = [[str(getattr(row, key)) for key in ("name", "status", "value", "limit")] for row in rows]
    return [f"## {_escape(title)}", _table(head, cells)] if cells else []
