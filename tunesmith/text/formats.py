"""Rows in the formats that people have, made into one of three kinds of example.

alpaca      {"instruction", "input", "output", "history", "system"}; also prompt/completion, question/answer, and in
            Chinese 指令/输入/输出, 问题/答案, 提问/回答, 用户/助手 (`row_keys.py`)
messages    {"messages": [{"role", "content"}], "tools"}; content may be a list of text parts
sharegpt    {"conversations": [{"from", "value"}], "system", "tools"}
text        {"text"}
preference  chosen and rejected beside a prompt, a conversation or an instruction
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tunesmith.text.row_keys import ANSWERS, HISTORIES, INPUTS, QUESTIONS, SYSTEMS, TEXTS, clash, present

Message = dict[str, Any]
_ROLES = {"system": "system", "user": "user", "assistant": "assistant", "tool": "tool", "developer": "system",
          "系统": "system", "用户": "user", "助手": "assistant"}  # fmt: skip
_SHAREGPT_ROLES = {
    **_ROLES, "human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant",
    "function_call": "function_call", "observation": "tool", "function_response": "tool",
}  # fmt: skip
_MEDIA = ("images", "image", "videos", "audios")


class RowError(ValueError):
    """What is wrong with a row, without its place."""


@dataclass(frozen=True)
class Conversation:
    """Messages as chat templates want them. A message's `weight: 0` keeps its answer out of the loss."""

    messages: list[Message]
    tools: list[Any] | None = None


@dataclass(frozen=True)
class PlainText:
    """A document, or a piece of one: `begins` and `ends` tell whether its first and last characters are here.

    A document in pieces is cut into documents of max_length; a whole one follows data.too_long.
    """

    text: str
    begins: bool = True
    ends: bool = True
    pieces: bool = False


@dataclass(frozen=True)
class Preference:
    """A prompt (which may hold earlier turns) with the better and the worse answer."""

    prompt: list[Message]
    chosen: Message
    rejected: Message
    tools: list[Any] | None = None


Example = Conversation | PlainText | Preference


def detect_format(rows: Iterable[Any]) -> str | None:
    """The format of the first rows by majority; None when no row looks like any."""
    votes = Counter(name for row in rows if (name := _looks_like(row)) is not None)
    return votes.most_common(1)[0][0] if votes else None


def _looks_like(row: Any) -> str | None:
    if isinstance(row, PlainText):
        return "text"
    if not isinstance(row, dict):
        return None
    keys = set(row)
    if {"chosen", "rejected"} <= keys or {"chosen_messages", "rejected_messages"} <= keys:
        return "preference"
    if "messages" in keys:
        return "messages"
    if "conversations" in keys or "conversation" in keys:
        return "sharegpt"
    if keys & set(QUESTIONS) and keys & set(ANSWERS):
        return "alpaca"
    return "text" if keys & set(TEXTS) else None


def to_example(row: Any, format_name: str) -> Example:
    """The example a row holds.

    Raises: RowError saying what is missing or has the wrong type.
    """
    if isinstance(row, PlainText) and format_name == "text":
        _check_unicode(row.text)
        return row
    if not isinstance(row, dict):
        raise RowError(f"a row must be an object, got {_kind(row)}")
    media = next((key for key in _MEDIA if row.get(key)), None)
    if media is not None:
        raise RowError(f"the row has {media!r}; images, video and sound can't be trained on yet")
    example = _READERS[format_name](row)
    for text in _texts(example):
        _check_unicode(text)
    return example


def _alpaca(row: Mapping[str, Any]) -> Conversation:
    question, answer = _first_of(row, QUESTIONS), _first_of(row, ANSWERS)
    return _conversation([*_asked(row, question), {"role": "assistant", "content": _string(row, answer)}], None)


def _asked(row: Mapping[str, Any], question: str) -> list[Message]:
    """System message, history and question of an alpaca row."""
    instruction, more = _string(row, question), _string(row, _one_of(row, INPUTS) or "input", required=False)
    if not (instruction or more).strip():
        raise RowError(f"{question!r} is empty")
    messages = _system(row)
    for turn in _list(row, _one_of(row, HISTORIES) or "history"):
        if not isinstance(turn, list | tuple) or len(turn) != 2 or not all(isinstance(text, str) for text in turn):
            raise RowError("'history' must be a list of [question, answer] pairs of strings")
        messages += [{"role": "user", "content": turn[0]}, {"role": "assistant", "content": turn[1]}]
    text = f"{instruction}\n{more}" if instruction and more else instruction + more
    return [*messages, {"role": "user", "content": text}]


def _messages(row: Mapping[str, Any]) -> Conversation:
    if isinstance(row.get("label"), bool):
        raise RowError(
            "rows with a 'label' are feedback for KTO, which is not supported; remove the bad answers and the label"
        )
    messages = [_message(turn) for turn in _list(row, "messages", required=True)]
    return _conversation(_with_system(row, messages), _tools(row))


def _message(turn: Any) -> Message:
    if not isinstance(turn, dict):
        raise RowError(f"a message must be an object with role and content, got {_kind(turn)}")
    role = _ROLES.get(str(turn.get("role")))
    if role is None:
        raise RowError(f"a message has the role {turn.get('role')!r}; allowed: {', '.join(_ROLES)}")
    message: Message = {"role": role}
    calls = turn.get("tool_calls")
    if calls:
        message["tool_calls"] = [_tool_call(call) for call in _list(turn, "tool_calls")]
    message.update(_content(turn.get("content"), bool(calls)))
    for key in ("name", "tool_call_id", "reasoning_content"):
        if isinstance(turn.get(key), str):
            message[key] = turn[key]
    weight = turn.get("weight", turn.get("loss_weight"))
    if role == "assistant" and weight is not None:
        if weight not in (0, 1) or isinstance(weight, str):
            raise RowError(f"a message's weight must be 0 or 1, got {weight!r}")
        if weight == 0:
            message["weight"] = 0
    return message


def _content(content: Any, has_calls: bool) -> Message:
    """A message's content, and its reasoning where parts hold one."""
    if content is None and has_calls:
        return {"content": ""}
    if isinstance(content, str):
        return {"content": content}
    if not isinstance(content, list):
        raise RowError(f"a message's content must be a string or a list of text parts, got {_kind(content)}")
    texts: dict[str, list[str]] = {"text": [], "reasoning": [], "tool_call": []}
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        text = part.get("text", part.get("value")) if isinstance(part, dict) else None
        if kind not in texts or not isinstance(text, str):
            raise RowError(f"a content part of type {kind!r} can't be trained on; allowed: {', '.join(texts)}")
        texts[kind].append(text)
    found: Message = {"content": "".join(texts["text"])}
    if texts["reasoning"]:
        found["reasoning_content"] = "".join(texts["reasoning"])
    if texts["tool_call"]:
        found["tool_calls"] = [_tool_call(_json(text, "a tool_call part")) for text in texts["tool_call"]]
    return found


def _tool_call(call: Any) -> Message:
    """A tool call whose arguments are an object, which is what templates write as JSON."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise RowError("a tool call must be an object with function.name and function.arguments")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        arguments = _json(arguments, "a tool call's arguments")
    return {"type": "function", "function": {"name": function["name"], "arguments": arguments}}


def _sharegpt(row: Mapping[str, Any]) -> Conversation:
    key = "conversations" if "conversations" in row else "conversation"
    return _conversation(_with_system(row, _sharegpt_turns(_list(row, key, required=True))), _tools(row))


def _sharegpt_turns(turns: Sequence[Any]) -> list[Message]:
    messages: list[Message] = []
    for turn in turns:
        if not isinstance(turn, dict):
            raise RowError(f"a turn must be an object with from and value, got {_kind(turn)}")
        if "role" in turn:
            messages.append(_message(turn))
            continue
        role, value = _SHAREGPT_ROLES.get(str(turn.get("from"))), turn.get("value")
        if role is None:
            raise RowError(f"a turn is from {turn.get('from')!r}; allowed: {', '.join(_SHAREGPT_ROLES)}")
        if not isinstance(value, str):
            raise RowError(f"a turn's value must be a string, got {_kind(value)}")
        if role == "function_call":
            calls = _json(value, "a function_call")
            calls = calls if isinstance(calls, list) else [calls]
            messages.append({"role": "assistant", "content": "", "tool_calls": [_tool_call(call) for call in calls]})
        else:
            messages.append({"role": role, "content": value})
    return messages


def _text(row: Mapping[str, Any]) -> PlainText:
    text = _string(row, _first_of(row, TEXTS))
    if not text.strip():
        raise RowError("'text' is empty")
    return PlainText(text)


def _preference(row: Mapping[str, Any]) -> Preference:
    keys = ("chosen_messages", "rejected_messages") if "chosen_messages" in row else ("chosen", "rejected")
    if not all(key in row for key in keys):
        raise RowError("a preference needs 'chosen' and 'rejected' (feedback rows with a label are not supported)")
    asked = _preference_prompt(row)
    (prompt, chosen), (other, rejected) = (_preferred(row, key, asked) for key in keys)
    if prompt != other:
        raise RowError(f"{keys[0]!r} and {keys[1]!r} answer different prompts")
    if not any(message["role"] in ("user", "tool") for message in prompt):
        raise RowError("the pair has no prompt")
    if chosen == rejected:
        raise RowError(f"{keys[0]!r} and {keys[1]!r} are the same answer; there is nothing to prefer")
    tools = _tools(row)
    for answer in (chosen, rejected):
        _conversation([*prompt, answer], tools)
    return Preference(prompt, chosen, rejected, tools)


def _preference_prompt(row: Mapping[str, Any]) -> list[Message]:
    """The prompt beside the answers: a conversation, a question, or nothing but a system message."""
    keys = ("conversations", "messages", *QUESTIONS)
    key = next((key for key in keys if row.get(key) is not None), None)
    if key is None:
        return _system(row)
    if key in ("conversations", "messages") or isinstance(row[key], list):
        return _unweighted(_with_system(row, _sharegpt_turns(_list(row, key))))
    return _asked(row, key)


def _preferred(row: Mapping[str, Any], key: str, asked: list[Message]) -> tuple[list[Message], Message]:
    """Prompt and answer; a list of messages may repeat what is asked, or hold all of it."""
    value = row[key]
    if isinstance(value, str):
        if not any(message["role"] != "system" for message in asked):
            raise RowError(f"{key!r} is a text without a prompt; add 'prompt', or give lists of messages")
        return asked, {"role": "assistant", "content": value}
    turns = _sharegpt_turns(value if isinstance(value, list) else [value])
    if not turns or turns[-1]["role"] != "assistant":
        raise RowError(f"{key!r} must end with an assistant's answer")
    if turns[-1].get("weight") == 0:
        raise RowError(f"{key!r} has an answer of weight 0; both answers of a pair are trained")
    before = _unweighted(turns[:-1])
    if not before:
        return asked, turns[-1]
    if any(message not in before for message in asked if message["role"] != "system"):
        raise RowError(f"{key!r} answers another prompt than the row's")
    system = [] if before[0]["role"] == "system" else [message for message in asked if message["role"] == "system"]
    return system + before, turns[-1]


def _unweighted(messages: list[Message]) -> list[Message]:
    return [{k: v for k, v in message.items() if k != "weight"} for message in messages]


def _conversation(messages: list[Message], tools: list[Any] | None) -> Conversation:
    answers = [message for message in messages if message["role"] == "assistant"]
    if not messages:
        raise RowError("the conversation is empty")
    if not answers:
        raise RowError("the conversation has no assistant turn")
    for answer in answers:
        if not str(answer["content"]).strip() and not answer.get("tool_calls"):
            raise RowError("an assistant turn is empty")
    return Conversation(messages, tools)


def _with_system(row: Mapping[str, Any], messages: list[Message]) -> list[Message]:
    return messages if messages and messages[0]["role"] == "system" else _system(row) + messages


def _system(row: Mapping[str, Any]) -> list[Message]:
    text = _string(row, _one_of(row, SYSTEMS) or "system", required=False)
    return [{"role": "system", "content": text}] if text else []


def _tools(row: Mapping[str, Any]) -> list[Any] | None:
    tools = row.get("tools")
    if isinstance(tools, str):
        tools = _json(tools, "'tools'") if tools.strip() else None
    if tools is not None and not isinstance(tools, list):
        raise RowError(f"'tools' must be a list, got {_kind(tools)}")
    return tools or None


def _json(text: str, what: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise RowError(f"{what} must be JSON, got {text[:60]!r}") from None


def _first_of(row: Mapping[str, Any], keys: Sequence[str]) -> str:
    key = _one_of(row, keys)
    if key is None:
        raise RowError(f"the row has none of the keys {', '.join(keys)}; it has {', '.join(map(str, row)) or 'none'}")
    return key


def _one_of(row: Mapping[str, Any], keys: Sequence[str]) -> str | None:
    """Which of keys that mean the same the row has. Raises: RowError where two say different things."""
    if (two := clash(row, keys)) is not None:
        raise RowError(f"the row has both {two[0]!r} and {two[1]!r}, which mean the same and differ: keep one of them")
    return present(row, keys)


def _string(row: Mapping[str, Any], key: str, required: bool = True) -> str:
    value = row.get(key)
    if value is None and not required:
        return ""
    if not isinstance(value, str):
        raise RowError(f"{key!r} must be a string, got {_kind(value)}")
    return value


def _list(row: Mapping[str, Any], key: str, required: bool = False) -> list[Any]:
    value = row.get(key)
    if value is None and not required:
        return []
    if not isinstance(value, list):
        raise RowError(f"{key!r} must be a list, got {_kind(value)}")
    return value


def _kind(value: Any) -> str:
    names = {type(None): "null", bool: "a boolean", int: "a number", float: "a number", str: "a string", list: "a list"}
    return names.get(type(value), "an object")


def _texts(example: Example) -> Iterable[str]:
    if isinstance(example, PlainText):
        return [example.text]
    if isinstance(example, Preference):
        return [str(m["content"]) for m in (*example.prompt, example.chosen, example.rejected)]
    return [str(m["content"]) for m in example.messages]


def _check_unicode(text: str) -> None:
    try:
        text.isascii() or text.encode()
    except UnicodeEncodeError as error:
        raise RowError(f"the text has half a character (a lone surrogate, {error.object[error.start]!a})") from None


_READERS: dict[str, Callable[[Mapping[str, Any]], Example]] = {
    "alpaca": _alpaca,
    "messages": _messages,
    "sharegpt": _sharegpt,
    "text": _text,
    "preference": _preference,
}
