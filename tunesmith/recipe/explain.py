"""What is wrong with a recipe, in plain words: pydantic's findings turned into one line each."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator, Mapping
from types import UnionType
from typing import Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from tunesmith.errors import nearest
from tunesmith.recipe.schema import Recipe
from tunesmith.recipe.synonyms import known_elsewhere
from tunesmith.recipe.yaml_text import Place

_WANTED = {
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "string_type": "text",
    "list_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a section with keys",
    "model_attributes_type": "a section with keys",
    "greater_than": "greater than {gt}",
    "greater_than_equal": "at least {ge}",
    "less_than": "less than {lt}",
    "less_than_equal": "at most {le}",
    "literal_error": "{expected}",
    "string_pattern_mismatch": "1 to 80 characters without a slash",
}
_MAIN_KEYS: Mapping[Place, tuple[str, str]] = {
    ("model",): ("path", "builtin:tiny"),
    ("method",): ("kind", "lora"),
    ("data",): ("train", "[mine.json]"),
    ("train",): ("epochs", "3"),
}
"""What a section is most often written for, and an example."""
_SPLIT_SEQUENCES = ("context", "context_parallel", "cp", "sequence", "sequence_parallel", "sp", "ulysses", "ring")
"""What other libraries call it when processes share the tokens of one sequence."""


def explain(error: ValidationError, source: str | None, lines: Mapping[Place, int]) -> list[str]:
    """One line for each mistake: "file:line: train.rank must be a whole number, got 'many'"."""
    found: dict[Place, list[Mapping[str, Any]]] = {}
    for detail in error.errors(include_url=False):
        found.setdefault(_real_place(detail["loc"]), []).append(detail)
    in_file_order = sorted(found.items(), key=lambda item: lines.get(item[0], 0))
    return [f"{_where(place, source, lines)}{_sentence(place, details)}" for place, details in in_file_order]


def free_key_depth(place: tuple[str, ...]) -> int:
    """How many levels of free keys the value at `place` has: 1 for a mapping, 2 for a mapping of mappings, 0 else."""
    annotation = _annotation(place)
    depth = 0
    while get_origin(annotation) is dict:
        depth, annotation = depth + 1, get_args(annotation)[1]
    return depth


def allowed_keys(place: Place) -> list[str]:
    """The keys of the section at `place`; empty when there is none."""
    annotation = Recipe if not place else _annotation(place)
    is_section = isinstance(annotation, type) and issubclass(annotation, BaseModel)
    return list(annotation.model_fields) if is_section else []


def all_keys() -> list[str]:
    """Every dotted key of a recipe."""
    return list(_dotted(Recipe, ""))


def _dotted(section: type[BaseModel], prefix: str) -> Iterator[str]:
    for key, info in section.model_fields.items():
        annotation = info.annotation
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            yield from _dotted(annotation, f"{prefix}{key}.")
        else:
            yield prefix + key


def _annotation(place: Place) -> Any:
    annotation: Any = Recipe
    for part in place:
        is_section = isinstance(annotation, type) and issubclass(annotation, BaseModel)
        if not is_section or part not in annotation.model_fields:
            return None
        annotation = annotation.model_fields[str(part)].annotation
    return annotation


def _real_place(loc: Place) -> Place:
    """The place in the YAML: pydantic adds the branch of a union, such as 'list[str]', to what it calls loc."""
    place: list[str | int] = []
    for part in loc:
        annotation = _annotation(tuple(place))
        if isinstance(part, str) and get_origin(annotation) in (Union, UnionType):
            break
        place.append(part)
    return tuple(place)


def _where(place: Place, source: str | None, lines: Mapping[Place, int]) -> str:
    if source is None:
        return ""
    line = lines.get(place)
    return f"{source}: " if line is None else f"{source}:{line}: "


def _sentence(place: Place, details: list[Mapping[str, Any]]) -> str:
    detail = details[0]
    if detail["type"] == "extra_forbidden":
        return _unknown_key(place)
    if detail["type"] == "value_error":
        message = str(detail["ctx"]["error"])
        return f"{_dotted_place(place)}: {message}" if place else message
    wanted = " or ".join(dict.fromkeys(_wanted(d) for d in details))
    form = _right_form(place, detail["input"]) if detail["type"].startswith("model_") else ""
    hint = _hint(details) or _longer_key(place, detail["input"])
    return f"{_dotted_place(place)} must be {wanted}, got {_got(detail['input'])}{hint}{form}"


def _longer_key(place: Place, given: Any) -> str:
    """A hint at the key beside `place` whose name goes on where this one's ends, and that takes what was given."""
    section = Recipe if len(place) < 2 else _annotation(place[:-1])
    if not (place and isinstance(section, type) and issubclass(section, BaseModel)):
        return ""
    for key in section.model_fields:
        if key.startswith(f"{place[-1]}_") and _takes(section, key, given):
            return f"; did you mean '{_dotted_place((*place[:-1], key))}'?"
    return ""


def _takes(section: type[BaseModel], key: str, value: Any) -> bool:
    try:
        section.model_validate({key: value})
    except ValidationError:
        return False
    return True


def _right_form(place: Place, given: Any) -> str:
    """How the section at `place` is written, with what was given in its place where that can be told."""
    if place not in _MAIN_KEYS:
        return f"; its keys: {', '.join(allowed_keys(place))}"
    key, example = _MAIN_KEYS[place]
    if place == ("train",) and isinstance(given, (str, list)):
        return f"; write:\ndata:\n  train: {_as_list(given)}\ntrain:\n  {key}: {example}"
    if place == ("data",) and isinstance(given, (str, list)):
        example = _as_list(given)
    elif isinstance(given, str) or (place == ("train",) and isinstance(given, int) and not isinstance(given, bool)):
        example = _plain(given)
    return f"; write:\n{place[0]}:\n  {key}: {example}"


def _as_list(given: Any) -> str:
    items = given if isinstance(given, list) else [given]
    return f"[{', '.join(_plain(item) for item in items)}]"


def _plain(value: Any) -> str:
    """A scalar as YAML, in quotes where it would not be read as the same text."""
    text = str(value)
    return text if re.fullmatch(r"[\w./-]+(:[\w./-]+)*", text) else json.dumps(text, ensure_ascii=False)


def _unknown_key(place: Place) -> str:
    key, parent = str(place[-1]), place[:-1]
    if parent == ("parallel",) and key in _SPLIT_SEQUENCES:
        return (
            f"parallel.{key}: a sequence is not divided among processes (context parallelism) yet; for long ones set "
            f"parallel.tensor, between whose matrices each process holds its own tokens only, or "
            f"train.checkpointing: offload, or parallel.pipeline"
        )
    near = nearest(key, allowed_keys(parent))
    if near and parent:
        near = f", did you mean '{_dotted_place((*parent, near.split(chr(39))[1]))}'?"
    hint = _of_another_library(key) or _of_that_name(key) or near or _elsewhere(key)
    if not hint:
        section = f"'{_dotted_place(parent)}'" if parent else "a recipe"
        hint = f"; {section} has {', '.join(allowed_keys(parent))}"
    return f"{_dotted_place(place)} is not a key{hint}"


def _of_another_library(key: str) -> str:
    """A hint when other libraries have a key of that name."""
    known = known_elsewhere(key)
    if known is None:
        return ""
    ours, note = known
    return f", did you mean '{ours}'{f' ({note})' if note else ''}?"


def _by_name() -> dict[str, str]:
    """From the last part of each key to the key; of several, the first."""
    return {dotted.rpartition(".")[2]: dotted for dotted in reversed(all_keys())}


def _of_that_name(key: str) -> str:
    """A hint when the key belongs to another section, or to several."""
    found = [f"'{dotted}'" for dotted in all_keys() if dotted.rpartition(".")[2] == key]
    return f", did you mean {' or '.join(filter(None, (', '.join(found[:-1]), found[-1])))}?" if found else ""


def _elsewhere(key: str) -> str:
    """A hint when the key belongs to another section and is misspelt: of so many names one is always a little near."""
    by_name = _by_name()
    close = difflib.get_close_matches(key, by_name, n=1, cutoff=0.75)
    return f", did you mean '{by_name[close[0]]}'?" if close else ""


def _wanted(detail: Mapping[str, Any]) -> str:
    template = _WANTED.get(detail["type"])
    return detail["msg"] if template is None else template.format(**detail.get("ctx", {}))


def _hint(details: list[Mapping[str, Any]]) -> str:
    kinds = {d["type"] for d in details}
    value = details[0]["input"]
    if "literal_error" in kinds and isinstance(value, str):
        expected = next(d["ctx"]["expected"] for d in details if d["type"] == "literal_error")
        near = nearest(value, [word.strip("' ") for word in expected.replace(" or ", ",").split(",")])
        if near:
            return near
    if "list_type" in kinds and isinstance(value, str):
        return f": write [{value}]"
    if kinds == {"string_type"} and isinstance(value, (int, float)):
        return ": put it in quotes"
    return ""


def _got(value: Any) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return "true" if value else "false"
    text = "a mapping" if isinstance(value, Mapping) else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _dotted_place(place: Place) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place).lstrip(".")
