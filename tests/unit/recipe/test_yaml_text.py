"""YAML as recipes use it: 1.2's scalars, no duplicate keys, exact round trips."""

from __future__ import annotations

import math
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from tunesmith.errors import RecipeError
from tunesmith.recipe.yaml_text import parse_yaml, parse_yaml_with_lines, to_yaml


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2e-4", 2e-4),
        ("1E5", 1e5),
        ("-1.5e+3", -1500.0),
        (".5", 0.5),
        ("1.", 1.0),
        ("10", 10),
        ("010", 10),
        ("0x10", 16),
        ("0o17", 15),
        ("+3", 3),
        ("true", True),
        ("False", False),
        ("null", None),
        ("~", None),
        ("", None),
        ("no", "no"),
        ("yes", "yes"),
        ("on", "on"),
        ("NO", "NO"),
        ("1:20", "1:20"),
        ("1_000", "1_000"),
        ("2026-01-02", "2026-01-02"),
        ("'2e-4'", "2e-4"),
        ("[1, 2e-4, a]", [1, 2e-4, "a"]),
        ("{a: {b: [c]}}", {"a": {"b": ["c"]}}),
    ],
)
def test_scalars_are_yaml_1_2(text: str, value: Any) -> None:
    parsed = parse_yaml(text)
    assert parsed == value
    assert type(parsed) is type(value)


def test_infinity_and_nan() -> None:
    assert parse_yaml("-.inf") == -math.inf
    assert math.isnan(parse_yaml(".nan"))


def test_a_duplicate_key_is_an_error_with_both_lines() -> None:
    with pytest.raises(RecipeError, match="line 4: 'seed' is given twice, first in line 2"):
        parse_yaml("train:\n  seed: 1\n  epochs: 2\n  seed: 3\n")


def test_the_same_key_in_two_sections_is_fine() -> None:
    assert parse_yaml("a: {x: 1}\nb: {x: 2}") == {"a": {"x": 1}, "b": {"x": 2}}


@pytest.mark.parametrize("text", ["1: a", "true: a", "[a]: b", "null: a", "{a: b}: c"])
def test_a_key_that_is_not_text_is_an_error(text: str) -> None:
    with pytest.raises(RecipeError, match="line 1: a key must be text"):
        parse_yaml(text)


@pytest.mark.parametrize(
    "text", ["a: [1", "a: b: c", "\t- x", "a: &x [*x", "--- a\n--- b", "a: !!python/name:os.system", "a: \x07", "a: *b"]
)
def test_what_is_not_one_plain_yaml_document_is_an_error(text: str) -> None:
    with pytest.raises(RecipeError):
        parse_yaml(text)


def test_very_deep_nesting_is_an_error_not_a_crash() -> None:
    with pytest.raises(RecipeError, match="nested too deeply"):
        parse_yaml("[" * 3_000)


def test_every_key_and_item_has_its_line() -> None:
    _, lines = parse_yaml_with_lines("a:\n  b: 1\n  c:\n    - x\n    - y\n")
    assert lines == {("a",): 1, ("a", "b"): 2, ("a", "c"): 3, ("a", "c", 0): 4, ("a", "c", 1): 5}


_PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=10,
)


@given(_PLAIN)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_what_is_written_reads_back_equal(value: Any) -> None:
    parsed = parse_yaml(to_yaml({"key": value}))
    assert parsed == {"key": value}
    assert repr(parsed) == repr({"key": value})


@pytest.mark.parametrize("text", ["no", "yes", "010", "1:20", "2e-4", "1_000", "=", "2026-01-02", "~", "<<", "0o7"])
def test_text_that_any_yaml_takes_for_something_else_is_quoted(text: str) -> None:
    written = to_yaml({"key": text})
    assert parse_yaml(written) == {"key": text}
    assert yaml.safe_load(written) == {"key": text}


def _bomb(levels: int) -> str:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, levels)]
    return "\n".join(lines)


def test_aliases_that_multiply_are_refused() -> None:
    """Was: nine lines of aliases meant billions of values, and reading the recipe never ended."""
    with pytest.raises(RecipeError, match="with its aliases written out"):
        parse_yaml_with_lines(_bomb(12))
    assert len(parse_yaml_with_lines(_bomb(3))[0]["a2"]) == 10


def test_an_alias_inside_what_it_names_is_refused() -> None:
    """Was: a RecursionError escaped."""
    with pytest.raises(RecipeError, match="stands inside what it names"):
        parse_yaml("data: &d {x: *d}")


@pytest.mark.parametrize("text", ["a: !!int abc", f"a: {'9' * 5000}"])
def test_a_number_that_is_none_is_refused(text: str) -> None:
    """Was: a bare ValueError escaped."""
    with pytest.raises(RecipeError, match="not valid YAML"):
        parse_yaml(text)
