"""pydantic's complaints in one sentence that names the field."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tunesmith.serve.errors import ApiError

_SHOWN = 3
_OWN = ("unknown_parameter", "unsupported_value")


def validation_error(errors: Sequence[Any]) -> ApiError:
    """400 for what FastAPI's validation found."""
    first = errors[0]
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is no JSON: {first.get('ctx', {}).get('error', first['msg'])}", code="bad_json")
    own = [error for error in errors if error["type"] in _OWN]
    # Of a union's variants each complains; what we say ourselves says more than that a list is no text.
    empty = {_path(error["loc"]) for error in errors if _is_empty(error)}
    kept = own or [error for error in errors if _is_empty(error) or _path(error["loc"]) not in empty]
    said = list(dict.fromkeys(_sentence(error) for error in kept))
    more = f" (and {len(said) - _SHOWN} more)" if len(said) > _SHOWN else ""
    code = kept[0]["type"] if own else "invalid_value"
    return ApiError(400, "; ".join(said[:_SHOWN]) + more, param=_place(kept[0]) or None, code=code)


def _sentence(error: Any) -> str:
    if error["type"] in _OWN:
        place, text = _path(error["loc"]), error["ctx"]["text"]
        return f"{place}: {text}" if place else str(text)
    text = "the text is empty" if _is_empty(error) else str(error["msg"])
    sentence = f"{_path(error['loc']) or 'the body'}: {text[:1].lower()}{text[1:]}"
    return sentence.encode("utf-8", errors="replace").decode("utf-8")


def _is_empty(error: Any) -> bool:
    return error["type"] == "string_too_short" and error.get("input") == ""


def _place(error: Any) -> str:
    """The path of the field."""
    path, field = _path(error["loc"]), error.get("ctx", {}).get("field", "") if error["type"] in _OWN else ""
    return f"{path}.{field}" if path and field else path or field


def _path(location: Sequence[Any]) -> str:
    """`messages[0].content` of ("body", "messages", 0, "user", "content"): names of variants are left out."""
    path = ""
    for part in location[1:] if location and location[0] in ("body", "query", "path") else location:
        if isinstance(part, int):
            path += f"[{part}]"
        elif part in _VARIANTS or not part.isidentifier():
            continue
        else:
            path += f".{part}" if path else part
    return path[:200]


_VARIANTS = frozenset(
    {"str", "int", "float", "bool", "system", "developer", "user", "assistant", "tool", "text"}
    | {"json_object", "json_schema"}
)
