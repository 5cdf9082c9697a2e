"""Run directories: made unique, read by version, never half there."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tunesmith import __version__
from tunesmith.errors import RunDirError
from tunesmith.recipe.load import load_recipe
from tunesmith.recipe.schema import Recipe
from tunesmith.rundir import layout
from tunesmith.rundir.io import read_json, write_json_atomic
from tunesmith.rundir.layout import RunDir, claim_run, create_run, is_run, migrate, open_run


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    return Recipe(name="my shop", output=str(tmp_path / "runs"))


def test_a_new_run_has_recipe_environment_and_status(recipe: Recipe) -> None:
    run = create_run(recipe, kind="bench")
    info = run.info()
    assert run.path.name.startswith("my-shop-20")
    assert (info.kind, info.status, info.name, info.tunesmith_version) == ("bench", "running", "my shop", __version__)
    assert info.ended_at is None
    assert load_recipe(run.recipe) == recipe
    assert read_json(run.environment)["packages"]["torch"]
    assert is_run(run.path)


def test_a_launched_run_records_what_was_typed(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It recorded "rank.py LOGS train ...", the command of the process that the launcher had started."""
    typed = ["launch", "--nproc", "2", "train", "我的.yaml"]
    monkeypatch.setattr("sys.argv", ["/usr/bin/tunesmith", *typed])
    path = claim_run("", "", tmp_path / "run")
    monkeypatch.setattr("sys.argv", ["rank.py", "logs", "train", "我的.yaml"])
    run = create_run(recipe, path=path)
    assert run.info().command == ("tunesmith", *typed)
    assert [found.name for found in path.iterdir() if found.name.startswith(".")] == []
    monkeypatch.setattr("sys.argv", ["/x/tunesmith/__main__.py", "train"])
    assert create_run(recipe).info().command == ("tunesmith", "train")


def test_names_are_unique_when_many_start_at_once(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "environment_fingerprint", dict)
    with ThreadPoolExecutor(16) as pool:
        paths = [run.path for run in pool.map(lambda _: create_run(recipe), range(48))]
    assert len(set(paths)) == 48
    assert all(is_run(path) for path in paths)


def test_a_named_directory_must_be_empty(recipe: Recipe, tmp_path: Path) -> None:
    run = create_run(recipe, path=tmp_path / "深" / "here")
    assert run.path == tmp_path / "深" / "here"
    with pytest.raises(RunDirError, match="not empty"):
        create_run(recipe, path=tmp_path / "深" / "here")


def test_the_status_and_facts_are_recorded(recipe: Recipe) -> None:
    run = create_run(recipe)
    run.set_status("running", device="cpu")
    run.set_status("failed", error="out of memory", steps=3)
    info = open_run(run.path).info()
    assert (info.status, info.error, info.facts) == ("failed", "out of memory", {"device": "cpu", "steps": 3})
    assert info.ended_at is not None
    with pytest.raises(ValueError, match="status must be one of running"):
        run.set_status("dead")  # type: ignore[arg-type]


def test_what_is_not_a_run_is_named(recipe: Recipe, tmp_path: Path) -> None:
    run = create_run(recipe)
    with pytest.raises(RunDirError, match=f"there is no run directory .*{run.path.name}"):
        open_run(run.path.parent / "nothing")
    with pytest.raises(RunDirError, match=r"not a run directory: it has no run\.json"):
        open_run(tmp_path)


@pytest.mark.parametrize("version", [None, "1", True])
def test_a_foreign_file_is_refused(recipe: Recipe, version: object) -> None:
    run = create_run(recipe)
    write_json_atomic(run.run, {**read_json(run.run), "schema_version": version})
    with pytest.raises(RunDirError, match="tunesmith did not write it"):
        open_run(run.path)


def test_a_newer_version_is_refused_with_the_next_command(recipe: Recipe) -> None:
    run = create_run(recipe)
    write_json_atomic(run.run, {**read_json(run.run), "schema_version": layout.SCHEMA_VERSION + 1})
    with pytest.raises(RunDirError, match="pip install --upgrade tunesmith"):
        open_run(run.path)
    with pytest.raises(RunDirError):
        run.set_status("finished")


def test_an_older_version_is_brought_up_step_by_step(tmp_path: Path) -> None:
    old = {"schema_version": 1, "title": "a"}
    steps = {
        1: lambda raw: {"name": raw["title"]},
        2: lambda raw: {**raw, "name": raw["name"].upper()},
    }
    assert migrate(old, 3, steps, tmp_path) == {"name": "A", "schema_version": 3}
    assert old == {"schema_version": 1, "title": "a"}
    with pytest.raises(RunDirError, match="can't bring up"):
        migrate({"schema_version": 0}, 3, steps, tmp_path)


def test_a_lacking_key_is_named(recipe: Recipe) -> None:
    run = create_run(recipe)
    raw = read_json(run.run)
    del raw["kind"]
    run.run.write_text(json.dumps(raw), encoding="utf-8")
    with pytest.raises(RunDirError, match="lacks the key 'kind'"):
        open_run(run.path)


def test_all_paths_lie_inside(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    names = [name for name, value in vars(RunDir).items() if isinstance(value, property)]
    paths = [getattr(run, name) for name in names]
    assert all(path.parent == tmp_path for path in paths)
    assert len(set(paths)) == len(paths) == 10


def test_the_runs_there_are_are_named_as_they_are_typed(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was "there is no run directory nope; . holds prof", and of a folder of runs "it has no run.json"."""
    monkeypatch.chdir(tmp_path)
    create_run(recipe, path=Path("runs/one"))
    create_run(recipe, path=Path("other"))
    Path("mine.json").write_text("[]", encoding="utf-8")
    with pytest.raises(RunDirError, match=r"there is no run directory nope; there are: runs/one$"):
        open_run("nope")
    with pytest.raises(RunDirError, match=r"mine\.json is a file, a run is a directory; there are: runs/one$"):
        open_run("mine.json")
    with pytest.raises(RunDirError, match=r"runs holds runs and is none itself: name one of them: runs/one$"):
        open_run("runs")


def test_a_folder_that_cannot_be_made_is_said_to_be_the_runs(recipe: Recipe, tmp_path: Path) -> None:
    """The system's words stood there alone."""
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(
        RunDirError, match=r"the run directory .*file/x can't be made \(Not a directory\): name another"
    ):
        create_run(recipe, path=tmp_path / "file" / "x")
