"""Errors in OpenAI's shape: {"error": {"message", "type", "param", "code"}}, with the status that fits."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from starlette.responses import Response

# Made once: `json.dumps` with arguments makes a new one for every call.
_ENCODER = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))
# What many clients take for the end of a stream's line (httpx does), as JSON escapes.
_LINE_ENDS = {"\x85": "\\u0085", "\u2028": "\\u2028", "\u2029": "\\u2029"}
_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    429: "rate_limit_error",
    431: "invalid_request_error",
    503: "service_unavailable_error",
}


class ApiError(Exception):
    """An answer that is an error.

    Args:
        param: the field that is wrong.
        code: what programs can tell it by.
        retry_after_s: when to try again.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: float | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = dict(headers or {})
        if retry_after_s is not None:
            self.headers["Retry-After"] = str(max(1, round(retry_after_s)))

    def body(self) -> dict[str, Any]:
        """The object that clients read."""
        return error_body(self.status, self.message, self.param, self.code)

    def response(self) -> Response:
        """The whole HTTP answer."""
        return JsonResponse(self.body(), status_code=self.status, headers=self.headers)


class JsonResponse(Response):
    """JSON in UTF-8, and never NaN."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        """The body."""
        return to_bytes(dumps(content))


def dumps(content: Any) -> str:
    """Compact JSON on one line, letters as they are. Raises ValueError for NaN and infinity."""
    text = _ENCODER.encode(content)
    if not text.isascii():
        for character, escape in _LINE_ENDS.items():
            if character in text:
                text = text.replace(character, escape)
    return text


def to_bytes(text: str) -> bytes:
    """JSON in UTF-8; half of a pair of surrogates, which UTF-8 doesn't have, becomes the JSON escape that it is."""
    return text.encode("utf-8", "backslashreplace")


def error_body(status: int, message: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """OpenAI's error object."""
    kind = _TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def bad_field(param: str, message: str) -> ApiError:
    """400 for one field."""
    return ApiError(400, message, param=param, code="invalid_value")


def unsupported(param: str, message: str) -> ApiError:
    """400 for a field, or a value of it, that this server doesn't have."""
    return ApiError(400, message, param=param, code="unsupported_value")


def engine_down(message: str, retry_after_s: float = 2.0) -> ApiError:
    """503: the engine is starting, restarting or has just died."""
    return ApiError(503, message, code="engine_unavailable", retry_after_s=retry_after_s)
