"""`tunesmith recipe init|show|schema`: write a recipe, see what one resolves to, read what every key means."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable, Sequence
from enum import StrEnum
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any

import typer

from tunesmith.cli.console import emit, err, is_json, out
from tunesmith.errors import ModelError, RecipeError, TunesmithError
from tunesmith.recipe.load import (
    dump_recipe,
    load_recipe,
    recipe_from_mapping,
    recipe_schema_json,
    starter_yaml,
)
from tunesmith.recipe.table import NOT_SET, KeyRow, key_rows
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
    """Ask for model, data, method and output, and write a commented recipe; options answer without asking.

    Without a terminal --model and --data must be given.
    """
    if path.exists():
        raise RecipeError(f"{path} exists already: name another file, or remove it")
    _require_answers(path, model, data)
    answers = {
        "model": {"path": _answer("model (directory, builtin:tiny or Hub id)", model, "builtin:tiny", _check_model)},
        "data": {"train": _data(data)},
        "method": {"kind": _answer("method (full, lora or qlora)", method, "lora", _check_method)},
        "output": _answer("output folder", output, "runs", _check_output),
    }
    recipe = recipe_from_mapping({"name": _run_name(path), **answers}, set_ or [])
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


class SchemaFormat(StrEnum):
    """How the schema is printed."""

    table = "table"
    json = "json"


@app.command("schema")
def schema(
    format_: Annotated[
        SchemaFormat, typer.Option("--format", help="table: for people; json: the JSON Schema, for programs")
    ] = SchemaFormat.table,
) -> None:
    """Print every key of a recipe with its default, what it may be, and its meaning."""
    text = recipe_schema_json()
    if not is_json():
        if format_ is SchemaFormat.json:
            _write(text + "\n")
        elif sys.stdout.isatty():
            _show_tables(key_rows())
        else:
            _write("".join(f"{line}\n" for line in _key_lines(key_rows())))
    emit(json.loads(text))


def _show_tables(rows: Sequence[KeyRow]) -> None:
    """A table for each section, as wide as the terminal."""
    from rich.table import Table
    from rich.text import Text

    for section, keys in groupby(rows, key=lambda row: row.section):
        table = Table(title=section or "recipe", title_justify="left", title_style="bold cyan", expand=False)
        table.add_column("key", no_wrap=True, style="bold")
        for name, most in (("default", 14), ("allowed", 24)):
            table.add_column(name, max_width=most, overflow="fold")
        table.add_column("meaning", overflow="fold", min_width=24)
        for row in keys:
            table.add_row(*(Text(cell) for cell in (row.key, row.default, row.allowed, row.meaning)))
        out.print(table, soft_wrap=False)
    out.print(f'What a meaning says after "none:" is what happens while the key is {NOT_SET}.', highlight=False)
    out.print("As JSON Schema: tunesmith recipe schema --format json", highlight=False)


def _key_lines(rows: Sequence[KeyRow]) -> list[str]:
    """One line a key, for grep and its kind."""
    header = KeyRow("", "key", "default", "allowed", "meaning")
    widths = [max(len(cell) for cell in cells) for cells in zip(*map(_cells, [header, *rows]), strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(_cells(row), widths, strict=True)).rstrip()
        for row in [header, *rows]
    ]


def _cells(row: KeyRow) -> tuple[str, str, str, str]:
    return row.key, row.default, row.allowed, row.meaning


def _require_answers(path: Path, model: str | None, data: list[str] | None) -> None:
    """Raises: RecipeError where nobody is there to be asked what a recipe can't do without."""
    missing = [name for name, given in (("--model", model), ("--data", data)) if not given]
    if missing and not sys.stdin.isatty():
        raise RecipeError(
            f"there is no terminal to ask at: give {' and '.join(missing)} (--method and --output have defaults), for "
            f"instance: tunesmith recipe init {shlex.quote(str(path))} --model builtin:tiny --data mine.json"
        )


def _answer(question: str, given: str | None, default: str, check: Callable[[str], None]) -> str:
    """The answer from an option, else from a person, who is asked again after a wrong one; else the default.

    Raises: what `check` raises, for an option.
    """
    if given is not None:
        check(given)
        return given
    while sys.stdin.isatty():
        answer: Any = typer.prompt(question, default=default, err=True)
        try:
            check(str(answer))
        except TunesmithError as error:
            err.print(str(error), markup=False, style="yellow")
        else:
            return str(answer)
    return default


def _data(given: list[str] | None) -> list[str]:
    """The data of the options, each checked, else what a person answers."""
    for one in given or []:
        _check_data(one)
    return given or [_answer("data (file, folder, builtin:shop or Hub id)", None, "builtin:shop", _check_data)]


def _check_model(path: str) -> None:
    """Raises: ModelError for a model that is not there; a Hub id is taken as it is, and not downloaded."""
    from tunesmith.checkpoint.source import resolve_model

    if _may_be_hub_id(path):
        err.print(f"{path} is no local folder: taken for a Hub id, and downloaded when training begins", markup=False)
        return
    directory = resolve_model(path)
    if not (directory / "config.json").is_file():
        raise ModelError(f"{directory} holds no model: there is no config.json in it")


def _check_data(entry: str) -> None:
    """Raises: DataError for data that is not there; a Hub id is taken as it is."""
    from tunesmith.text.files import find_sources
    from tunesmith.text.sources import builtin_rows

    for source in find_sources([entry]):
        if source.kind == "builtin":
            builtin_rows(entry.removeprefix("builtin:"))
        elif source.kind == "hub":
            err.print(f"{entry} is no local file: taken for a Hub id", markup=False)


def _check_method(kind: str) -> None:
    """Raises: RecipeError. What freeze needs besides is seen with the whole recipe."""
    if kind != "freeze":
        recipe_from_mapping({"method": {"kind": kind}})


def _check_output(folder: str) -> None:
    """Raises: RecipeError."""
    if not folder.strip():
        raise RecipeError("the output folder needs a name")
    if Path(folder).exists() and not Path(folder).is_dir():
        raise RecipeError(f"{folder} is a file, and run directories go into a folder")


def _may_be_hub_id(path: str) -> bool:
    folder, slash, name = path.partition("/")
    return (
        bool(slash and name and "/" not in name)
        and folder not in ("", ".", "..", "~", "runs")
        and not Path(folder).is_dir()
    )


def _run_name(path: Path) -> str:
    return path.stem if path.stem != "recipe" else "run"


def _write(text: str) -> None:
    sys.stdout.write(text)
