"""What a scaling run says: the curves, where a step's time goes, what limits, and memory beside the formula."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from tunesmith.report.load import Node, Run
from tunesmith.report.strings import Words
from tunesmith.report.verdict import Sentence
from tunesmith.units import format_bytes, format_count, format_seconds

PARTS = ("compute", "exposed", "optimizer", "data")
MODES = ("weak", "strong")
CLOSE_PERCENT = 5.0
"""States further than this from the formula are a warning."""
OTHER_WORK = 0.1
"""A step with so many more or fewer tokens than its mode wants is said to be other work."""
POOR_FIT = 0.1
"""A model that misses a measured step by more is said to explain little."""


@dataclass(frozen=True)
class Point:
    """A step on some GPUs. parts: seconds by name, empty where projected. Bytes are of the process with most."""

    mode: str
    gpus: int
    step_s: float
    tokens_per_s: float
    efficiency_ratio: float
    parts: dict[str, float] = field(default_factory=dict)
    peak_bytes: float | None = None
    states_bytes: float | None = None
    formula_bytes: float | None = None
    difference_percent: float | None = None

    @property
    def is_projected(self) -> bool:
        """From the model, not measured."""
        return not self.parts


@dataclass(frozen=True)
class Scale:
    """A scaling run. points: measured ones first, by mode; failed: (name, status, reason)."""

    name: str
    unit: str
    points: tuple[Point, ...]
    failed: tuple[tuple[str, str, str], ...]
    sentences: tuple[Sentence, ...]
    commands: tuple[str, ...]

    def curve(self, mode: str, *, projected: bool) -> list[Point]:
        """The points of a mode, fewest GPUs first."""
        found = [point for point in self.points if point.mode == mode and point.is_projected is projected]
        return sorted(found, key=lambda point: point.gpus)


def scale_of(run: Run, words: Words) -> Scale:
    """What a run of kind scale holds."""
    unit = words("unit_processes" if _on_cpu(run) else "unit_gpus")
    points = (*_measured(run), *_projected(run))
    return Scale(
        name=run.name,
        unit=unit,
        points=points,
        failed=tuple(_failed(run)),
        sentences=tuple(_sentences(run, points, unit, words)),
        commands=tuple(dict.fromkeys(text for cell in run.cells if (text := cell.text("command")))),
    )


def _on_cpu(run: Run) -> bool:
    return any(cell.get("summary", "device", "type") == "cpu" for cell in run.cells)


def _nodes(value: object) -> list[Node]:
    return [Node(item) for item in value] if isinstance(value, list) else []


def _measured(run: Run) -> Iterator[Point]:
    for mode in MODES:
        for node in _nodes(run.scaling.get("curves", mode)):
            gpus = int(node.number("gpus") or 0)
            cell = _cell(run, mode, gpus)
            yield Point(
                mode=mode,
                gpus=gpus,
                **_speed(node),
                parts={name: node.number("parts", f"{name}_s") or 0.0 for name in PARTS},
                peak_bytes=cell.number("summary", "memory", "allocated_peak_bytes"),
                states_bytes=cell.number("summary", "states", "measured", "total_bytes"),
                formula_bytes=cell.number("summary", "states", "formula", "total_bytes"),
                difference_percent=cell.number("summary", "states", "difference_percent"),
            )


def _projected(run: Run) -> Iterator[Point]:
    for mode in MODES:
        for node in _nodes(run.scaling.get("projection", "modes", mode, "points")):
            yield Point(mode=mode, gpus=int(node.number("gpus") or 0), parts={}, **_speed(node))


def _speed(node: Node) -> dict[str, float]:
    return {name: node.number(name) or 0.0 for name in ("step_s", "tokens_per_s", "efficiency_ratio")}


def _cell(run: Run, mode: str, gpus: int) -> Node:
    wanted = {"mode": mode, "gpus": gpus, "status": "ok"}
    cells = (cell for cell in run.cells if all(cell.get(key) == value for key, value in wanted.items()))
    return next(cells, Node({}))


def _failed(run: Run) -> Iterator[tuple[str, str, str]]:
    for cell in run.cells:
        if cell.get("status") != "ok":
            yield cell.text("name") or "?", cell.text("status") or "failed", cell.text("reason") or ""


def _sentences(run: Run, points: Sequence[Point], unit: str, words: Words) -> Iterator[Sentence]:
    """What limits, in one line for each mode; then memory, projections, and what did not run."""
    for mode in MODES:
        limit = Node(run.scaling.get("limits", mode))
        if limit.data is not None:
            yield Sentence(_limit_sentence(mode, limit, points, unit, words))
    for mode in MODES:
        yield from _other_work(run, mode, points, words)
    if (states := _states_sentence(points, words)) is not None:
        yield states
    for mode in MODES:
        yield from _projection_sentences(mode, Node(run.scaling.get("projection")), points, unit, words)
    if (reason := run.scaling.text("projection", "reason")) is not None:
        yield Sentence(words("scale_no_projection", reason=reason), kind="warning")
    for name, status, reason in _failed(run):
        text = words("did_not_run_why", label=name, status=words.status(status), reason=reason.split("\n")[0][:140])
        yield Sentence(text, kind="warning")


def _limit_sentence(mode: str, limit: Node, points: Sequence[Point], unit: str, words: Words) -> str:
    gpus, fewest = int(limit.number("gpus") or 0), int(limit.number("from_gpus") or 0)
    point = next(p for p in points if (p.mode, p.gpus) == (mode, gpus) and not p.is_projected)
    speed = {"gpus": gpus, "unit": unit, "tokens": format_count(point.tokens_per_s), "mode": words(f"mode_{mode}")}
    if gpus == fewest:
        return words("scale_alone", **speed)
    ratio = f"{point.efficiency_ratio * 100:.1f} %"
    lost = format_seconds(limit.number("lost_s") or 0.0)
    what = words(f"limit_{limit.text('limit') or 'none'}", lost=lost, step=format_seconds(point.step_s))
    return words("scale_verdict", ratio=ratio, fewest=fewest, what=what, **speed)


def _other_work(run: Run, mode: str, points: Sequence[Point], words: Words) -> Iterator[Sentence]:
    """Steps that had other tokens than the mode says, as where there are too few data for a batch that grows."""
    counts = [point.gpus for point in points if point.mode == mode and not point.is_projected]
    found = {gpus: _cell(run, mode, gpus).number("summary", "tokens_per_step") for gpus in sorted(counts)}
    tokens = {gpus: number for gpus, number in found.items() if number}
    if len(tokens) < 2:
        return
    fewest, least = next(iter(tokens.items()))
    for gpus, number in tokens.items():
        wanted = least * gpus / fewest if mode == "weak" else least
        if abs(number / wanted - 1) > OTHER_WORK:
            shown = {"gpus": gpus, "tokens": f"{number:,.0f}", "wanted": f"{wanted:,.0f}"}
            yield Sentence(words("scale_other_work", mode=words(f"mode_{mode}"), **shown), "warning")


def _states_sentence(points: Sequence[Point], words: Words) -> Sentence | None:
    found = [point for point in points if point.difference_percent is not None]
    worst = max((p.difference_percent or 0.0 for p in found), key=abs, default=None)
    if worst is None:
        return None
    kind = "warning" if abs(worst) > CLOSE_PERCENT else "fact"
    return Sentence(words("scale_states", percent=f"{abs(worst):.2f} %"), kind=kind)


def _projection_sentences(
    mode: str, projection: Node, points: Sequence[Point], unit: str, words: Words
) -> Iterator[Sentence]:
    fitted = Node(projection.get("modes", mode))
    ahead = [point for point in points if point.mode == mode and point.is_projected]
    if not ahead:
        return
    last, error = max(ahead, key=lambda point: point.gpus), fitted.number("error_ratio") or 0.0
    names = {
        "gpus": last.gpus,
        "unit": unit,
        "nodes": int(projection.number("nodes") or 0),
        "tokens": format_count(last.tokens_per_s),
        "ratio": f"{last.efficiency_ratio * 100:.1f} %",
        "mode": words(f"mode_{mode}"),
        "hidden": _hidden(fitted.number("hidden_ratio") or 0.0, words),
        "error": f"{error * 100:.1f} %",
    }
    yield Sentence(words("scale_projected", **names), kind="warning" if error > POOR_FIT else "fact")


def _hidden(ratio: float, words: Words) -> str:
    """How much of the communication is hidden, or by how much it takes longer than its bytes do."""
    if ratio < 0:
        return words("scale_not_hidden", x=f"{1 - ratio:.1f}")
    return words("scale_hidden", percent=f"{ratio * 100:.0f} %")


def _percent(value: float) -> str:
    return f"{value:+.2f} %"


def scale_head(scale: Scale, words: Words) -> tuple[str, ...]:
    """The heads of `scale_rows`."""
    columns = ("step", "tokens_per_s", "tokens_per_gpu", "of_ideal", *(f"part_{name}" for name in PARTS))
    memory = ("peak", "states", "states_formula", "states_difference")
    return (scale.unit, *(words(name) for name in (*columns, *memory)))


def scale_rows(scale: Scale, words: Words) -> list[tuple[str, ...]]:
    """A row of texts for each point, fewest GPUs first, projected ones said to be so; a mode after the other."""
    missing = "–"
    rows = []
    for point in sorted(scale.points, key=lambda p: (MODES.index(p.mode), p.gpus)):
        label = f"{point.gpus}, {words(f'mode_{point.mode}')}"
        sizes = (point.peak_bytes, point.states_bytes, point.formula_bytes)
        difference = point.difference_percent
        rows.append(
            (
                f"{label} ({words('projected')})" if point.is_projected else label,
                format_seconds(point.step_s),
                f"{point.tokens_per_s:,.0f}",
                f"{point.tokens_per_s / point.gpus:,.0f}",
                f"{point.efficiency_ratio * 100:.1f} %",
                *(_share(point, name) if point.parts else missing for name in PARTS),
                *(missing if size is None else format_bytes(size) for size in sizes),
                missing if difference is None else _percent(difference),
            )
        )
    return rows


def _share(point: Point, name: str) -> str:
    return f"{point.parts[name] / point.step_s * 100:.1f} %" if point.step_s else "–"
