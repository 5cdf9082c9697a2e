"""The page: one self-contained HTML file, drawn from what was read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from markupsafe import Markup

from tunesmith import __version__
from tunesmith.report import plots, scale_plots
from tunesmith.report.content import Bench, Content
from tunesmith.report.rows import OWNERS, Row
from tunesmith.report.scale import PARTS, Scale, scale_head, scale_rows
from tunesmith.report.section import Section
from tunesmith.report.strings import Words
from tunesmith.report.style import SERIES
from tunesmith.report.tables import bench_table, certificate_rows, work_note
from tunesmith.report.training import Training

FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Figure:
    """A plot with its heading and a note."""

    title: str
    note: str
    svg: Markup


def render_page(content: Content) -> str:
    """The whole page. Everything that came from a file is escaped; plots escape their own texts."""
    words = content.words
    return _template().render(
        words=words,
        css=Markup((FOLDER / "page.css").read_text(encoding="utf-8")),
        version=__version__,
        owners=OWNERS,
        name=content.name,
        created=content.created,
        headline=content.headline,
        device=content.device,
        random_weights=content.random_weights,
        sentences=[{"text": s.text, "kind": s.kind, "colour": _colour(content, s.row)} for s in content.sentences],
        benches=[_bench(bench, words, f"b{index}") for index, bench in enumerate(content.benches)],
        scales=[_scale(scale, words, f"s{index}") for index, scale in enumerate(content.scales)],
        sections=[_section(section, f"m{index}") for index, section in enumerate(content.sections)],
        trains=[_training(training, words, f"t{index}") for index, training in enumerate(content.trains)],
        evaluations=[_evaluation(evaluation) for evaluation in content.evaluations],
        certificates=[
            {"title": title, "checks": rows}
            for title, node in content.certificates
            if (rows := certificate_rows(node, words))
        ],
        environment=[{"name": name, "text": text} for name, text in content.environment],
    )


@cache
def _template() -> Any:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html")


def _colour(content: Content, name: str | None) -> str:
    for bench in content.benches:
        for index, row in enumerate(bench.rows):
            if row.name == name:
                return _variable(index)
    return "rule"


def _variable(index: int) -> str:
    return f"series-{index % len(SERIES)}"


def _training(training: Training, words: Words, key: str) -> dict[str, Any]:
    svg = plots.train_plot(training.run, words, key)
    return {
        "name": training.run.name,
        "svg": svg and Markup(svg),
        "facts": [{"name": name, "text": text} for name, text in training.facts],
        "command": training.command,
    }


def _evaluation(evaluation: Any) -> dict[str, Any]:
    facts = [{"name": name, "text": text} for name, text in evaluation.facts]
    return {"title": evaluation.title, "facts": facts, "head": evaluation.head, "examples": evaluation.examples}


def _bench(bench: Bench, words: Words, key: str) -> dict[str, Any]:
    rows = bench.rows
    on_cpu = all(row.on_cpu for row in rows if row.ok)
    table = bench_table(rows, words)
    memory = plots.memory_plot(rows, words, f"{key}-memory")
    resident = plots.resident_plot(rows, words, f"{key}-resident") if on_cpu else None
    return {
        "name": bench.name,
        "memory": memory and Markup(memory),
        "memory_note": words("memory_note_cpu" if on_cpu else "memory_note"),
        "resident": resident and Markup(resident),
        "figures": _figures(rows, words, key),
        "work_note": work_note(rows, words),
        "table": {
            "head": table.head,
            "rows": [{**asdict(row), "colour": _variable(row.index)} for row in table.rows],
        },
        "commands": [{"label": words.data(row.label), "command": row.command} for row in rows if row.command],
    }


def _scale(scale: Scale, words: Words, key: str) -> dict[str, Any]:
    curve = scale_plots.curve_plot(scale, words, f"{key}-curve")
    parts = scale_plots.parts_plot(scale, words, f"{key}-parts")
    drawn = {"scale_curve": (curve, ()), "scale_parts": (parts, _legend(words))}
    return {
        "name": scale.name,
        "figures": [
            {"title": words(name), "note": words(f"{name}_note"), "svg": Markup(svg), "legend": legend}
            for name, (svg, legend) in drawn.items()
            if svg
        ],
        "head": scale_head(scale, words),
        "rows": scale_rows(scale, words),
        "commands": scale.commands,
    }


def _section(section: Section, key: str) -> dict[str, Any]:
    drawn = [(figure, figure.draw(f"{key}-{index}")) for index, figure in enumerate(section.figures)]
    return {
        **{name: getattr(section, name) for name in ("name", "title", "note", "head", "rows", "commands")},
        "figures": [
            {
                "title": figure.title,
                "note": figure.note,
                "svg": Markup(svg),
                "is_wide": figure.is_wide,
                "legend": [{"name": name, "colour": colour} for name, colour in figure.legend],
            }
            for figure, svg in drawn
            if svg
        ],
    }


def _legend(words: Words) -> list[dict[str, str]]:
    series = scale_plots.PART_SERIES
    return [{"name": words(f"part_{name}"), "colour": f"series-{series[name]}"} for name in PARTS]


def _figures(rows: Sequence[Row], words: Words, key: str) -> list[Figure]:
    drawn = {
        "time": plots.time_plot(rows, words, f"{key}-time"),
        "throughput": plots.throughput_plot(rows, words, f"{key}-throughput"),
        "losses": plots.loss_plot(rows, words, f"{key}-losses"),
        "frontier": plots.frontier_plot(rows, words, f"{key}-frontier"),
    }
    return [Figure(words(name), words(f"{name}_note"), Markup(svg)) for name, svg in drawn.items() if svg]
