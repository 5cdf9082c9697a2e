"""The command line as a person types it: help, recipes, doctor; each in a fresh process."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tunesmith.recipe.load import load_recipe

Cli = Callable[..., subprocess.CompletedProcess[str]]
VERBS = (
    *("demo", "doctor", "recipe", "data", "train", "eval", "chat", "serve", "verify", "merge", "compress", "bench"),
    *("report", "profile"),
)


def test_help_is_quick(tunesmith_cli: Cli) -> None:
    """Under 0.3 s of a core: the best of five, for the machine may be busy with something else."""
    durations = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = tunesmith_cli("--help", check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        durations.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(durations) < 0.3
    assert all(verb in done.stdout for verb in VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself(tunesmith_cli: Cli, verb: str) -> None:
    done = tunesmith_cli(verb, "--help", check=True)
    assert f"tunesmith {verb}" in done.stdout
    assert done.stderr == ""


def test_a_recipe_is_written_checked_and_shown(tunesmith_cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "问答.json").write_text("[]", encoding="utf-8")
    given = ("--model", "builtin:tiny", "--data", "问答.json", "--method", "qlora")
    done = tunesmith_cli("recipe", "init", "我的/商店.yaml", *given, check=True)
    assert "tunesmith train 我的/商店.yaml" in done.stderr
    recipe = load_recipe(tmp_path / "我的" / "商店.yaml")
    assert (recipe.name, recipe.method.kind, recipe.data.train) == ("商店", "qlora", ["问答.json"])
    again = tunesmith_cli("recipe", "init", "我的/商店.yaml")
    assert again.returncode == 2
    assert "exists already" in again.stderr
    shown = tunesmith_cli("recipe", "show", "我的/商店.yaml", "--set", "train.learning_rate=1e-4", "--json", check=True)
    assert json.loads(shown.stdout.splitlines()[-1])["train"]["learning_rate"] == 1e-4
    (tmp_path / "whole.yaml").write_text(tunesmith_cli("recipe", "show", "我的/商店.yaml").stdout, encoding="utf-8")
    assert load_recipe(tmp_path / "whole.yaml") == recipe


def test_a_wrong_recipe_is_one_line_and_code_2(tunesmith_cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("train:\n  learning_rat: 2e-4\n", encoding="utf-8")
    done = tunesmith_cli("recipe", "show", "r.yaml")
    assert done.returncode == 2
    assert done.stderr == (
        "tunesmith: error: r.yaml:2: train.learning_rat is not a key, did you mean 'train.learning_rate'?\n"
    )


def test_the_schema_is_json(tunesmith_cli: Cli) -> None:
    done = tunesmith_cli("recipe", "schema", "--format", "json", check=True)
    assert "learning_rate" in json.loads(done.stdout)["$defs"]["TrainSection"]["properties"]


def test_an_answer_can_be_piped_into_a_reader_that_stops(tmp_path: Path) -> None:
    tunesmith = Path(sys.executable).with_name("tunesmith")
    command = f"'{tunesmith}' recipe schema --format json | head -n 1"
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {command}"], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout == "{\n"
    assert done.stderr == ""


def test_doctor_says_what_it_found(tunesmith_cli: Cli) -> None:
    done = tunesmith_cli("doctor", "--json")
    result = json.loads(done.stdout.splitlines()[-1])
    assert done.returncode == (0 if result["ready"] else 1)
    names = [finding["name"] for finding in result["findings"]]
    assert {"driver", "torch", "compiler", "headers", "memory", "disk", "cpu"} <= set(names)
    assert names.index("driver") < names.index("torch")
    assert "driver" in done.stderr


def test_doctor_fails_on_a_broken_torch(tunesmith_cli: Cli, tmp_path: Path) -> None:
    """A torch that can't be imported is found by the probe, not by a traceback."""
    broken = tmp_path / "broken" / "torch"
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text("raise ImportError('libgomp.so.1: cannot open')\n", encoding="utf-8")
    (broken / "version.py").write_text("__version__ = '2.13.0'\ncuda = None\n", encoding="utf-8")
    done = tunesmith_cli("doctor", "--json", env={"PYTHONPATH": str(broken.parent)})
    assert done.returncode == 1
    assert "libgomp.so.1" in done.stderr
    assert "pip install --force-reinstall torch" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_environment_is_not_needed(tmp_path: Path) -> None:
    """Help works without HOME, locale or colour."""
    tunesmith = Path(sys.executable).with_name("tunesmith")
    done = subprocess.run([tunesmith, "--help"], capture_output=True, env={"PATH": os.environ["PATH"]}, cwd=tmp_path)
    assert done.returncode == 0
