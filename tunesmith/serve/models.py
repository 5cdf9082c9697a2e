"""/v1/models, and the routes that load and unload LoRA adapters."""

from __future__ import annotations

import time
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from tunesmith.serve.errors import ApiError, JsonResponse
from tunesmith.serve.schema.adapters import LoadAdapterRequest, UnloadAdapterRequest
from tunesmith.serve.state import Server, make_adapter


def model_cards(server: Server) -> list[dict[str, Any]]:
    """The model by all its names, and the adapters."""
    facts = server.engine.facts
    own = {"root": server.engine.options.model, "parent": None, "max_model_len": facts.get("max_model_len")}
    own |= {"embedding_size": facts.get("embedding_size"), "pooling": server.options.pooling}
    own |= {"single_turns": bool(facts.get("single_turns")), "vocab_size": facts.get("vocab_size")}
    cards = [_card(name, server.created, own) for name in server.options.names]
    for name, adapter in server.adapters.items():
        more = {"root": adapter.path, "parent": server.name, "max_model_len": facts.get("max_model_len")}
        more |= {"single_turns": adapter.single_turns, "vocab_size": facts.get("vocab_size")}
        cards.append(_card(name, adapter.created, more))
    return cards


def _card(name: str, created: int, more: dict[str, Any]) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": created, "owned_by": "tunesmith", **more}


async def list_models(server: Server) -> Response:
    """All models. Scripts wait for this list before they send requests, so there is none while there is no engine.

    Raises: ApiError (503) then.
    """
    server.engine.check_up()
    return JsonResponse({"object": "list", "data": model_cards(server)})


async def one_model(server: Server, name: str) -> Response:
    """One model."""
    server.engine.check_up()
    server.adapter_of(name)
    return JsonResponse(next(card for card in model_cards(server) if card["id"] == name))


async def load_adapter(server: Server, request: Request, body: LoadAdapterRequest) -> Response:
    """Load an adapter directory of the server under a name."""
    _check_allowed(server)
    is_taken = body.lora_name in server.adapters and not body.load_inplace
    if is_taken or body.lora_name in server.options.names:
        raise ApiError(400, f"there is a model called {body.lora_name!r} already", param="lora_name")
    await server.engine.load_adapter(body.lora_name, body.lora_path, bool(body.follow))
    server.adapters[body.lora_name] = make_adapter(body.lora_path, int(time.time()), bool(body.follow))
    return JsonResponse({"status": "loaded", "lora_name": body.lora_name})


async def unload_adapter(server: Server, body: UnloadAdapterRequest) -> Response:
    """Drop an adapter."""
    _check_allowed(server)
    if body.lora_name not in server.adapters:
        raise ApiError(404, f"there is no adapter {body.lora_name!r}", param="lora_name", code="model_not_found")
    await server.engine.unload_adapter(body.lora_name)
    server.adapters.pop(body.lora_name, None)
    return JsonResponse({"status": "unloaded", "lora_name": body.lora_name})


def _check_allowed(server: Server) -> None:
    if not server.options.allow_adapter_loading:
        raise ApiError(
            403, "adapters can't be loaded here: the server was started without --allow-adapter-loading",
            code="adapter_loading_off",
        )  # fmt: skip
    server.engine.check_up()
