"""`tunesmith recipe init` asks a person at a terminal, and nobody else; `schema` explains every key."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tunesmith.cli import main
from tunesmith.cli.recipe import app
from tunesmith.errors import DataError, ModelError, RecipeError
from tunesmith.recipe.explain import all_keys
from tunesmith.recipe.load import load_recipe
from tunesmith.recipe.table import key_rows


def typed_at_a_terminal(answers: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """`tunesmith recipe init r.yaml` in `folder`, answered at a pseudo-terminal."""
    ours, theirs = pty.openpty()
    os.write(ours, answers.encode())
    program = "from tunesmith.cli.main import main; main(['recipe', 'init', 'r.yaml'])"
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=folder,
        stdin=theirs,
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONUTF8": "1"},
    )
    os.close(theirs)
    os.close(ours)
    return done


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a model's configuration and a data file."""
    (tmp_path / "model-folder").mkdir()
    (tmp_path / "model-folder" / "config.json").write_text("{}", encoding="utf-8")
    (tmp_path / "问答.json").write_text("[]", encoding="utf-8")
    return tmp_path


def test_a_person_is_asked_and_the_answers_are_written(folder: Path) -> None:
    """In the order of --help, which they were not."""
    done = typed_at_a_terminal("model-folder\n问答.json\nqlora\nmy runs\n", folder)
    assert done.returncode == 0, done.stderr
    recipe = load_recipe(folder / "r.yaml")
    assert (recipe.output, recipe.model.path, recipe.method.kind, recipe.data.train) == (
        "my runs",
        "model-folder",
        "qlora",
        ["问答.json"],
    )


def test_a_wrong_answer_is_said_and_asked_again(folder: Path) -> None:
    """What was not there was written into the recipe, and found when training began."""
    answers = "nowhere\nmodel-folder\ngone.json\nbuiltin:shpo\n问答.json\nqlorra\nqlora\n问答.json\nruns\n"
    done = typed_at_a_terminal(answers, folder)
    assert done.returncode == 0, done.stderr
    recipe = load_recipe(folder / "r.yaml")
    assert (recipe.output, recipe.model.path, recipe.method.kind) == ("runs", "model-folder", "qlora")
    said = [
        "directory 'nowhere'",
        "no file or folder gone.json",
        "did you mean 'shop'",
        "did you mean 'qlora'",
        "is a file",
    ]
    places = [done.stderr.find(words) for words in said]
    assert -1 not in places, done.stderr
    assert places == sorted(places)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (["--method", "lorra"], RecipeError, "did you mean 'lora'"),
        (["--data", "gone.json"], DataError, "no file or folder gone.json"),
        (["--model", "nowhere"], ModelError, "directory 'nowhere'"),
        (["--model", "."], ModelError, "no config.json"),
    ],
)
def test_a_wrong_option_writes_nothing(
    options: list[str], error: type[Exception], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    good = {"--model": "builtin:tiny", "--data": "builtin:shop"} | dict([options])
    with pytest.raises(error, match=re.escape(message)):
        app(["init", "r.yaml", *(word for pair in good.items() for word in pair)], standalone_mode=False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("options", "missing"), [([], "--model and --data"), (["--data", "builtin:shop"], "--model ")])
def test_with_nobody_to_ask_the_options_are_named(options: list[str], missing: str, tmp_path: Path) -> None:
    """A recipe of defaults was written without a word."""
    program = f"from tunesmith.cli.main import main; main({['recipe', 'init', 'r.yaml', *options]!r})"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert f"there is no terminal to ask at: give {missing}" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_every_key_has_a_row_with_its_meaning() -> None:
    rows = {row.key: row for row in key_rows()}
    assert list(rows) == all_keys()
    assert [key for key, row in rows.items() if not (row.meaning and row.default and row.allowed)] == []
    assert (rows["method.kind"].default, rows["method.kind"].allowed) == ("lora", "full | freeze | lora | qlora")
    assert (rows["train.epochs"].default, rows["train.epochs"].allowed) == ("not set", "number > 0")
    assert rows["data.validation_fraction"].allowed == "number >= 0, < 1"
    assert rows["log.trackers"].default == "[tensorboard]"


def test_the_schema_is_a_line_a_key_and_json_when_asked(capsys: pytest.CaptureFixture[str]) -> None:
    """It was JSON Schema alone, where the README promised a line for each setting."""
    assert main.run(["recipe", "schema"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + len(all_keys())
    assert any(re.match(r"train\.epochs +not set +number > 0 +passes over", line) for line in lines)
    assert main.run(["recipe", "schema", "--format", "json"]) == 0
    assert "learning_rate" in json.loads(capsys.readouterr().out)["$defs"]["TrainSection"]["properties"]
    assert main.run(["recipe", "schema", "--json"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1
