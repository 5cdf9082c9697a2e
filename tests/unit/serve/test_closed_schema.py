"""Objects of schemas are closed where nothing says otherwise, and stay open where that would change their meaning."""

from __future__ import annotations

from typing import Any

import jsonschema
import pytest

from tunesmith.errors import RequestError
from tunesmith.serve.closed_schema import check_strict, closed

POINT = {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]}


def takes(schema: dict[str, Any], value: Any) -> bool:
    return bool(jsonschema.Draft202012Validator(closed(schema)).is_valid(value))


def test_objects_hold_the_properties_that_they_name_at_every_depth() -> None:
    nested = {
        "type": "object",
        "properties": {"at": {"$ref": "#/$defs/point"}, "all": {"type": "array", "items": POINT}, "a/b~": POINT},
        "$defs": {"point": POINT},
    }
    before = repr(nested)
    assert takes(nested, {"at": {"x": 1}, "all": [{"x": 2}], "a/b~": {"x": 1}})
    for wrong in ({"more": 1}, {"at": {"x": 1, "y": 2}}, {"all": [{"x": 1, "y": 2}]}, {"a/b~": {"x": 1, "y": 1}}):
        assert not takes(nested, wrong), wrong
    assert repr(nested) == before and list(closed(nested)["properties"]) == ["at", "all", "a/b~"]
    either = {"anyOf": [POINT, {"type": "null"}]}
    assert takes(either, {"x": 1}) and not takes(either, {"x": 1, "y": 2})


def test_what_says_that_it_is_open_stays_open() -> None:
    assert takes({**POINT, "additionalProperties": True}, {"x": 1, "y": 2})
    assert takes({**POINT, "additionalProperties": {"type": "string"}}, {"x": 1, "y": "z"})
    assert takes({"type": "object"}, {"any": 1}) and not takes({"type": "object", "properties": {}}, {"any": 1})


def test_parts_of_one_object_are_not_closed_against_each_other() -> None:
    other = {"type": "object", "properties": {"y": {"type": "integer"}}}
    both = {"$defs": {"base": POINT}, "allOf": [{"$ref": "#/$defs/base"}, other]}
    assert takes(both, {"x": 1, "y": 2})
    assert takes({**POINT, "oneOf": [other]}, {"x": 1, "y": 2})
    assert takes({"$defs": {"base": POINT}, "$ref": "#/$defs/base", **other}, {"x": 1, "y": 2})
    alone = {"$defs": {"base": POINT}, "properties": {"p": {"allOf": [{"$ref": "#/$defs/base"}]}}}
    assert takes(alone, {"p": {"x": 1}}) and not takes(alone, {"p": {"x": 1, "y": 2}})


def test_a_strict_schema_allows_no_more_than_it_names() -> None:
    check_strict({**POINT, "additionalProperties": False}, "f")
    check_strict(POINT, "f")
    with pytest.raises(RequestError, match=r"f: .* \(at #/properties/p\)"):
        check_strict({"properties": {"p": {**POINT, "additionalProperties": True}}}, "f")
