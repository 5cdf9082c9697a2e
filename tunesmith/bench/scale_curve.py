"""A scaling run's cells as curves: efficiency, what limits it, and the curve extended to more nodes.

`scaling.json` of the run directory, version 1: `curves` by mode, `limits` by mode, and `projection` with the cluster,
the fitted share of hidden communication, and the points of each mode; null with a reason where there is none.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from tunesmith.arch import ModelConfig
from tunesmith.bench.scale_summary import formats_of
from tunesmith.cost.collectives import Cluster, Link
from tunesmith.cost.scaling import Curve, Measured, Mode, Parts, Work, extend, fit_hidden, step_messages, talk
from tunesmith.cost.shards import Layout
from tunesmith.recipe.schema import Recipe

NOTHING_LOST = 0.99
"""From this efficiency on, nothing limits."""
Limit = Literal["none", "communication", "stragglers", "data", "optimizer", "host", "compute"]
_LIMITS: dict[str, Limit] = {
    "exposed_s": "communication",
    "data_s": "data",
    "optimizer_s": "optimizer",
    "compute_s": "compute",
}
Cell = Mapping[str, Any]


@dataclass(frozen=True)
class Measurement:
    """A point of a curve: medians over the repeats of a cell."""

    mode: Mode
    gpus: int
    step_s: float
    tokens_per_s: float
    parts: Parts
    waiting_s: float
    idle_s: float | None
    efficiency_ratio: float = 1.0

    @property
    def tokens_per_gpu_s(self) -> float:
        """Tokens per second of each GPU."""
        return self.tokens_per_s / self.gpus


def curve_of(cells: Sequence[Cell], mode: Mode) -> list[Measurement]:
    """The measured points of a mode, fewest GPUs first; efficiency is against the fewest."""
    good = [cell for cell in cells if cell["mode"] == mode and cell["status"] == "ok"]
    points = [_point(mode, gpus, [c for c in good if c["gpus"] == gpus]) for gpus in sorted({c["gpus"] for c in good})]
    if not points:
        return []
    base = points[0].tokens_per_gpu_s
    return [replace(point, efficiency_ratio=point.tokens_per_gpu_s / base) for point in points]


def _point(mode: Mode, gpus: int, cells: Sequence[Cell]) -> Measurement:
    summaries = [cell["summary"] for cell in cells]
    step_s = statistics.median(seconds for summary in summaries for seconds in summary["steps_s"])
    names = summaries[0]["parts"].keys()
    # Parts of the repeats' medians, so that they add up to the step.
    shares = {n: statistics.median(s["parts"][n] / s["step_s"] for s in summaries) for n in names}
    whole = sum(shares.values())
    idle = [summary["idle_s"] / summary["step_s"] for summary in summaries if summary["idle_s"] is not None]
    return Measurement(
        mode=mode,
        gpus=gpus,
        step_s=step_s,
        tokens_per_s=summaries[0]["tokens_per_step"] / step_s,
        parts=Parts(**{name: share / whole * step_s for name, share in shares.items()}),
        waiting_s=statistics.median(summary["waiting_s"] / summary["step_s"] for summary in summaries) * step_s,
        idle_s=statistics.median(idle) * step_s if idle else None,
    )


def limit_of(points: Sequence[Measurement]) -> tuple[Limit, float]:
    """(what costs most of the efficiency from the fewest to the most GPUs, the seconds of a step it costs).

    Each part is compared with what it would be if the curve were ideal: as it was (weak), or divided (strong).
    """
    first, last = points[0], points[-1]
    if last is first or last.efficiency_ratio >= NOTHING_LOST:
        return "none", 0.0
    ideal = 1.0 if last.mode == "weak" else first.gpus / last.gpus
    before, after = asdict(first.parts), asdict(last.parts)
    lost = {name: after[name] - before[name] * ideal for name in _LIMITS}
    name = max(lost, key=lambda part: lost[part])
    return _finer(_LIMITS[name], first, last, lost[name], ideal), lost[name]


def _finer(limit: Limit, first: Measurement, last: Measurement, lost_s: float, ideal: float) -> Limit:
    """Communication that is mostly waiting for a slow process; computing that is mostly a late host."""
    if limit == "communication" and last.waiting_s > last.parts.exposed_s / 2:
        return "stragglers"
    if limit == "compute" and last.idle_s is not None and first.idle_s is not None:
        return "host" if last.idle_s - first.idle_s * ideal > lost_s / 2 else "compute"
    return limit


def curves_json(cells: Sequence[Cell]) -> dict[str, Any]:
    """`curves` and `limits` of scaling.json."""
    curves = {mode: curve_of(cells, mode) for mode in _modes(cells)}
    limits = {}
    for mode, points in curves.items():
        if points:
            limit, lost_s = limit_of(points)
            limits[mode] = {"limit": limit, "lost_s": lost_s, **_brief(points[-1]), "from_gpus": points[0].gpus}
    measured = {
        mode: [{**asdict(point), "tokens_per_gpu_s": point.tokens_per_gpu_s} for point in points]
        for mode, points in curves.items()
    }
    return {"curves": measured, "limits": limits}


def _brief(point: Measurement) -> dict[str, float]:
    return {"gpus": point.gpus, "efficiency_ratio": point.efficiency_ratio, "step_s": point.step_s}


def _modes(cells: Sequence[Cell]) -> list[Mode]:
    found: list[Mode] = ["weak", "strong"]
    return [mode for mode in found if any(cell["mode"] == mode for cell in cells)]


def projection_json(
    cells: Sequence[Cell], recipe: Recipe, config: ModelConfig | None, between: Link, per_node: int, nodes: int
) -> dict[str, Any]:
    """`projection` of scaling.json: measured curves extended to `nodes` nodes of `per_node` GPUs.

    Args: recipe: as a cell of several processes resolved it.
    Returns: {"reason": why there is none} where the model, the link or the share that is hidden are not known.
    """
    link = _measured_link(cells)
    if config is None:
        return {"reason": "the formulas do not know this model"}
    if link is None:
        return {"reason": "no link was measured: it takes two GPUs"}
    cluster = Cluster(per_node, link, between)
    found: dict[str, Any] = {}
    for mode in _modes(cells):
        if (projected := _project(cells, mode, recipe, config, cluster, nodes)) is not None:
            found[mode] = projected
    facts = {"nodes": nodes, "cluster": asdict(cluster)}
    return {**facts, "modes": found} if found else {**facts, "reason": "nothing was measured that overlaps"}


def _project(
    cells: Sequence[Cell], mode: Mode, recipe: Recipe, config: ModelConfig, cluster: Cluster, nodes: int
) -> dict[str, Any] | None:
    points = curve_of(cells, mode)
    several = [(point, _layout(cells, point)) for point in points if point.gpus > 1]
    if not several:
        return None
    formats = formats_of(recipe)
    measured = []
    for point, layout in several:
        messages = step_messages(config, recipe.method, layout, formats, _work(cells, point, layout))
        measured.append(Measured(point.step_s, point.parts, talk(messages, layout, cluster)))
    overlap = fit_hidden(measured)
    if overlap is None:
        return None
    last, layout = several[-1]
    work = _work(cells, last, layout)
    curve = Curve(config, recipe.method, layout, formats, work, last.parts, overlap.hidden_ratio, mode)
    base = points[0].tokens_per_gpu_s
    extended = [
        {**asdict(point), "efficiency_ratio": point.tokens_per_s / point.gpus / base}
        for point in extend(curve, cluster, nodes)
        if point.gpus > last.gpus
    ]
    return {**asdict(overlap), "points": extended}


def _cell(cells: Sequence[Cell], point: Measurement) -> Cell:
    return next(c for c in cells if c["status"] == "ok" and (c["mode"], c["gpus"]) == (point.mode, point.gpus))


def _layout(cells: Sequence[Cell], point: Measurement) -> Layout:
    saved = _cell(cells, point)["summary"]["layout"]
    return Layout(**{**saved, "blocks": tuple(saved["blocks"])})


def _work(cells: Sequence[Cell], point: Measurement, layout: Layout) -> Work:
    """One process's part of a step: the step's micro-batches divided among the data-parallel processes."""
    micro_batches, tokens = _cell(cells, point)["micro_batches"], _cell(cells, point)["summary"]["tokens_per_step"]
    return Work(tokens // micro_batches, micro_batches // layout.data)


def _measured_link(cells: Sequence[Cell]) -> Link | None:
    """The link of the most processes that measured one."""
    found = [cell for cell in cells if cell["status"] == "ok" and cell["summary"]["link"] is not None]
    return Link(**max(found, key=lambda cell: cell["gpus"])["summary"]["link"]) if found else None
