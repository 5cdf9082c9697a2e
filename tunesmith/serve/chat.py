"""/v1/chat/completions: a conversation in, the assistant's turn out, whole or as it comes."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from tunesmith.serve.answers import TokenNames, collect, end_of, shown_text
from tunesmith.serve.chat_call import ChatCall
from tunesmith.serve.chat_stream import chat_events
from tunesmith.serve.client import Job
from tunesmith.serve.conversation import plain_messages, template_switches
from tunesmith.serve.errors import JsonResponse
from tunesmith.serve.limits import Ticket
from tunesmith.serve.messages import Delta
from tunesmith.serve.sampling import fit, sampling_params, structured_of
from tunesmith.serve.schema.chat import ChatRequest
from tunesmith.serve.state import REQUEST_ID_HEADER, Server, make_id, usage_of
from tunesmith.serve.stream import EventStream, while_connected
from tunesmith.serve.tool_use import make_plan, message_of, shown_tools


async def chat_completions(server: Server, request: Request, body: ChatRequest) -> Response:
    """The route."""
    adapter = server.adapter_of(body.model)
    ticket = server.enter(request, body.n or 1, body.user or body.safety_identifier, body.metadata)
    try:
        call = await _prepare(server, request, body, adapter)
    except BaseException:
        ticket.leave()
        raise
    headers = {REQUEST_ID_HEADER: call.id}
    if body.stream:
        return EventStream(chat_events(call), headers=headers, on_close=ticket.leave, deadline_s=call.deadline_s)
    return JsonResponse(await _whole(call, request, ticket), headers=headers)


async def _prepare(server: Server, request: Request, body: ChatRequest, adapter: str | None) -> ChatCall:
    text = server.text
    deadline_s = server.deadline_s(request, body.timeout)
    switches = {**template_switches(body, text), **shown_tools(body)}
    prompt = await text.chat_prompt(
        plain_messages(body.messages, text), switches, continues=bool(body.continue_final_message), param="messages"
    )
    structured = structured_of(body.response_format, body.structured_outputs)
    plan = make_plan(body, text, prompt, structured)
    ids, max_tokens = fit(await text.prompt_ids(prompt, "messages"), body.answer_tokens, server, body, "messages")
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    jobs = [
        Job(
            ids,
            sampling_params(
                body, server, max_tokens, logprobs=logprobs, prompt_logprobs=body.prompt_logprobs,
                structured=structured if plan is None else plan.structured, choice=choice,
                skip_special_tokens=None if plan is None or plan.skip_special_tokens else False,
            ),
            stream=bool(body.stream),
            continues=bool(body.continue_final_message),
            priority=body.priority or 0,
            adapter=adapter,
            cache_salt=body.cache_salt or "",
            num_choices=body.n or 1,
        )
        for choice in range(body.n or 1)
    ]  # fmt: skip
    names = TokenNames(text.tokens, body.return_tokens_as_token_ids)
    call_id = make_id("chatcmpl", request, body.request_id)
    return ChatCall(server, body, call_id, body.model or server.name, jobs, deadline_s, names, plan)


async def _whole(call: ChatCall, request: Request, ticket: Ticket) -> dict[str, Any]:
    with ticket:
        deltas = await while_connected(request, collect(call.server, call.jobs, call.deadline_s))
    answer = {
        **call.head("chat.completion"),
        "choices": [_choice(call, index, delta) for index, delta in enumerate(deltas)],
        "usage": usage_of([end_of(delta) for delta in deltas], 1),
        "service_tier": None,
        "system_fingerprint": None,
    }
    if call.body.prompt_logprobs is not None:
        answer["prompt_logprobs"] = call.names.prompt(end_of(deltas[0]).prompt_logprobs)
    if call.body.return_token_ids:
        answer["prompt_token_ids"] = list(call.jobs[0].prompt_ids)
    return answer


def _choice(call: ChatCall, index: int, delta: Delta) -> dict[str, Any]:
    end = end_of(delta)
    text = shown_text(delta, call.body.include_stop_str_in_output)
    if call.plan is None:
        message, reason = {"role": "assistant", "content": text, "refusal": None}, end.finish_reason
    else:
        message, reason = message_of(call.plan, text, end.finish_reason)
    choice = {
        "index": index,
        "message": message,
        "logprobs": call.names.chat(delta.logprobs),
        "finish_reason": reason,
        "stop_reason": end.stop_reason,
    }
    if call.body.return_token_ids:
        choice["token_ids"] = delta.token_ids
    return choice
