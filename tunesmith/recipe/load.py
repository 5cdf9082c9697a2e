"""Recipes in and out: YAML files, overrides from the command line, plain mappings; mistakes in plain words.

A mistake is one line that names the file, the line, the dotted key, what was got and what is allowed.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from tunesmith.errors import RecipeError, nearest
from tunesmith.recipe.explain import explain, free_key_depth
from tunesmith.recipe.schema import VERSION, Recipe
from tunesmith.recipe.yaml_text import Place, model_to_yaml, parse_yaml, parse_yaml_with_lines

_STARTER_KEYS = (
    "version",
    "name",
    "output",
    "model.path",
    "method.kind",
    "data.train",
    "data.max_length",
    "train.epochs",
    "train.learning_rate",
    "train.accumulation",
    "train.checkpointing",
    "train.seed",
)


def load_recipe(path: Path | str, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in a YAML file (UTF-8, a byte-order mark is accepted).

    Args: overrides: "section.key=value" with a YAML value, applied in order over the file.
    Raises: RecipeError.
    """
    path = Path(path)
    try:
        mapping, lines = parse_yaml_with_lines(_read(path))
        recipe = _with_assignments(_as_mapping(mapping), overrides)
    except RecipeError as error:
        raise RecipeError(f"{path}: {error}") from None
    return recipe_from_mapping(recipe, source=str(path), lines=lines)


def recipe_from_mapping(
    mapping: Mapping[str, Any],
    overrides: Sequence[str] = (),
    *,
    source: str | None = None,
    lines: Mapping[Place, int] | None = None,
) -> Recipe:
    """The recipe that nested plain data describes; keys that are not given have their defaults.

    Args: source, lines: where it came from, for the messages.
    Raises: RecipeError, one line for each mistake.
    """
    raw = _with_assignments(mapping, overrides)
    _check_version(raw.get("version", VERSION), source)
    try:
        return Recipe.model_validate(raw)
    except ValidationError as error:
        raise RecipeError("\n".join(explain(error, source, lines or {}))) from None


def with_overrides(recipe: Recipe, overrides: Mapping[str, Any]) -> Recipe:
    """A new recipe with the dotted keys in `overrides` set to their (already typed) values. Raises: RecipeError."""
    raw = recipe.model_dump(mode="json")
    for key, value in overrides.items():
        _assign(raw, _place(key), value)
    return recipe_from_mapping(raw)


def parse_override(text: str) -> tuple[tuple[str, ...], Any]:
    """The key and the YAML-typed value of "train.learning_rate=1e-4". Raises: RecipeError."""
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise RecipeError(f"an override is written KEY=VALUE, for instance train.learning_rate=1e-4; got {text!r}")
    try:
        return _place(key.strip()), parse_yaml(value)
    except RecipeError as error:
        raise RecipeError(f"the value of override {text!r} is {error}") from None


def dump_recipe(recipe: Recipe, *, only_changed: bool = False, comments: bool = False) -> str:
    """The recipe as YAML that `load_recipe` reads back equal; every key, or only what differs from its default."""
    return model_to_yaml(recipe, only_changed=only_changed, comments=comments)


def starter_yaml(recipe: Recipe) -> str:
    """The recipe as a commented file to go on from: what differs from the defaults, and the keys people change."""
    head = "# A tunesmith recipe. Every key and its meaning: tunesmith recipe schema\n"
    return head + model_to_yaml(recipe, only_changed=True, comments=True, always=_STARTER_KEYS)


def recipe_schema_json() -> str:
    """The recipe's JSON schema, every key with its description."""
    return json.dumps(Recipe.model_json_schema(), indent=2, ensure_ascii=False)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        near = nearest(path.name, (p.name for p in path.parent.glob("*.y*ml"))) if path.parent.is_dir() else ""
        raise RecipeError(f"there is no such file{near}; write one with: tunesmith recipe init {path}") from None
    except IsADirectoryError:
        inside = Path(path) / "recipe.yaml"
        hint = f"; a run's recipe is {inside}" if inside.is_file() else ""
        raise RecipeError(f"this is a folder, a recipe is a YAML file{hint}") from None
    except UnicodeDecodeError as error:
        raise RecipeError(f"not UTF-8 text (byte {error.start}): save the file as UTF-8") from None


def _as_mapping(value: Any) -> Mapping[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise RecipeError(f"a recipe is a mapping of sections (model, data, train ...), got {type(value).__name__}")
    return value


def _check_version(version: Any, source: str | None) -> None:
    where = f"{source}: " if source else ""
    if isinstance(version, bool) or not isinstance(version, int) or version < 1:
        raise RecipeError(f"{where}version must be a whole number from 1 to {VERSION}, got {version!r}")
    if version > VERSION:
        raise RecipeError(
            f"{where}the recipe is of version {version}, this tunesmith reads up to {VERSION}: "
            f"pip install --upgrade tunesmith"
        )


def _with_assignments(mapping: Mapping[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    raw = {key: _copy(value) for key, value in mapping.items()}
    for override in overrides:
        place, value = parse_override(override)
        _assign(raw, place, value)
    return raw


def _copy(value: Any) -> Any:
    return {key: _copy(item) for key, item in value.items()} if isinstance(value, Mapping) else value


def _assign(raw: dict[str, Any], place: tuple[str, ...], value: Any) -> None:
    for depth, part in enumerate(place[:-1]):
        child = raw.get(part)
        if child is None:
            child = raw[part] = {}
        if not isinstance(child, dict):
            raise RecipeError(
                f"{'.'.join(place[: depth + 1])} is a value, not a section: it has no {place[depth + 1]!r}"
            )
        raw = child
    raw[place[-1]] = value


def _place(key: str) -> tuple[str, ...]:
    """The parts of a dotted key. Under a key that holds a free mapping the rest is one key, as in
    bench.grid.train.learning_rate: the grid's key is "train.learning_rate"."""
    parts = tuple(key.split("."))
    for length in range(1, len(parts)):
        depth = free_key_depth(parts[:length])
        if depth:
            head, rest = parts[: length + depth - 1], parts[length + depth - 1 :]
            return (*head, ".".join(rest)) if rest else head
    return parts
