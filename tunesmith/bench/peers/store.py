"""The records of rows that ran: one JSON for each run, `<chip>/<row>-<time>.json`, so that results add up by copying.

key       chip, driver, torch, commit ("+changes" where files differed from it), row, recipe_hash, timing (how the
          steps were timed, see timing.py; version 1 had one way): what rows that are pooled have in common
rounds    whole rounds that the rows are of; rounds_asked: as many were asked for (neither is in version 1)
recipe, resolved, lengths   as given; as it ran; the document lengths of the first micro-batch
environment, command, started
rows      in the order they ran: peer, round, status, reason, steps (seconds, loss, grad_norm), memory, dtypes,
          versions, ...
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tunesmith.bench.peers.timing import IDLE_TO_IDLE
from tunesmith.errors import RunDirError
from tunesmith.rundir.io import read_json, write_json_atomic

SCHEMA, VERSION = "tunesmith.bench.peers", 2
OURS = "tunesmith"
TABLE = "peers"


def new_record(
    *,
    recipe: Mapping[str, Any],
    recipe_hash: str,
    resolved: Mapping[str, Any],
    lengths: Sequence[int],
    chip: str | None,
    environment: Mapping[str, Any],
    command: str,
    started: str,
    timing: str,
    rounds_asked: int,
    rows: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """One run's record, of the whole rounds that `rows` are."""
    key = {
        "chip": chip or "unknown",
        "driver": environment.get("driver"),
        "torch": environment["packages"].get("torch"),
        "commit": _commit(environment.get("git")),
        "row": recipe["name"],
        "recipe_hash": recipe_hash,
        "timing": timing,
    }
    return {
        "schema": SCHEMA,
        "schema_version": VERSION,
        "key": key,
        "recipe": dict(recipe),
        "resolved": dict(resolved),
        "lengths": list(lengths),
        "environment": dict(environment),
        "command": command,
        "started": started,
        "rounds": len({row["round"] for row in rows}),
        "rounds_asked": rounds_asked,
        "rows": list(rows),
    }


def _commit(git: Mapping[str, Any] | None) -> str | None:
    if git is None:
        return None
    return str(git["commit"])[:12] + ("+changes" if git.get("dirty") else "")


def save_record(record: Mapping[str, Any], out: Path, replaced: Path | None = None) -> Path:
    """Write a record where no other is, or over the same run's of fewer rounds. Returns: where."""
    path = replaced or _free_path(record, out)
    write_json_atomic(path, record)
    return path


def _free_path(record: Mapping[str, Any], out: Path) -> Path:
    folder = out / slug(record["key"]["chip"])
    folder.mkdir(parents=True, exist_ok=True)
    moment = re.sub(r"[^0-9]", "", record["started"])
    return folder / f"{slug(record['key']['row'])}-{moment}-{secrets.token_hex(2)}.json"


def slug(text: str) -> str:
    """A name that a file may have: lower case, digits, dots and dashes."""
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-.")[:60] or "unknown"


def load_records(out: Path) -> list[dict[str, Any]]:
    """Every record below `out`, oldest first. Raises: RunDirError where there is none, or one of a newer version."""
    records = []
    for path in sorted(out.rglob("*.json")):
        record = read_json(path)
        if not isinstance(record, dict) or record.get("schema") != SCHEMA or "rows" not in record:
            continue
        if record["schema_version"] > VERSION:
            raise RunDirError(f"{path} has version {record['schema_version']}, this tunesmith reads up to {VERSION}")
        records.append(_brought_up(record))
    if not records:
        raise RunDirError(f"{out} holds no record of a row: run tunesmith bench peers RECIPE first")
    return sorted(records, key=lambda record: record["started"])


def _brought_up(record: dict[str, Any]) -> dict[str, Any]:
    """The record with what version 1 did not say: there was one way of timing."""
    return {**record, "key": {"timing": IDLE_TO_IDLE, **record["key"]}}
