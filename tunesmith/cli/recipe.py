"""`tunesmith recipe init|show|schema`: write a recipe, see what one resolves to, read what every key means."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from tunesmith.cli.console import emit, err, is_json
from tunesmith.errors import RecipeError
from tunesmith.recipe.load import (
    dump_recipe,
    load_recipe,
    recipe_from_mapping,
    recipe_schema_json,
    starter_yaml,
)
from tunesmith.rundir.io import write_text_atomic

app = typer.Typer(add_completion=False, no_args_is_help=True)
_SET = typer.Option("--set", metavar="KEY=VALUE", help="change a key, for instance train.learning_rate=1e-4")


@app.callback()
def _group() -> None:
    """Write, show and explain recipes."""


@app.command("init")
def init(
    path: Annotated[Path, typer.Argument(help="the file to write")] = Path("recipe.yaml"),
    model: Annotated[str | None, typer.Option(help="a model directory, builtin:tiny or a Hub id")] = None,
    data: Annotated[list[str] | None, typer.Option(help="a data file, folder, builtin:shop or Hub id")] = None,
    method: Annotated[str | None, typer.Option(help="full, freeze, lora or qlora")] = None,
    output: Annotated[str | None, typer.Option(help="folder that holds run directories")] = None,
    set_: Annotated[list[str] | None, _SET] = None,
) -> None:
    """Ask for model, data, method and output, and write a commented recipe; options answer without asking."""
    if path.exists():
        raise RecipeError(f"{path} exists already: name another file, or remove it")
    recipe = recipe_from_mapping(
        {
            "name": _run_name(path),
            "output": _ask("output folder", output, "runs"),
            "model": {"path": _ask("model (directory, builtin:tiny or Hub id)", model, "builtin:tiny")},
            "method": {"kind": _ask("method (full, lora or qlora)", method, "lora")},
            "data": {"train": data or [_ask("data (file, folder, builtin:shop or Hub id)", None, "builtin:shop")]},
        },
        set_ or [],
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text_atomic(path, starter_yaml(recipe))
    err.print(f"wrote {path}; next: tunesmith train {path}", markup=False)
    emit({"path": path, "recipe": recipe.model_dump(mode="json")})


@app.command("show")
def show(
    path: Annotated[Path, typer.Argument(help="a recipe")],
    set_: Annotated[list[str] | None, _SET] = None,
    changed: Annotated[bool, typer.Option("--changed", help="only what differs from the defaults")] = False,
    comments: Annotated[bool, typer.Option("--comments", help="with the meaning of every key")] = False,
) -> None:
    """Check a recipe and print it whole, defaults included."""
    recipe = load_recipe(path, set_ or [])
    if not is_json():
        _write(dump_recipe(recipe, only_changed=changed, comments=comments))
    emit(recipe.model_dump(mode="json"))


@app.command("schema")
def schema() -> None:
    """Print the JSON schema: every key with its type, default and meaning."""
    text = recipe_schema_json()
    if not is_json():
        _write(text + "\n")
    emit(json.loads(text))


def _ask(question: str, given: str | None, default: str) -> str:
    """The answer from an option, else from a person, else (nobody there) the default."""
    if given is not None:
        return given
    if not sys.stdin.isatty():
        return default
    answer: Any = typer.prompt(question, default=default, err=True)
    return str(answer)


def _run_name(path: Path) -> str:
    return path.stem if path.stem != "recipe" else "run"


def _write(text: str) -> None:
    sys.stdout.write(text)
