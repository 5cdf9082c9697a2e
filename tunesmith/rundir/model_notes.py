"""What a run knows of its model that a model directory made from it would forget: `tunesmith.json` beside config.json.

    run.json, recipe.yaml  --merge, compress-->  tunesmith.json  --compress-->  tunesmith.json
        '--------------- chat, serve ---------------------'

Other programs don't look at the file. Readers refuse a newer version.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from tunesmith.errors import ModelError, RunDirError
from tunesmith.rundir.io import read_json, write_json_atomic
from tunesmith.rundir.layout import RunDir, is_run, open_run

NAME = "tunesmith.json"
SCHEMA = "tunesmith.notes"
SCHEMA_VERSION = 1


@dataclass(frozen=True)
class ModelNotes:
    """How it was trained, where that says how to ask it.

    single_turns: on conversations of which none had a second question; system: what stood before conversations that
    had no system message of their own; template_arguments: switches of its chat template, such as enable_thinking.
    """

    single_turns: bool = False
    system: str | None = None
    template_arguments: dict[str, Any] = field(default_factory=dict)


def read_notes(directory: Path) -> ModelNotes:
    """What is known of a model directory, or of an adapter's: by its own file, or by the run that it lies in.

    Raises: ModelError for a file that is newer than this program; RunDirError for such a run, and where JSON or a
    recipe is broken.
    """
    file = directory / NAME
    if file.is_file():
        return _read(file)
    for run in (directory, directory.resolve().parent):
        if is_run(run):
            return _of_run(open_run(run))
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


def _of_run(run: RunDir) -> ModelNotes:
    known = notes_of_facts(run.info().facts)
    try:
        recipe = yaml.safe_load(run.recipe.read_text(encoding="utf-8")) if run.recipe.is_file() else None
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise RunDirError(f"{run.recipe} can't be read: {' '.join(str(error).split())}") from error
    data = recipe.get("data") if isinstance(recipe, dict) else None
    return replace(known, **_how_asked(data)) if isinstance(data, dict) else known


def _how_asked(raw: Mapping[str, Any]) -> dict[str, Any]:
    """What a recipe's data section and the file both have, each only where it is what it should be."""
    system, arguments = raw.get("system"), raw.get("template_arguments")
    return {
        "system": system if isinstance(system, str) else None,
        "template_arguments": arguments if isinstance(arguments, dict) else {},
    }


def _read(file: Path) -> ModelNotes:
    raw = read_json(file)
    if not isinstance(raw, dict) or raw.get("schema") != SCHEMA:
        return ModelNotes()  # another's file of the same name
    version = raw.get("schema_version")
    if not isinstance(version, int) or version > SCHEMA_VERSION:
        raise ModelError(f"{file} is of version {version}, this program reads {SCHEMA_VERSION}: install a newer one")
    return ModelNotes(single_turns=raw.get("single_turns") is True, **_how_asked(raw))
