"""A row: tunesmith and its peers on one recipe, round after round, each in a fresh process; the record is one JSON."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tunesmith.bench.matrix import recipe_hash
from tunesmith.bench.peers.processes import Said, run_module
from tunesmith.bench.peers.store import OURS, new_record, save_record
from tunesmith.bench.peers.timing import timing_of
from tunesmith.errors import RecipeError, TunesmithError, nearest
from tunesmith.recipe.schema import Recipe
from tunesmith.rundir.environment import environment_fingerprint

_PACKAGE = __name__.rpartition(".")[0]
PEERS = ("transformers", "liger", "bitsandbytes", "unsloth", "trl")
MODULES: Mapping[str, str] = {OURS: f"{_PACKAGE}.ours", **{peer: f"{_PACKAGE}.{peer}" for peer in PEERS}}
LOADS_A_CHECKPOINT = frozenset({"unsloth"})
Progress = Callable[[Mapping[str, Any]], None]


@dataclass(frozen=True)
class Comparison:
    """Where the record is, and the record."""

    path: Path
    record: dict[str, Any]

    @property
    def ours_measured(self) -> bool:
        """Whether tunesmith's own row was measured in every round."""
        return all(row["status"] == "ok" for row in self.record["rows"] if row["peer"] == OURS)


def compare(
    recipe: Recipe,
    peers: Sequence[str] = PEERS,
    *,
    rounds: int = 2,
    out: Path,
    peer_paths: Mapping[str, Path] | None = None,
    tokenizer: Path | None = None,
    command: str = "tunesmith bench peers",
    progress: Progress | None = None,
    modules: Mapping[str, str] = MODULES,
) -> Comparison:
    """Run one recipe by tunesmith and by every peer in `rounds` rounds, and store the record under `out`.

    The record is written after every whole round, so that a run that is stopped keeps the rounds before.

    Args:
        peer_paths: folders of packages that a peer is found in, by the peer's name.
        tokenizer: what goes beside random weights for peers that load a checkpoint; None: the embedded model's.
        modules: the runners, by name.

    Raises: RecipeError for a peer that is not known; TunesmithError when what all share can't be made.
    """
    paths = dict(peer_paths or {})
    _check_names([*peers, *paths], modules)
    started = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    rows: list[dict[str, Any]] = []
    done: Comparison | None = None
    with tempfile.TemporaryDirectory(prefix="tunesmith-peers-") as scratch:
        prepared = _prepare(recipe, Path(scratch), bool(LOADS_A_CHECKPOINT & {*peers}), tokenizer)
        for round_ in range(rounds):
            turns = [(round_, name) for name in (OURS, *peers)]
            rows += _run_turns(turns, prepared, paths, modules, recipe.bench.timeout_s, progress, len(rows))
            record = _record(recipe, prepared, command, started, rounds, rows)
            done = Comparison(save_record(record, out, None if done is None else done.path), record)
    if done is None:
        raise RecipeError(f"a comparison takes at least one round, got {rounds}")
    return done


def _record(
    recipe: Recipe, prepared: Mapping[str, Any], command: str, started: str, rounds: int, rows: list[dict[str, Any]]
) -> dict[str, Any]:
    resolved = prepared["job"]["recipe"]
    return new_record(
        recipe=recipe.model_dump(mode="json"),
        recipe_hash=recipe_hash(recipe.model_dump(mode="json")),
        resolved=resolved,
        lengths=prepared["lengths"],
        chip=prepared["chip"],
        environment=environment_fingerprint(),
        command=command,
        started=started,
        timing=timing_of(torch.device(resolved["model"]["device"])),
        rounds_asked=rounds,
        rows=rows,
    )


def _check_names(names: Sequence[str], modules: Mapping[str, str]) -> None:
    known = [name for name in modules if name != OURS]
    for name in names:
        if name not in known:
            raise RecipeError(f"there is no peer {name!r}{nearest(name, known)} (there are: {', '.join(known)})")


def _prepare(recipe: Recipe, scratch: Path, checkpoint: bool, tokenizer: Path | None) -> dict[str, Any]:
    """The job and what goes with it, made in a process of its own so that this one never touches the device."""
    request = {
        "recipe": recipe.model_dump(mode="json"),
        "scratch": str(scratch),
        "checkpoint": checkpoint,
        "tokenizer": None if tokenizer is None else str(tokenizer),
    }
    said = run_module(f"{_PACKAGE}.prepare", request, timeout_s=recipe.bench.timeout_s)
    if said.status != "ok":
        raise TunesmithError(f"the row could not be prepared: {said.reason}")
    return said.result


def _run_turns(
    turns: Sequence[tuple[int, str]],
    prepared: Mapping[str, Any],
    paths: Mapping[str, Path],
    modules: Mapping[str, str],
    timeout_s: float,
    progress: Progress | None,
    first_order: int = 0,
) -> list[dict[str, Any]]:
    rows = []
    for order, (round_, name) in enumerate(turns, first_order):
        began = time.monotonic()
        said = run_module(modules[name], prepared["job"], timeout_s=timeout_s, path=paths.get(name))
        row = _row(name, round_, order, said)
        rows.append({**row, "wall_s": time.monotonic() - began})
        if progress is not None:
            progress(rows[-1])
    return rows


def _row(name: str, round_: int, order: int, said: Said) -> dict[str, Any]:
    row = {
        "peer": name,
        "round": round_,
        "order": order,
        "status": said.status,
        "reason": said.reason,
        "steps": list(said.steps),
        **said.result,
    }
    return row if said.status == "ok" else {**row, "log_tail": said.log_tail}
