"""Tools in the model's own words: what its template takes, what its answers must look like, and how they are read.

format = answer_format(tokenizer, tool_parser="auto", reasoning_parser="auto")       once, at start
messages = template_messages(messages, tokenizer)      tools = template_tools(tools, choice)       a request
prompt = render(tokenizer, messages, tools=tools, ...)
plan = plan_answer(format, tokenizer, prompt, tools=..., tool_choice=..., structured=spec)
plan.structured, plan.skip_special_tokens -> SamplingParams        parser = plan.parser()
deltas = parser.feed(piece) ... parser.finish()        finish_reason: plan.finish_reason(parser, "stop")
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tunesmith.engine.grammar_text import after_thoughts, answer_grammars, lark_until
from tunesmith.engine.request import StructuredSpec
from tunesmith.errors import RequestError, nearest
from tunesmith.serve.closed_schema import check_strict, closed
from tunesmith.serve.template_words import template_variables
from tunesmith.serve.tool_parsers import REASONINGS, AnswerParser, ReasoningSyntax
from tunesmith.serve.tool_sections import SYNTAXES, ToolSyntax
from tunesmith.text.tokenizer import Tokenizer

# "none", "auto", "required", or the name of the function that must be called.
ToolChoice = str | Mapping[str, Any] | None
MAX_CALLS = 16
_ROLES = {"developer": "system"}
_NEXT_ITEM, _NEXT_LINE = '", " call', '"\\n" call'
_KEPT = ("name", "tool_call_id", "reasoning_content")


@dataclass(frozen=True)
class AnswerFormat:
    """What a model's answers may hold. None: it writes no calls (no thoughts), or not in a known way.

    has_tools: the template shows tools to the model.
    """

    tools: ToolSyntax | None
    reasoning: ReasoningSyntax | None
    has_tools: bool = False


def answer_format(tokenizer: Tokenizer, *, tool_parser: str = "auto", reasoning_parser: str = "auto") -> AnswerFormat:
    """The format by the chat template, or as named.

    Args: "auto", "none", or a name: `hermes` (Qwen, Hermes), `llama3`, `mistral`, `mistral-args`, `deepseek`;
        for thoughts `think`.
    Raises: RequestError for another name.
    """
    template = tokenizer.chat_template or ""
    return AnswerFormat(
        tools=_named(tool_parser, SYNTAXES, _tool_syntax(template), "--tool-call-parser"),
        reasoning=_named(reasoning_parser, REASONINGS, _reasoning_syntax(template), "--reasoning-parser"),
        has_tools="tools" in template_variables(template),
    )


def _named(name: str, known: Mapping[str, Any], found: str | None, option: str) -> Any:
    wanted = found if name == "auto" else None if name == "none" else name
    if wanted is None:
        return None
    if wanted not in known:
        raise RequestError(f"{option} must be auto, none, {', '.join(known)}; got {name!r}{nearest(name, list(known))}")
    return known[wanted]


def _tool_syntax(template: str) -> str | None:
    if "[TOOL_CALLS]" in template:
        return "mistral-args" if "[ARGS]" in template else "mistral"
    if "<｜tool▁calls▁begin｜>" in template:
        return "deepseek"
    if "<tool_call>" in template and "<function=" not in template:
        return "hermes"
    return "llama3" if '{"name": function name, "parameters"' in template else None


def _reasoning_syntax(template: str) -> str | None:
    return "think" if "<think>" in template or "</think>" in template else None


def template_messages(messages: Sequence[Mapping[str, Any]], tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """The messages as training data have them, so that the same conversation gives the same token ids.

    Texts of content parts are joined, no content is "", calls' arguments are objects, a developer is the system. A
    call's id is there for templates that show it.
    Raises: RequestError for arguments that are no JSON object.
    """
    shows_ids = re.search(r"\bid\b", tokenizer.chat_template or "") is not None
    return [_message(message, shows_ids) for message in messages]


def _message(message: Mapping[str, Any], shows_ids: bool) -> dict[str, Any]:
    content, role = message.get("content"), str(message["role"])
    if isinstance(content, Sequence) and not isinstance(content, str):
        content = "".join(str(part.get("text") or "") for part in content)
    found: dict[str, Any] = {"role": _ROLES.get(role, role), "content": content or ""}
    if calls := message.get("tool_calls"):
        found["tool_calls"] = [_call(call, shows_ids) for call in calls]
    thought = message.get("reasoning_content") or message.get("reasoning")
    named = {**message, "reasoning_content": thought}
    return found | {key: named[key] for key in _KEPT if isinstance(named.get(key), str)}


def _call(call: Mapping[str, Any], shows_ids: bool) -> dict[str, Any]:
    function = call["function"]
    arguments = function.get("arguments") or "{}"
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            raise RequestError(f"a tool call's arguments must be JSON, got {arguments[:60]!r}") from None
    if not isinstance(arguments, dict):
        raise RequestError(f"a tool call's arguments must be a JSON object, got {type(arguments).__name__}")
    own = {"id": call["id"]} if shows_ids and isinstance(call.get("id"), str) else {}
    return {**own, "type": "function", "function": {"name": function["name"], "arguments": arguments}}


def template_tools(tools: Sequence[Mapping[str, Any]] | None, tool_choice: ToolChoice) -> list[dict[str, Any]] | None:
    """The tools that the template is given: none with tool_choice "none". `strict` is not the model's business."""
    if not tools or tool_choice == "none":
        return None
    return [{**tool, "function": _without(tool["function"], "strict")} for tool in tools]


def _without(function: Mapping[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in function.items() if name != key and value is not None}


@dataclass(frozen=True)
class AnswerPlan:
    """How one answer is held to its form, and read.

    structured: for SamplingParams. skip_special_tokens: False where tags are control tokens, which the parser needs.
    """

    structured: StructuredSpec | None
    skip_special_tokens: bool
    tools: ToolSyntax | None
    names: tuple[str, ...]
    reasoning: ReasoningSyntax | None
    in_thought: bool
    max_calls: int | None
    is_forced: bool = False

    def parser(self) -> AnswerParser:
        """A reader for one answer (each of n choices has its own)."""
        return AnswerParser(
            self.tools, self.names, reasoning=self.reasoning, in_thought=self.in_thought, max_calls=self.max_calls
        )

    def finish_reason(self, parser: AnswerParser, reason: str) -> str:
        """OpenAI's finish_reason: "tool_calls" for an answer that stopped after calls; "stop" where one was named."""
        return "tool_calls" if reason == "stop" and parser.has_calls and not self.is_forced else reason


def plan_answer(
    answers: AnswerFormat,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    tool_choice: ToolChoice = None,
    parallel_tool_calls: bool | None = None,
    structured: StructuredSpec | None = None,
) -> AnswerPlan:
    """What a request's answer must look like and how it is read.

    Args:
        prompt: the rendered conversation; its end tells whether a thought is open.
        tools, tool_choice, parallel_tool_calls: OpenAI's fields, as plain data.
        structured: what the text must look like where no tool is called.
    Raises: RequestError when the model's template knows no tools, or the choice names none of them.
    """
    if tools and tool_choice != "none" and (answers.tools is None or not answers.has_tools):
        raise RequestError(
            "tools: the model's chat template shows none to the model"
            if not answers.has_tools
            else "tools: how this model writes calls isn't known; name it with --tool-call-parser"
        )
    used = tools if tools and tool_choice != "none" else ()
    state = _thought(answers.reasoning, prompt)
    named = _chosen(tool_choice)
    spec = constrain(used, tool_choice, answers.tools, tokenizer, parallel=parallel_tool_calls, otherwise=structured)
    if spec is not None and answers.reasoning is not None and state != "closed":
        begin, end = (_terminal(tag, tokenizer) for tag in (answers.reasoning.begin, answers.reasoning.end))
        spec = after_thoughts(spec, begin, end, is_open=state == "open")
    return AnswerPlan(
        structured=spec,
        skip_special_tokens=not any(_is_special(tag, tokenizer) for tag in _tags(answers, bool(used), state)),
        tools=answers.tools if used else None,
        names=tuple(tool["function"]["name"] for tool in used),
        reasoning=None if state == "closed" else answers.reasoning,
        in_thought=state == "open",
        max_calls=1 if used and (parallel_tool_calls is False or named is not None) else None,
        is_forced=named is not None,
    )


def _tags(answers: AnswerFormat, has_tools: bool, thought: str) -> list[str]:
    tags = list(answers.tools.tags) if has_tools and answers.tools is not None else []
    if answers.reasoning is not None and thought != "closed":
        tags += [answers.reasoning.begin, answers.reasoning.end]
    return tags


def _thought(reasoning: ReasoningSyntax | None, prompt: str) -> Literal["free", "open", "closed"]:
    """Whether the prompt's end leaves a thought open, has closed it already, or says nothing of it."""
    if reasoning is None:
        return "closed"
    end = prompt.rstrip()
    if end.endswith(reasoning.begin):
        return "open"
    return "closed" if end.endswith(reasoning.end) else "free"


def _chosen(tool_choice: ToolChoice) -> str | None:
    """The function that must be called."""
    if not isinstance(tool_choice, Mapping):
        return None
    function = tool_choice.get("function")
    return str(function["name"]) if isinstance(function, Mapping) else str(tool_choice.get("name"))


def constrain(
    tools: Sequence[Mapping[str, Any]],
    tool_choice: ToolChoice,
    syntax: ToolSyntax | None,
    tokenizer: Tokenizer,
    *,
    parallel: bool | None = None,
    otherwise: StructuredSpec | None = None,
) -> StructuredSpec | None:
    """The grammar of an answer; None leaves it free.

    "required": one call or more (one with `parallel` false, or where the template knows one only); a name: one call of
    that function. "auto": free, but calls are held to their schemas where a tool is `strict`, and what is no call to
    `otherwise`. Arguments always fit the tool's schema; unknown keywords are refused where the tool is strict.
    Raises: RequestError when the name is none of the tools'.
    """
    if not tools or syntax is None:
        return otherwise
    name = _chosen(tool_choice)
    if name is not None:
        names = [tool["function"]["name"] for tool in tools]
        if name not in names:
            raise RequestError(f"tool_choice names {name!r}, which is none of the tools{nearest(name, names)}")
        tools = [tool for tool in tools if tool["function"]["name"] == name]
    must = name is not None or tool_choice == "required"
    if not must and otherwise is None and not any(tool["function"].get("strict") for tool in tools):
        return None
    most = 1 if name is not None or parallel is False or syntax.name == "llama3" else MAX_CALLS
    rules, grammars = _calls(tools, syntax, tokenizer, most)
    if must:
        start = "start: calls\n"
    elif otherwise is not None:
        start = "start: calls | @answer\n"
        grammars += answer_grammars(otherwise)
    else:
        start = _free(syntax, tokenizer)
    return StructuredSpec("grammar", json.dumps({"grammars": [{"lark_grammar": start + rules}, *grammars]}))


def _free(syntax: ToolSyntax, tokenizer: Tokenizer) -> str:
    """Any text, and after a tag nothing but calls."""
    if syntax.name == "llama3":
        return "start: calls | TEXT\nTEXT: /\\s*([^{\\s](?s:.)*)?/\n"
    return f"start: (head more)? TEXT\n{lark_until('head', _terminal(syntax.begin, tokenizer))}TEXT: /(?s:.)*/\n"


def _calls(
    tools: Sequence[Mapping[str, Any]], syntax: ToolSyntax, tokenizer: Tokenizer, most: int
) -> tuple[str, list[dict[str, Any]]]:
    """Lark rules `calls` (one to `most`) and `more` (what follows the first begin tag), and the arguments' grammars."""
    begin, end = _terminal(syntax.begin, tokenizer), _terminal(syntax.end, tokenizer) if syntax.end else ""

    def again(rule: str) -> str:
        return f"({rule}){{0,{most - 1}}}" if most > 1 else ""

    shapes = {
        "hermes": (f"{begin} more", f'"\\n" call "\\n" {end} ' + again(f'"\\n" {begin} "\\n" call "\\n" {end}')),
        "llama3": ("more", "call"),
        "mistral": (f"{begin} more", f'"[" call {again(_NEXT_ITEM)} "]"'),
        "mistral-args": (f"{begin} more", f"call {again(f'{begin} call')}"),
        "deepseek": (f"{begin} more", f"call {again(_NEXT_LINE)} {end}"),
    }
    calls, more = shapes[syntax.name]
    names = [f"call_{index}" for index in range(len(tools))]
    rules = [f"calls: {calls}", f"more: {more}", f"call: {' | '.join(names)}"]
    grammars = []
    for index, tool in enumerate(tools):
        function = tool["function"]
        rules.append(f"call_{index}: {_call_rule(function['name'], f'@arguments_{index}', syntax, tokenizer)}")
        grammars.append({"name": f"arguments_{index}", "json_schema": _arguments_schema(function)})
    return "\n".join(rules) + "\n", grammars


def _call_rule(name: str, arguments: str, syntax: ToolSyntax, tokenizer: Tokenizer) -> str:
    """One call as the template writes it."""
    if syntax.name == "mistral-args":
        return f"{json.dumps(name)} {_terminal('[ARGS]', tokenizer)} {arguments}"
    if syntax.name == "deepseek":
        start, sep, stop = (_terminal(mark, tokenizer) for mark in syntax.marks)
        return f'{start} "function" {sep} {json.dumps(name)} "\\n```json\\n" {arguments} "\\n```" {stop}'
    key = "parameters" if syntax.name == "llama3" else "arguments"
    head = f'{{"name": {json.dumps(name)}, "{key}": '
    return f'{json.dumps(head)} {arguments} "}}"'


def _arguments_schema(function: Mapping[str, Any]) -> dict[str, Any]:
    """The tool's own schema, with no other keys than it names; without one there are no arguments.

    Raises: RequestError for a strict tool that allows others.
    """
    schema = function.get("parameters") or {"type": "object", "properties": {}}
    if function.get("strict"):
        check_strict(schema, f"tools: the parameters of {function['name']}")
    schema = closed(schema)
    options = {"whitespace_pattern": "[ ]?", "lenient": not function.get("strict")}
    return {**schema, "x-guidance": options}


def _terminal(text: str, tokenizer: Tokenizer) -> str:
    """A text as a Lark terminal: a control token by its id, anything else as characters."""
    return f"<[{tokenizer.token_id(text)}]>" if _is_special(text, tokenizer) else json.dumps(text)


def _is_special(text: str, tokenizer: Tokenizer) -> bool:
    token = tokenizer.token_id(text)
    return token is not None and tokenizer.is_special(token)
