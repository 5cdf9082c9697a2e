"""Chat templates rendered in a sandbox that a hostile template can't leave, exhaust or stall.

The environment is the one that templates are written for (Hugging Face's): trimmed blocks, `break` and
`continue`, `raise_exception`, `strftime_now`, `tojson` without escapes, `{% generation %}` blocks. Beyond
Jinja's own sandbox every loop body and macro spends a tick, and what builds text is checked before it is
built (`template_limits`).
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from tunesmith.errors import DataError, TokenizerError
from tunesmith.text import template_limits as limits

_START = f"\x02{secrets.token_hex(16)}("
_END = f"\x02{secrets.token_hex(16)})"
# Filters that make much out of little, or something else every time; chat templates do not need them.
_REMOVED_FILTERS = (
    "batch", "center", "filesizeformat", "format", "pprint", "random", "slice", "urlize", "wordwrap", "xmlattr",
)  # fmt: skip
_REMOVED_GLOBALS = ("lipsum", "cycler", "joiner")


@dataclass(frozen=True)
class Rendered:
    """The text of a conversation, and the character spans inside `{% generation %}` blocks (none without them)."""

    text: str
    spans: tuple[tuple[int, int], ...] = ()


class _RaisedByTemplateError(Exception):
    """The template itself refused the conversation."""


def render_template(
    source: str, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any], now: datetime | None = None
) -> Rendered:
    """The template's text for these messages.

    Args: `variables`: bos_token, add_generation_prompt, tools and whatever else the template knows;
        `now`: the clock that `strftime_now` shows (none: the machine's).
    Raises: DataError when the template refuses the conversation; TokenizerError when the template is broken or
        spends more than its limits.
    """
    template = _compiled(source)
    functions = {
        "raise_exception": _raise_exception,
        "strftime_now": lambda form: (now or datetime.now()).strftime(form),
    }
    budget = limits.Budget()
    token = limits.BUDGET.set(budget)
    try:
        pieces = []
        for piece in template.generate(**{**functions, **variables, "messages": messages}):
            budget.spend(len(piece))
            pieces.append(piece)
    except _RaisedByTemplateError as error:
        raise DataError(f"the chat template refuses this conversation: {error}") from None
    except (limits.TemplateLimitError, SecurityError, OverflowError, MemoryError, RecursionError) as error:
        reason = "it calls itself without end" if isinstance(error, RecursionError) else error
        raise TokenizerError(
            f"the chat template was stopped: {reason}; name another one with data.chat_template"
        ) from None
    except (jinja2.TemplateError, ArithmeticError, TypeError, ValueError, LookupError, AttributeError) as error:
        raise DataError(f"the chat template can't render this conversation: {error}") from None
    finally:
        limits.BUDGET.reset(token)
    return _without_marks("".join(pieces))


@lru_cache(maxsize=32)
def has_generation_blocks(source: str) -> bool:
    """Whether the template marks the assistant's text itself."""
    check_template(source)
    return any(mark.value == _START for mark in _environment().parse(source).find_all(nodes.Const))


def check_template(source: str) -> None:
    """Raises TokenizerError, with the line, when the template can't be compiled."""
    _compiled(source)


class _GenerationBlocks(Extension):
    """`{% generation %} ... {% endgeneration %}`: the text inside is the assistant's."""

    tags = {"generation"}  # noqa: RUF012 (Jinja's own interface)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """A sentinel before and after the body."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        start = nodes.Output([nodes.Const(_START)], lineno=line)
        end = nodes.Output([nodes.Const(_END)], lineno=line)
        return [start, *body, end]


class _Metered(NodeTransformer):
    """Puts a tick into loops and macros, and a checked call in place of `~`.

    The functions are attributes of the environment, which a template has no name for and can't replace.
    """

    def _ticking(self, node: Any) -> Any:
        self.generic_visit(node)
        tick = nodes.Call(nodes.EnvironmentAttribute("tick"), [], [], None, None)
        node.body.insert(0, nodes.Output([tick], lineno=node.lineno))
        return node

    visit_Macro = visit_CallBlock = _ticking

    def visit_For(self, node: nodes.For) -> nodes.Node:  # noqa: N802
        """A loop's `if` runs for every item, also where the body never does: it ticks first."""
        metered: nodes.For = self._ticking(node)
        if metered.test is not None:
            tick = nodes.Call(nodes.EnvironmentAttribute("tick"), [], [], None, None, lineno=node.lineno)
            metered.test = nodes.Or(tick, metered.test, lineno=node.lineno)
        return metered

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return nodes.Call(
            nodes.EnvironmentAttribute("joined"), [nodes.List(node.nodes, lineno=node.lineno)], [], None, None,
            lineno=node.lineno,
        )  # fmt: skip


class _Environment(ImmutableSandboxedEnvironment):
    """Jinja's sandbox with meters."""

    intercepted_binops = frozenset(["*", "**", "%", "+"])
    tick = staticmethod(limits.tick)
    joined = staticmethod(limits.concat)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = _Metered().visit(super()._parse(source, name, filename))
        tree.set_environment(self)
        return tree

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """`str.format` can pad to any width, and templates have `~`."""
        if super().wrap_str_format(value) is not None:
            raise limits.TemplateLimitError("it uses str.format")
        return None

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """The four operators that can make a lot out of a little."""
        if operator == "**":
            raise limits.TemplateLimitError("it computes powers")
        if operator == "*":
            limits.check_product(left, right)
        if operator == "%" and isinstance(left, str):
            raise limits.TemplateLimitError("it formats with %")
        if operator == "+" and isinstance(left, str | list) and isinstance(right, str | list):
            limits.limit(len(left) + len(right))
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805 (Jinja's own)
        owner = getattr(__obj, "__self__", None)
        if isinstance(owner, str):
            limits.check_string_method(owner, __obj.__name__, args)
        return super().call(__context, __obj, *args, **kwargs)


def _raise_exception(message: object) -> str:
    raise _RaisedByTemplateError(str(message))


@lru_cache(maxsize=1)
def _environment() -> _Environment:
    environment = _Environment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_GenerationBlocks, loopcontrols],
        finalize=limits.checked,
    )

    for name in _REMOVED_FILTERS:
        environment.filters.pop(name, None)
    for name in _REMOVED_GLOBALS:
        environment.globals.pop(name, None)
    metered: dict[str, Callable[..., str]] = {
        "replace": limits.replace, "join": limits.join, "indent": limits.indent,
        "string": limits.string, "tojson": limits.tojson,
    }  # fmt: skip
    environment.filters.update(metered)
    return environment


@lru_cache(maxsize=32)
def _compiled(source: str) -> jinja2.Template:
    try:
        return _environment().from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise TokenizerError(f"the chat template is broken at line {error.lineno}: {error.message}") from None
    except (jinja2.TemplateError, RecursionError) as error:
        raise TokenizerError(f"the chat template is broken: {error}") from None


def _without_marks(text: str) -> Rendered:
    """Takes the sentinels out and keeps where they were."""
    if _START not in text:
        return Rendered(text)
    head, *marked = text.split(_START)
    clean, spans, length = [head], [], len(head)
    for part in marked:
        inside, _, outside = part.partition(_END)
        spans.append((length, length + len(inside)))
        clean += [inside, outside]
        length += len(inside) + len(outside)
    return Rendered("".join(clean), tuple(span for span in spans if span[0] < span[1]))
