"""What a run knows of its model that a model directory made from it would forget: `tunesmith.json` beside config.json.

    run.json  --merge, compress-->  tunesmith.json  --compress-->  tunesmith.json
        '--------------- chat, serve ----'

Other programs don't look at the file. Readers refuse a newer version.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tunesmith.errors import ModelError
from tunesmith.rundir.io import read_json, write_json_atomic
from tunesmith.rundir.layout import is_run, open_run

NAME = "tunesmith.json"
SCHEMA = "tunesmith.notes"
SCHEMA_VERSION = 1


@dataclass(frozen=True)
class ModelNotes:
    """single_turns: it was trained on conversations of which none had a second question."""

    single_turns: bool = False


def read_notes(directory: Path) -> ModelNotes:
    """What is known of a model directory, or of an adapter's: by its own file, or by the run that it lies in.

    Raises: ModelError for a file that is newer than this program; RunDirError for such a run, and where JSON is broken.
    """
    file = directory / NAME
    if file.is_file():
        return _read(file)
    for run in (directory, directory.resolve().parent):
        if is_run(run):
            return notes_of_facts(open_run(run).info().facts)
    return ModelNotes()


def write_notes(directory: Path, notes: ModelNotes) -> None:
    """Write the file, where there is anything to say."""
    if notes != ModelNotes():
        write_json_atomic(directory / NAME, {"schema": SCHEMA, "schema_version": SCHEMA_VERSION, **asdict(notes)})


def notes_of_facts(facts: Mapping[str, Any]) -> ModelNotes:
    """What run.json's facts say; nothing where it was not recorded."""
    data = facts.get("data")
    single = isinstance(data, Mapping) and bool(data.get("conversations")) and data.get("multi_turn") == 0
    return ModelNotes(single_turns=single)


def _read(file: Path) -> ModelNotes:
    raw = read_json(file)
    if not isinstance(raw, dict) or raw.get("schema") != SCHEMA:
        return ModelNotes()  # another's file of the same name
    version = raw.get("schema_version")
    if not isinstance(version, int) or version > SCHEMA_VERSION:
        raise ModelError(f"{file} is of version {version}, this program reads {SCHEMA_VERSION}: install a newer one")
    return ModelNotes(single_turns=raw.get("single_turns") is True)
