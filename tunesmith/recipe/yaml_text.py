"""YAML as recipes use it: YAML 1.2's numbers and booleans, no duplicate keys, a line number for every key.

PyYAML reads YAML 1.1, where `2e-4` is text, `no` is false and `1:20` is 80. Here a number is a number, only
true and false are booleans, and everything else is text.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Collection, Iterator
from typing import Any

import yaml
from pydantic import BaseModel

from tunesmith.errors import RecipeError

Place = tuple[str | int, ...]
MAX_VALUES = 100_000  # a recipe has hundreds; a few lines of nested aliases can mean billions
_INT = re.compile(r"^(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)$")
_FLOAT = re.compile(
    r"^(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
)
_RESOLVERS = (
    ("tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), "tTfF"),
    ("tag:yaml.org,2002:int", _INT, "-+0123456789"),
    ("tag:yaml.org,2002:float", _FLOAT, "-+0123456789."),
    ("tag:yaml.org,2002:null", re.compile(r"^(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""]),
    ("tag:yaml.org,2002:merge", re.compile(r"^(?:<<)$"), "<"),
)


class _Loader(yaml.SafeLoader):
    """YAML 1.2's scalars; duplicate and non-text keys are errors."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 - PyYAML's own way

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: dict[str, int] = {}
        for key_node, _ in node.value:
            key = self._key(key_node)
            line = key_node.start_mark.line + 1
            if key in seen and key != "<<":
                raise RecipeError(f"line {line}: '{key}' is given twice, first in line {seen[key]}: keep one")
            seen[key] = line
        return super().construct_mapping(node, deep)

    def _key(self, node: yaml.Node) -> str:
        if isinstance(node, yaml.ScalarNode) and node.tag in ("tag:yaml.org,2002:str", "tag:yaml.org,2002:merge"):
            return str(node.value)
        raise RecipeError(
            f"line {node.start_mark.line + 1}: a key must be text, got {getattr(node, 'value', node)!r}: quote it"
        )


def _construct_int(loader: _Loader, node: yaml.ScalarNode) -> int:
    text = str(loader.construct_scalar(node))
    return int(text, 0) if text[:2] in ("0x", "0o") else int(text)


def _construct_float(loader: _Loader, node: yaml.ScalarNode) -> float:
    text = str(loader.construct_scalar(node)).lower()
    return float(text.replace(".inf", "inf").replace(".nan", "nan"))


class _Dumper(yaml.SafeDumper):
    """Quotes text that any YAML, 1.1 or 1.2, would read as something else."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    """Text with the rarer line breaks goes in double quotes, where they are escaped: elsewhere they would be folded."""
    style = '"' if any(break_ in text for break_ in "\x85\u2028\u2029\ufeff") else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent_text)
for _tag, _pattern, _first in _RESOLVERS:
    _Loader.add_implicit_resolver(_tag, _pattern, list(_first))
    _Dumper.add_implicit_resolver(_tag, _pattern, list(_first))
_Loader.add_constructor("tag:yaml.org,2002:int", _construct_int)
_Loader.add_constructor("tag:yaml.org,2002:float", _construct_float)


def parse_yaml(text: str) -> Any:
    """The value of one YAML document. Raises: RecipeError with the line."""
    return _parse(text)[0]


def parse_yaml_with_lines(text: str) -> tuple[Any, dict[Place, int]]:
    """The value of one YAML document, and the line of every key and list item by its place."""
    value, node = _parse(text)
    return value, {} if node is None else dict(_lines(node, ()))


def _parse(text: str) -> tuple[Any, yaml.Node | None]:
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is not None:
            _check_size(node, {})
        return (None if node is None else loader.construct_document(node)), node
    except yaml.MarkedYAMLError as error:
        line = "" if error.problem_mark is None else f"line {error.problem_mark.line + 1}: "
        raise RecipeError(f"{line}not valid YAML: {error.problem or error.context}") from None
    except yaml.YAMLError as error:
        raise RecipeError(f"not valid YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise RecipeError("not valid YAML: nested too deeply") from None
    except ValueError as error:  # !!int abc, a number of 5000 digits
        if isinstance(error, RecipeError):
            raise
        raise RecipeError(f"not valid YAML: {error}") from None


def _check_size(node: yaml.Node, sizes: dict[int, int]) -> int:
    """How many values `node` has with its aliases written out. Raises: RecipeError for a bomb or a circle of them."""
    if id(node) not in sizes:
        sizes[id(node)] = 0  # being counted
        children = node.value if isinstance(node, yaml.CollectionNode) else []
        pairs = (child if isinstance(child, tuple) else (child,) for child in children)
        sizes[id(node)] = 1 + sum(_check_size(child, sizes) for pair in pairs for child in pair)
    size, line = sizes[id(node)], node.start_mark.line + 1
    if size == 0:
        raise RecipeError(f"line {line}: an alias (*name) stands inside what it names: write the value out")
    if size > MAX_VALUES:
        raise RecipeError(f"line {line}: with its aliases written out this is more than {MAX_VALUES} values")
    return size


def _lines(node: yaml.Node, place: Place) -> Iterator[tuple[Place, int]]:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            here = (*place, str(key.value))
            yield here, key.start_mark.line + 1
            yield from _lines(value, here)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            yield (*place, index), value.start_mark.line + 1
            yield from _lines(value, (*place, index))


def to_yaml(value: Any) -> str:
    """`value` (plain data) as YAML that `parse_yaml` reads back equal."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, default_flow_style=False, width=110)


def model_to_yaml(
    model: BaseModel, *, only_changed: bool = False, comments: bool = False, always: Collection[str] = ("version",)
) -> str:
    """A pydantic model as YAML, keys in the schema's order.

    Args: only_changed: leave out what equals its default, but for the dotted keys in `always`;
        comments: each key's description above it.
    """
    return "".join(_sections(model, only_changed, comments, always, prefix="")).lstrip("\n")


def _sections(
    model: BaseModel, only_changed: bool, comments: bool, always: Collection[str], prefix: str
) -> Iterator[str]:
    indent = "  " * prefix.count(".")
    for key, info in type(model).model_fields.items():
        value, dotted = getattr(model, key), prefix + key
        if isinstance(value, BaseModel):
            body = "".join(_sections(value, only_changed, comments, always, dotted + "."))
            gap = "\n" if comments else ""
            yield f"{gap}{indent}{key}:\n{body}" if body else ""
            continue
        if only_changed and dotted not in always and value == info.get_default(call_default_factory=True):
            continue
        if comments and info.description:
            yield _comment(info.description, indent)
        yield textwrap.indent(to_yaml({key: value}), indent)


def _comment(text: str, indent: str) -> str:
    return textwrap.fill(text, 110, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# ") + "\n"
