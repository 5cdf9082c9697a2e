"""`tunesmith bench peers` as it is typed: mistakes are one line, the table is drawn from records alone."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tunesmith.cli.main import run
from tunesmith.recipe.load import load_recipe

Cli = Callable[..., subprocess.CompletedProcess[str]]
ROOT = Path(__file__).resolve().parents[3]
RECIPES = sorted((ROOT / "recipes" / "peers").glob("*.yaml"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name a recipe"),
        (["--table", "--out", "nowhere"], "holds no record"),
        (["recipe.yaml", "--peer-path", "trl"], "--peer-path must be NAME=DIR"),
        (["recipe.yaml", "--peer-path", "trl=nowhere"], "--peer-path must be NAME=DIR"),
        (["recipe.yaml", "--peers", "unslot"], "did you mean"),
    ],
)
def test_mistakes_of_use(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "recipe.yaml").write_text("version: 1\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    assert run(["bench", "peers", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_the_table_comes_from_records_alone(tunesmith_cli: Cli, tmp_path: Path) -> None:
    step = {"seconds": 0.5, "loss": 2.0, "grad_norm": 1.0}
    memory = dict.fromkeys(
        [
            "allocated_peak_bytes",
            "reserved_peak_bytes",
            "resident_peak_bytes",
            "all_steps_allocated_peak_bytes",
            "all_steps_reserved_peak_bytes",
        ]
    )
    row = {"peer": "tunesmith", "round": 0, "status": "ok", "steps": [step, step], "tokens": [50, 50], "memory": memory}
    recipe: dict[str, Any] = load_recipe(RECIPES[0]).model_dump(mode="json")
    recipe["bench"]["warmup_steps"] = 1
    key = {"chip": "A chip", "driver": "1", "torch": "2", "commit": "abc", "row": "a-row", "recipe_hash": "h"}
    record = {"schema": "tunesmith.bench.peers", "schema_version": 1, "key": key, "resolved": recipe, "lengths": [8, 8]}
    record |= {"started": "now", "command": "c", "rows": [row]}
    (tmp_path / "chip").mkdir()
    (tmp_path / "chip" / "a.json").write_text(json.dumps(record), encoding="utf-8")
    done = tunesmith_cli("bench", "peers", "--table", "--out", tmp_path, "--json", check=True)
    assert "| **tunesmith** | 100 (100 to 100) |" in done.stdout
    answer = json.loads(done.stdout.splitlines()[-1])
    assert answer["groups"][0]["rows"][0]["tokens_per_s"]["median"] == 100
    assert "2 x 8 tokens" in (tmp_path / "peers.md").read_text("utf-8")


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_of_rows_are_valid_and_named_as_their_files(path: Path) -> None:
    recipe = load_recipe(path)
    assert recipe.name == path.stem
    assert recipe.bench.steps >= 20
    assert f"recipes/peers/{path.name}" in path.read_text("utf-8")
