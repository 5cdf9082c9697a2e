"""/v1/responses: text in, text out, in the shape of OpenAI's newer interface. Nothing is stored."""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from tunesmith.engine.request import StructuredSpec
from tunesmith.serve.answers import TokenNames, collect, end_of
from tunesmith.serve.client import Job
from tunesmith.serve.errors import ApiError, JsonResponse
from tunesmith.serve.messages import Delta, End, Logprob
from tunesmith.serve.sampling import fit, json_spec, sampling_params
from tunesmith.serve.schema.common import JsonObjectFormat, Sampling
from tunesmith.serve.schema.responses import ResponsesJsonSchema, ResponsesRequest
from tunesmith.serve.state import REQUEST_ID_HEADER, Server, make_id
from tunesmith.serve.stream import EventStream, named_event, while_connected

log = logging.getLogger(__name__)


@dataclass
class ResponseCall:
    """One request, ready for the engine."""

    server: Server
    body: ResponsesRequest
    id: str
    message_id: str
    model: str
    job: Job
    deadline_s: float
    names: TokenNames
    created: int = field(default_factory=lambda: int(time.time()))


async def responses(server: Server, request: Request, body: ResponsesRequest) -> Response:
    """The route."""
    adapter = server.adapter_of(body.model)
    ticket = server.enter(request, 1, body.user or body.safety_identifier, body.metadata)
    try:
        call = await _prepare(server, request, body, adapter)
    except BaseException:
        ticket.leave()
        raise
    headers = {REQUEST_ID_HEADER: call.id}
    if body.stream:
        return EventStream(_events(call), headers=headers, on_close=ticket.leave, deadline_s=call.deadline_s)
    with ticket:
        (delta,) = await while_connected(request, collect(server, [call.job], call.deadline_s))
    return JsonResponse(_whole(call, delta), headers=headers)


async def _prepare(server: Server, request: Request, body: ResponsesRequest, adapter: str | None) -> ResponseCall:
    deadline_s = server.deadline_s(request, body.timeout)
    sampling = Sampling(temperature=body.temperature, top_p=body.top_p, seed=body.seed)
    prompt = await server.text.chat_prompt(_messages(body), {}, continues=False, param="input")
    ids, max_tokens = fit(
        await server.text.prompt_ids(prompt, "input"), body.max_output_tokens, server, sampling, "input"
    )
    wants_logprobs = bool(body.include)
    params = sampling_params(
        sampling, server, max_tokens, logprobs=(body.top_logprobs or 0) if wants_logprobs else None,
        structured=_structured(body),
    )  # fmt: skip
    call_id = make_id("resp", request, None)
    return ResponseCall(
        server, body, call_id, call_id.replace("resp-", "msg-", 1), body.model or server.name,
        Job(ids, params, stream=bool(body.stream), adapter=adapter), deadline_s, TokenNames(server.text.tokens, None),
    )  # fmt: skip


def _messages(body: ResponsesRequest) -> list[dict[str, Any]]:
    """The conversation: `instructions` are a system message before it."""
    head = [{"role": "system", "content": body.instructions}] if body.instructions is not None else []
    if isinstance(body.input, str):
        return [*head, {"role": "user", "content": body.input}]
    turns = []
    for message in body.input:
        content = message.content
        text = content if isinstance(content, str) else "\n".join(part.text for part in content)
        turns.append({"role": "system" if message.role == "developer" else message.role, "content": text})
    return [*head, *turns]


def _structured(body: ResponsesRequest) -> StructuredSpec | None:
    wanted = None if body.text is None else body.text.format
    if isinstance(wanted, JsonObjectFormat):
        return StructuredSpec("json_object")
    return json_spec("text", wanted.schema_, wanted.strict) if isinstance(wanted, ResponsesJsonSchema) else None


def _whole(call: ResponseCall, delta: Delta) -> dict[str, Any]:
    end = end_of(delta)
    is_cut = end.finish_reason == "length"
    message = _message(call, "incomplete" if is_cut else "completed", [_part(call, delta.text, delta.logprobs)])
    return _response(call, "incomplete" if is_cut else "completed", [message], end)


def _message(call: ResponseCall, status: str, parts: list[dict[str, Any]]) -> dict[str, Any]:
    return {"type": "message", "id": call.message_id, "status": status, "role": "assistant", "content": parts}


def _part(call: ResponseCall, text: str, logprobs: list[Logprob] | None) -> dict[str, Any]:
    part: dict[str, Any] = {"type": "output_text", "text": text, "annotations": []}
    return part if logprobs is None else {**part, "logprobs": call.names.content(logprobs)}


def _response(
    call: ResponseCall, status: str, output: list[dict[str, Any]], end: End | None, error: Any = None
) -> dict[str, Any]:
    body, params = call.body, call.job.params
    return {
        "id": call.id,
        "object": "response",
        "created_at": call.created,
        "status": status,
        "error": error,
        "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "model": call.model,
        "output": output,
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": None,
        "reasoning": {"effort": None, "summary": None},
        "store": False,
        "temperature": params.temperature,
        "text": {"format": _format(body)},
        "tool_choice": "none",
        "tools": [],
        "top_logprobs": body.top_logprobs or 0,
        "top_p": params.top_p,
        "truncation": "disabled",
        "usage": None if end is None else _usage(end),
        "user": body.user,
        "safety_identifier": body.safety_identifier,
        "prompt_cache_key": body.prompt_cache_key,
        "metadata": body.metadata or {},
    }


def _format(body: ResponsesRequest) -> dict[str, Any]:
    wanted = None if body.text is None else body.text.format
    return {"type": "text"} if wanted is None else wanted.model_dump(by_alias=True, exclude_none=True)


def _usage(end: End) -> dict[str, Any]:
    return {
        "input_tokens": end.prompt_tokens,
        "input_tokens_details": {"cached_tokens": end.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": end.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": end.prompt_tokens + end.completion_tokens,
    }


class _Numbered:
    """Events with their place in the sequence."""

    def __init__(self) -> None:
        self.number = 0

    def __call__(self, kind: str, **fields: Any) -> str:
        text = named_event(kind, {"type": kind, "sequence_number": self.number, **fields})
        self.number += 1
        return text


async def _events(call: ResponseCall) -> AsyncGenerator[str, None]:
    tell = _Numbered()
    place = {"item_id": call.message_id, "output_index": 0, "content_index": 0}
    whole = Delta()
    has_begun = False
    try:
        with call.server.engine.generate([call.job], call.deadline_s) as generation:
            while new := await generation.take():
                delta = new[0]
                if not has_begun:
                    has_begun = True
                    yield _beginning(call, tell, place)
                if delta.text or delta.logprobs:
                    logprobs = call.names.content(delta.logprobs or [])
                    yield tell("response.output_text.delta", **place, delta=delta.text, logprobs=logprobs)
                whole.add(delta)
        yield _ending(call, tell, place, whole)
    except Exception as error:
        if not has_begun:
            raise
        if not isinstance(error, ApiError):
            log.exception("a stream failed")
        message = error.message if isinstance(error, ApiError) else f"internal error: {type(error).__name__}"
        failure = {"code": "server_error", "message": message}
        yield tell("response.failed", response=_response(call, "failed", [], None, failure))


def _beginning(call: ResponseCall, tell: _Numbered, place: dict[str, Any]) -> str:
    empty = _response(call, "in_progress", [], None)
    item = _message(call, "in_progress", [])
    return (
        tell("response.created", response=empty)
        + tell("response.in_progress", response=empty)
        + tell("response.output_item.added", output_index=0, item=item)
        + tell("response.content_part.added", **place, part=_part(call, "", None))
    )


def _ending(call: ResponseCall, tell: _Numbered, place: dict[str, Any], whole: Delta) -> str:
    response = _whole(call, whole)
    part = response["output"][0]["content"][0]
    return (
        tell("response.output_text.done", **place, text=whole.text, logprobs=part.get("logprobs", []))
        + tell("response.content_part.done", **place, part=part)
        + tell("response.output_item.done", output_index=0, item=response["output"][0])
        + tell(f"response.{response['status']}", response=response)
    )
