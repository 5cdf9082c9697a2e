"""Specifications in llguidance's own form, and what is put around them: thoughts before an answer, Lark rules.

spec --grammar_text--> {"grammars": [{"lark_grammar" or "json_schema": ...}, ...]}
"""

from __future__ import annotations

import json
from typing import Any

from tunesmith.engine.grammar_library import GrammarLimits, fuel, library, panics_are_errors, refused
from tunesmith.engine.request import StructuredSpec
from tunesmith.engine.structured import check_spec
from tunesmith.errors import RequestError

# JSON on one line, with or without a space after a comma and a colon: where blanks may stand between all tokens, small
# models write them until their limit. A schema's own "x-guidance" goes before this.
JSON_STYLE = {"whitespace_flexible": False, "item_separator": ",[ ]?", "key_separator": ":[ ]?"}


def grammar_text(spec: StructuredSpec) -> str:
    """The specification in llguidance's own form (JSON). Raises: RequestError for what is malformed."""
    check_spec(spec)
    value = spec.value if isinstance(spec.value, str) else ""
    if spec.kind == "choice":
        return _lark("start: " + " | ".join(json.dumps(choice) for choice in spec.value))
    if spec.kind == "grammar":
        return value if value.lstrip().startswith("{") else _lark(_as_lark(value))
    with panics_are_errors(spec.kind):
        matcher = library().LLMatcher
        if spec.kind == "regex":
            return matcher.grammar_from_regex(value)
        schema = value if spec.kind == "json_schema" else '{"type": "object"}'
        schema = {"true": "{}", "false": '{"enum": []}'}.get(schema.strip(), schema)
        return matcher.grammar_from_json_schema(schema, defaults=JSON_STYLE)


def _lark(grammar: str) -> str:
    return json.dumps({"grammars": [{"lark_grammar": grammar}]})


def _as_lark(grammar: str) -> str:
    """A grammar in Lark's notation, also from llama.cpp's (`root ::= ...`)."""
    if "::=" not in grammar:
        return grammar
    from llguidance.gbnf_to_lark import any_to_lark

    try:
        return any_to_lark(grammar)
    except Exception as error:  # the converter has an error of its own
        raise RequestError(
            f"the structured output's grammar can't be used, read as GBNF: {str(error).splitlines()[0][:200]}"
        ) from None


def validate_spec(spec: StructuredSpec, limits: GrammarLimits | None = None) -> list[str]:
    """Refuse a specification that can't be compiled, without a tokenizer (about a millisecond); warnings.

    For the HTTP process, in a thread: what is wrong is said before the request reaches the engine.
    Raises: RequestError.
    """
    limits = limits or GrammarLimits()
    check_spec(spec, max_bytes=limits.max_spec_bytes)
    with panics_are_errors(spec.kind):
        matcher = library().LLMatcher
        wrong, messages = matcher.validate_grammar_with_warnings(grammar_text(spec), limits=fuel(limits))
    if wrong:
        raise refused(spec.kind, messages[0])
    return list(messages)


def after_thoughts(spec: StructuredSpec, begin: str, end: str, *, is_open: bool) -> StructuredSpec:
    """The specification for what follows a thought.

    Args:
        begin, end: what stands around a thought, as a Lark terminal: `"<think>"`, or `<[151667]>` for a control token.
        is_open: the prompt has opened the thought, so it must be closed; else the answer may also come without one.
    """
    answer = answer_grammars(spec)
    start = "thought BLANK? @answer" if is_open else f"({begin} thought BLANK?)? @answer"
    lark = f"start: {start}\n{lark_until('thought', end)}BLANK: /\\n{{1,2}}/\n"
    return StructuredSpec("grammar", json.dumps({"grammars": [{"lark_grammar": lark}, *answer]}))


def answer_grammars(spec: StructuredSpec) -> list[Any]:
    """The specification as grammars that another one refers to as `@answer`. Raises: RequestError."""
    try:
        grammars = json.loads(grammar_text(spec))["grammars"]
        grammars[0]["name"] = "answer"
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise refused(spec.kind, str(error)) from None
    return list(grammars)


def lark_until(name: str, end: str) -> str:
    """A Lark rule: any text up to a terminal, which belongs to it."""
    if end.startswith("<"):
        return f"{name}: ANY_{name.upper()} {end}\nANY_{name.upper()}: /(?s:.)*/\n"
    return f"{name}[lazy]: ANY_{name.upper()} {end}\nANY_{name.upper()}: /(?s:.)*/\n"
