"""The OpenAPI document: what each route answers, and the key it wants."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel

from tunesmith.serve.schema.answers import ErrorAnswer

_ERRORS = {
    400: "a field is wrong, unknown or not supported",
    401: "no API key, or a wrong one",
    403: "not allowed",
    404: "no such model",
    408: "the request did not arrive in time, or its own time is over",
    413: "the body is too long",
    415: "the body is no application/json",
    429: "the queue, or the key's share of it, is full",
    431: "the headers are too long",
    500: "the request failed in the engine",
    503: "there is no engine now",
}


def route(answer: type[BaseModel] | None, *, streams: bool = False, text: bool = False, is_open: bool = False) -> Any:
    """The arguments of a route's decorator.

    Args: `streams`: it may answer with server-sent events; `text`: with plain text; `is_open`: it wants no key.
    """
    content: dict[str, Any] = {"text/plain": {"schema": {"type": "string"}}} if text else {}
    if streams:
        content["text/event-stream"] = {"schema": {"description": "with stream: true; each `data` is JSON, or [DONE]"}}
    found: dict[int | str, Any] = {200: {"description": "done", **({"content": content} if content else {})}}
    if answer is not None:
        found[200]["model"] = answer
    for status, description in _ERRORS.items():
        found[status] = {"description": description, "model": ErrorAnswer}
    return {"responses": found, "response_model": None, "openapi_extra": {"security": []} if is_open else None}


def install(app: FastAPI, *, has_keys: bool) -> None:
    """Make the document on demand: without FastAPI's 422, which is 400 here, and with the keys."""

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            made = get_openapi(title=app.title, version=app.version, routes=app.routes)
            for operations in made["paths"].values():
                for operation in operations.values():
                    operation["responses"].pop("422", None)
            schemas = made.get("components", {}).get("schemas", {})
            for name in ("HTTPValidationError", "ValidationError"):
                schemas.pop(name, None)
            if has_keys:
                made.setdefault("components", {})["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
                made["security"] = [{"key": []}]
            app.openapi_schema = made
        return app.openapi_schema

    app.openapi = document  # type: ignore[method-assign]
