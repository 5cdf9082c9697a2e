"""`tunesmith recipe init` asks a person at a terminal, and nobody else."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from tunesmith.cli.recipe import app
from tunesmith.errors import RecipeError
from tunesmith.recipe.load import load_recipe


def test_a_person_is_asked_and_the_answers_are_written(tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    os.write(ours, "my runs\nmodel-folder\nqlora\n问答.json\n".encode())
    program = "from tunesmith.cli.main import main; main(['recipe', 'init', 'r.yaml'])"
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        stdin=theirs,
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONUTF8": "1"},
    )
    os.close(theirs)
    os.close(ours)
    assert done.returncode == 0, done.stderr
    assert "method (full, lora or qlora)" in done.stderr
    recipe = load_recipe(tmp_path / "r.yaml")
    assert (recipe.output, recipe.model.path, recipe.method.kind, recipe.data.train) == (
        "my runs",
        "model-folder",
        "qlora",
        ["问答.json"],
    )


def test_a_wrong_answer_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="did you mean 'lora'"):
        app(["init", str(tmp_path / "r.yaml"), "--method", "lorra", "--data", "x"], standalone_mode=False)
    assert list(tmp_path.iterdir()) == []
