"""Every key of a recipe as a row for people: its default, what it may be, and what it means."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from tunesmith.recipe.schema import Recipe
from tunesmith.recipe.yaml_text import to_yaml

_LARGEST = 2**31 - 1  # the schema's limit of every count: it says nothing
_BOUNDS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
_TYPES = {"integer": "whole number", "number": "number", "string": "text", "boolean": "true | false"}
NOT_SET = "not set"


@dataclass(frozen=True)
class KeyRow:
    """One key. section: "" for the keys that stand outside sections; key: dotted."""

    section: str
    key: str
    default: str
    allowed: str
    meaning: str


def key_rows() -> list[KeyRow]:
    """The keys in the schema's order."""
    schema, rows = Recipe.model_json_schema(), []
    for key, field in schema["properties"].items():
        annotation = Recipe.model_fields[key].annotation
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            properties = schema["$defs"][annotation.__name__]["properties"]
            rows += [_row(key, annotation.model_fields[name], name, one) for name, one in properties.items()]
        else:
            rows.append(_row("", Recipe.model_fields[key], key, field))
    return rows


def _row(section: str, info: FieldInfo, key: str, field: Mapping[str, Any]) -> KeyRow:
    dotted = f"{section}.{key}" if section else key
    allowed = " | ".join(dict.fromkeys(_alternatives(field, _limits(info))))
    return KeyRow(section, dotted, _default(info), allowed, info.description or "")


def _default(info: FieldInfo) -> str:
    value = info.get_default(call_default_factory=True)
    if value is None:
        return NOT_SET
    if isinstance(value, list):
        return f"[{', '.join(map(str, value))}]"
    return f"{value:g}" if isinstance(value, float) else to_yaml(value).strip().removesuffix("...").strip()


def _alternatives(field: Mapping[str, Any], limits: str) -> Iterator[str]:
    """What a key may be, from its JSON schema; that it may be left out is said by its default."""
    for one in field.get("anyOf", [field]):
        kind = one.get("type")
        if "const" in one:
            yield str(one["const"])
        elif "enum" in one:
            yield from map(str, one["enum"])
        elif kind == "array":
            inside = " | ".join(_alternatives(one.get("items", {}), ""))
            yield f"list of {f'({inside})' if '|' in inside else inside}"
        elif kind == "object":
            yield "mapping"
        elif kind in ("integer", "number"):
            yield _TYPES[kind] + limits
        elif kind != "null":
            yield _TYPES.get(str(kind), "any value")


def _limits(info: FieldInfo) -> str:
    """The bounds of a number; the JSON schema lacks those of a number that is checked by a function first."""
    annotated = [one for part in get_args(info.annotation) for one in getattr(part, "__metadata__", ())]
    inside = [deep for one in annotated if isinstance(one, FieldInfo) for deep in one.metadata]
    marks = [(sign, getattr(one, bound, None)) for one in [*info.metadata, *inside] for bound, sign in _BOUNDS.items()]
    return ",".join(f" {sign} {value:g}" for sign, value in marks if value is not None and value != _LARGEST)
