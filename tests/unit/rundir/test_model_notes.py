"""tunesmith.json: what a model directory remembers of the run that it was made from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tunesmith.errors import ModelError, RunDirError
from tunesmith.recipe.schema import DataSection, Recipe
from tunesmith.rundir.layout import create_run
from tunesmith.rundir.model_notes import NAME, ModelNotes, notes_of_facts, read_notes, write_notes

SINGLE = {"data": {"conversations": 5, "multi_turn": 0}}


def test_what_is_written_is_read_and_nothing_is_said_of_nothing(tmp_path: Path) -> None:
    assert read_notes(tmp_path) == ModelNotes()
    write_notes(tmp_path, ModelNotes())
    assert not (tmp_path / NAME).exists()
    write_notes(tmp_path, ModelNotes(single_turns=True))
    assert read_notes(tmp_path) == ModelNotes(single_turns=True)
    assert json.loads((tmp_path / NAME).read_text())["schema_version"] == 1


def test_only_what_was_recorded_is_known() -> None:
    assert notes_of_facts(SINGLE).single_turns
    for facts in ({}, {"data": None}, {"data": {"conversations": 0, "multi_turn": 0}}, {"data": {"conversations": 5}}):
        assert not notes_of_facts(facts).single_turns


def test_a_run_says_how_its_model_is_asked(tmp_path: Path) -> None:
    data = DataSection(system="答得简短", template_arguments={"enable_thinking": False})
    run = create_run(Recipe(output=str(tmp_path), data=data), path=tmp_path / "run")
    run.set_status("finished", **SINGLE)
    (run.path / "final").mkdir()
    known = read_notes(run.path / "final")
    assert known == read_notes(run.path)
    assert known == ModelNotes(True, "答得简短", {"enable_thinking": False})
    write_notes(tmp_path, known)
    assert read_notes(tmp_path) == known
    for broken in (b"data: [", b"\xff\xfe"):
        run.recipe.write_bytes(broken)
        with pytest.raises(RunDirError, match=r"recipe.yaml can't be read"):
            read_notes(run.path)
    run.recipe.unlink()
    assert read_notes(run.path) == ModelNotes(True)


def test_what_is_not_what_it_should_be_says_nothing(tmp_path: Path) -> None:
    told = {"schema": "tunesmith.notes", "schema_version": 1, "system": 5, "template_arguments": ["x"]}
    (tmp_path / NAME).write_text(json.dumps(told))
    assert read_notes(tmp_path) == ModelNotes()


def test_a_newer_file_is_refused_a_foreign_one_says_nothing_a_broken_one_is_named(tmp_path: Path) -> None:
    file = tmp_path / NAME
    file.write_text('{"schema": "tunesmith.notes", "schema_version": 2, "single_turns": true}')
    with pytest.raises(ModelError, match=r"tunesmith.json is of version 2"):
        read_notes(tmp_path)
    file.write_text('{"single_turns": true}')
    assert read_notes(tmp_path) == ModelNotes()
    file.write_text("{")
    with pytest.raises(RunDirError, match=r"tunesmith.json is not valid JSON"):
        read_notes(tmp_path)
