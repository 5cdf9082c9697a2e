"""What the processes of one scaling cell measured, as one: the step, its parts, memory beside the formula.

The JSON of a cell, version 1: `cells/<mode>-<gpus>-<repeat>.json` of a scaling run's directory.

    name, mode, gpus, repeat        weak-4, weak or strong, processes, which repeat
    status, reason, command, log    as in a bench's cells
    recipe, recipe_hash             as it was asked for
    ranks                           what each process measured, by rank
    summary                         step_s, steps_s, tokens_per_s, tokens_per_step, parts (compute_s, exposed_s, data_s,
                                    optimizer_s), waiting_s and idle_s (see `summarise`), memory, states, link, layout
    environment                     the fingerprint
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from tunesmith.arch import ModelConfig
from tunesmith.cost.collectives import fit_link
from tunesmith.cost.memory import OwnerBytes
from tunesmith.cost.scaling import Parts
from tunesmith.cost.shards import Formats, Layout, rank_states
from tunesmith.parallel.stages import plan_stages
from tunesmith.recipe.schema import Recipe

OWNERS = ("weights", "adapters", "gradients", "optimizer")
Rank = Mapping[str, Any]


def layout_of(recipe: Recipe, mesh: Mapping[str, int], config: ModelConfig | None) -> Layout:
    """How a resolved recipe's states are shared among the processes of a mesh."""
    strategy = recipe.parallel.strategy
    shared = "ddp" if strategy == "auto" or mesh["dp"] == 1 else strategy
    stages = plan_stages(config, mesh["pp"]) if config is not None and mesh["pp"] > 1 else []
    return Layout(shared, mesh["dp"], mesh["tp"], mesh["pp"], tuple(len(stage) for stage in stages))


def formats_of(recipe: Recipe) -> Formats:
    """The number formats of a resolved recipe."""
    assert recipe.model.dtype != "auto" and recipe.train.precision != "auto"
    compute = recipe.train.precision
    master = compute if recipe.train.master_weights == "compute" else "float32"
    return Formats(recipe.model.dtype, master, compute, recipe.train.optimizer)


def summarise(ranks: Sequence[Rank], recipe: Recipe, config: ModelConfig | None) -> dict[str, Any]:
    """One cell from its processes.

    A step ends when its last process does. exposed_s is the mean over the processes; waiting_s the part of it above
    the least of them: time that some wait for others, rather than for bytes. idle_s: nothing ran on the device, the
    host being late; it is in compute_s too. data_s and optimizer_s are the slowest process's.
    Args: recipe: as resolved. config: None where the formulas do not know the model. Under DeepSpeed, which keeps
    buffers of its own, states are measured and not compared.
    """
    steps_s = [max(values) for values in zip(*(rank["steps_s"] for rank in ranks), strict=True)]
    step_s = statistics.median(steps_s)
    layout = layout_of(recipe, ranks[0]["mesh"], config)
    work = ranks[0]["work"]  # of all processes together
    tokens = work["tokens"] // work["steps"]
    parts, waiting_s, idle_s = _parts(ranks, step_s)
    return {
        "step_s": step_s,
        "steps_s": steps_s,
        "tokens_per_step": tokens,
        "tokens_per_s": tokens / step_s,
        "parts": asdict(parts),
        "waiting_s": waiting_s,
        "idle_s": idle_s,
        "memory": _memory(ranks),
        "states": _states(ranks, recipe, config if recipe.parallel.engine == "native" else None, layout),
        "link": _link(ranks),
        "layout": asdict(layout),
        "device": ranks[0]["device"],
        "losses": ranks[0]["losses"],
        "setup_s": max(rank["setup_s"] for rank in ranks),
    }


def _parts(ranks: Sequence[Rank], step_s: float) -> tuple[Parts, float, float | None]:
    """The step's parts, what of the exposed communication is waiting, and the time in which nothing ran."""
    data_s = max(rank["data_wait_s"] for rank in ranks)
    optimizer_s = max(rank["optimizer_s"] or 0.0 for rank in ranks)
    splits = [rank["split"] for rank in ranks if rank["split"] is not None]
    exposed = [split["exposed_ratio"] * step_s for split in splits] if len(ranks) > 1 else []
    exposed_s = statistics.fmean(exposed) if exposed else 0.0
    idle_s = statistics.fmean(split["idle_ratio"] for split in splits) * step_s if splits else None
    compute_s = max(0.0, step_s - exposed_s - data_s - optimizer_s)
    parts = Parts(compute_s, exposed_s, data_s, optimizer_s)
    return parts, exposed_s - min(exposed, default=0.0), idle_s


def _memory(ranks: Sequence[Rank]) -> dict[str, int | None]:
    """The most of any process; None where it was not measured."""
    names = ranks[0]["memory"].keys()
    found = {name: [rank["memory"][name] for rank in ranks if rank["memory"][name] is not None] for name in names}
    return {name: max(values) if values else None for name, values in found.items()}


def _states(ranks: Sequence[Rank], recipe: Recipe, config: ModelConfig | None, layout: Layout) -> dict[str, Any] | None:
    """Model states measured and by formula, of the process that holds most, and the worst difference of any."""
    rows = [_rank_states(rank, recipe, config, layout) for rank in ranks if rank["states"] is not None]
    if not rows:
        return None
    most = max(rows, key=lambda row: row["measured"]["total_bytes"])
    differences = [row["difference_percent"] for row in rows if row["difference_percent"] is not None]
    return {**most, "difference_percent": max(differences, key=abs, default=None), "ranks": rows}


def _rank_states(rank: Rank, recipe: Recipe, config: ModelConfig | None, layout: Layout) -> dict[str, Any]:
    measured = {**rank["states"], "total_bytes": sum(rank["states"].values())}
    row = {"rank": rank["rank"], "measured": measured, "formula": None, "difference_percent": None}
    if config is None:
        return row
    states = rank_states(config, recipe.method, layout, formats_of(recipe), stage=rank["place"]["pp"])
    formula = {**owner_mapping(states.held), "gathered_bytes": states.gathered}
    difference = measured["total_bytes"] / formula["total_bytes"] - 1
    return {**row, "formula": formula, "difference_percent": 100 * difference}


def owner_mapping(owners: OwnerBytes) -> dict[str, int]:
    """Bytes by owner, as a measurement's JSON has them."""
    return {**{f"{owner}_bytes": getattr(owners, owner) for owner in OWNERS}, "total_bytes": owners.total}


def _link(ranks: Sequence[Rank]) -> dict[str, float] | None:
    """The link between the processes as all-reduces measured it."""
    timings = [(float(size), float(seconds)) for size, seconds in ranks[0]["links"]]
    link = fit_link("all_reduce", len(ranks), timings)
    return None if link is None else asdict(link)
