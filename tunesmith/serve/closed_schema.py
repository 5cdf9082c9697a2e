"""JSON schemas with their objects closed: what a schema doesn't name is not written, unless it says so itself.

JSON Schema leaves an object open where it says nothing; OpenAI's functions and strict schemas mean the named
properties and no others (a strict one must say so).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from copy import copy
from typing import Any

from tunesmith.errors import RequestError

_MAPS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")
_ONE = ("items", "additionalProperties", "additionalItems", "contains", "not", "if", "then", "else", "propertyNames")
# Other keywords that may name properties of the same object: closing one part of it would forbid the others'.
_BESIDE = ("allOf", "anyOf", "oneOf", "$ref", "if", "then", "else", "dependentSchemas", "unevaluatedProperties")


def closed(schema: Mapping[str, Any]) -> dict[str, Any]:
    """The schema, its objects with named properties closed; parts of a composed object stay as they are."""
    composed = frozenset(_composed_references(schema))
    return _closed(schema, composed, "#", False)


def check_strict(schema: Mapping[str, Any], what: str) -> None:
    """Raises: RequestError for a strict schema that asks for more properties than it names, as OpenAI does."""
    for path, part in _parts(schema, "#"):
        if part.get("additionalProperties", False) is not False:
            raise RequestError(f"{what}: with strict: true additionalProperties can only be false (at {path})")


def _closed(schema: Any, composed: frozenset[str], path: str, is_part: bool) -> Any:
    """Args: is_part: other schemas say something of the same object."""
    if not isinstance(schema, Mapping):
        return schema
    made = dict(schema)
    for key, place, child in _children(schema, path):
        new = _closed(child, composed, place, _is_part(schema, key) or place in composed)
        if made[key] is schema[key] and key not in _ONE:
            made[key] = copy(schema[key])
        _put(made, key, place, new)
    is_open = "properties" in made and "additionalProperties" not in made
    if is_open and not is_part and not any(key in made for key in _BESIDE):
        made["additionalProperties"] = False
    return made


def _put(made: dict[str, Any], key: str, place: str, new: Any) -> None:
    last = place.rsplit("/", 1)[1]
    if key in _MAPS:
        made[key][last.replace("~1", "/").replace("~0", "~")] = new
    elif key in _LISTS:
        made[key][int(last)] = new
    else:
        made[key] = new


def _is_part(schema: Mapping[str, Any], key: str) -> bool:
    """Whether a child under `key` describes the same object as others do."""
    if key == "allOf":
        return len(schema["allOf"]) > 1 or "properties" in schema
    if key in ("anyOf", "oneOf"):
        return "properties" in schema or "allOf" in schema or "$ref" in schema
    return key in ("if", "then", "else", "not", "dependentSchemas")


def _composed_references(schema: Mapping[str, Any]) -> Iterator[str]:
    """Places of definitions that are a part of some composed object."""
    for _, part in _parts(schema, "#"):
        reference = part.get("$ref")
        if isinstance(reference, str) and ("properties" in part or "allOf" in part):
            yield reference
        for key in ("allOf", "anyOf", "oneOf"):
            children = part.get(key)
            if isinstance(children, list) and _is_part(part, key):
                yield from (c["$ref"] for c in children if isinstance(c, Mapping) and isinstance(c.get("$ref"), str))


def _parts(schema: Mapping[str, Any], path: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The schema and all schemas inside it, with their places."""
    yield path, schema
    for _, place, child in _children(schema, path):
        if isinstance(child, Mapping):
            yield from _parts(child, place)


def _children(schema: Mapping[str, Any], path: str) -> Iterator[tuple[str, str, Any]]:
    """(keyword, place, schema) of the schemas directly inside."""
    for key, value in schema.items():
        if key in _MAPS and isinstance(value, Mapping):
            for name, child in value.items():
                yield key, f"{path}/{key}/{str(name).replace('~', '~0').replace('/', '~1')}", child
        elif key in _LISTS and isinstance(value, list):
            for index, child in enumerate(value):
                yield key, f"{path}/{key}/{index}", child
        elif key in _ONE and isinstance(value, Mapping):
            yield key, f"{path}/{key}", value
