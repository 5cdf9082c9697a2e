"""/v1/embeddings: the decoder's last hidden states, pooled over a text's tokens and scaled to length 1."""

from __future__ import annotations

import asyncio
import base64
import struct
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from tunesmith.serve.completions import prompt_ids
from tunesmith.serve.errors import ApiError, JsonResponse, bad_field, unsupported
from tunesmith.serve.schema.embeddings import EmbeddingRequest
from tunesmith.serve.state import Server
from tunesmith.serve.stream import while_connected


async def embeddings(server: Server, request: Request, body: EmbeddingRequest) -> Response:
    """The route. How the vectors are pooled ("mean" over all tokens, or the "last" one's) is the server's option."""
    if server.adapter_of(body.model) is not None:
        raise unsupported("model", "embeddings come from the base model: name that")
    server.engine.check_up()
    size = server.engine.facts.get("embedding_size")
    if size is None:
        reason = (
            "is shared by several processes" if server.engine.facts.get("is_native") else "runs by transformers' code"
        )
        raise ApiError(400, f"embeddings want our own decoder in one process, and this model {reason}", param="model")
    if body.dimensions not in (None, size):
        raise unsupported("dimensions", f"dimensions can only be {size}, the model's hidden size")
    inputs = body.inputs()
    if len(inputs) > server.options.max_choices * 8:
        raise bad_field("input", f"{len(inputs)} inputs in one request; at most {server.options.max_choices * 8}")
    with server.enter(request, 1, body.user):
        wanted = [await _ids(server, text) for text in inputs]
        deadline_s = server.deadline_s(request, body.timeout)
        try:
            async with asyncio.timeout_at(deadline_s):
                work = server.engine.embed(wanted, server.options.pooling)
                vectors = await while_connected(request, work)
        except TimeoutError:
            raise ApiError(408, "the request's time is over before all vectors were made", code="timeout") from None
    tokens = sum(map(len, wanted))
    data = [
        {"object": "embedding", "index": index, "embedding": _encoded(vector, body.encoding_format)}
        for index, vector in enumerate(vectors)
    ]
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return JsonResponse({"object": "list", "data": data, "model": body.model or server.name, "usage": usage})


async def _ids(server: Server, text: str | list[int]) -> list[int]:
    ids = await prompt_ids(server, text, True, "input")
    if not ids:
        raise bad_field("input", "input has no token")
    if len(ids) > server.max_model_len:
        raise ApiError(
            400,
            f"this model's maximum context length is {server.max_model_len} tokens; an input has {len(ids)}",
            param="input",
            code="context_length_exceeded",
        )
    return ids


def _encoded(vector: bytes, form: str | None) -> Any:
    """A list of numbers, or float32 little-endian in base64."""
    if form == "base64":
        return base64.b64encode(vector).decode("ascii")
    return list(struct.unpack(f"<{len(vector) // 4}f", vector))
