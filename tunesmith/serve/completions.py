"""/v1/completions: texts or token ids go on, whole or as it comes."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from tunesmith.serve.answers import TextOffsets, TokenNames, collect, end_of, shown_text
from tunesmith.serve.client import Job
from tunesmith.serve.errors import JsonResponse, unsupported
from tunesmith.serve.limits import Ticket
from tunesmith.serve.messages import Delta, End, Logprob
from tunesmith.serve.sampling import fit, sampling_params, structured_of
from tunesmith.serve.schema.completions import CompletionRequest
from tunesmith.serve.state import REQUEST_ID_HEADER, Server, make_id, usage, usage_of
from tunesmith.serve.stream import DONE, EventStream, event, while_connected

# OpenAI's own default.
DEFAULT_MAX_TOKENS = 16


@dataclass
class CompletionCall:
    """One request, ready for the engine: n answers to each prompt, those to one prompt side by side."""

    server: Server
    body: CompletionRequest
    id: str
    model: str
    jobs: list[Job]
    echoes: list[str]
    deadline_s: float
    names: TokenNames
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def num_prompts(self) -> int:
        """How many prompts there are."""
        return len(self.jobs) // (self.body.n or 1)

    @property
    def is_echo_only(self) -> bool:
        """Whether only the prompt is wanted; the engine makes one token, which nobody sees."""
        return self.body.max_tokens == 0

    def head(self) -> dict[str, Any]:
        """The fields that every answer begins with."""
        return {"id": self.id, "object": "text_completion", "created": self.created, "model": self.model}

    def echo(self, index: int) -> str | None:
        """The prompt's text before an answer, where that was asked for."""
        return self.echoes[index // (self.body.n or 1)] if self.body.echo else None

    def offsets(self, *, start: int = 0, drops_blank: bool = False) -> TextOffsets:
        """Where an answer's tokens begin in its text."""
        hides = self.body.skip_special_tokens is not False
        return TextOffsets(self.names.texts, start=start, hides_special=hides, drops_blank=drops_blank)

    def usage(self, ends: list[End]) -> dict[str, Any]:
        """OpenAI's usage object."""
        return usage_of(ends, self.num_prompts, hidden_tokens=len(ends) if self.is_echo_only else 0)


async def completions(server: Server, request: Request, body: CompletionRequest) -> Response:
    """The route."""
    adapter = server.adapter_of(body.model)
    prompts = body.prompts()
    num_answers = len(prompts) * (body.n or 1)
    if num_answers > server.options.max_choices:
        raise unsupported("prompt", f"{num_answers} answers in one request; at most {server.options.max_choices}")
    ticket = server.enter(request, num_answers, body.user)
    try:
        call = await _prepare(server, request, body, prompts, adapter)
    except BaseException:
        ticket.leave()
        raise
    headers = {REQUEST_ID_HEADER: call.id}
    if body.stream:
        return EventStream(_events(call), headers=headers, on_close=ticket.leave, deadline_s=call.deadline_s)
    return JsonResponse(await _whole(call, request, ticket), headers=headers)


async def _prepare(
    server: Server, request: Request, body: CompletionRequest, prompts: Sequence[str | list[int]], adapter: str | None
) -> CompletionCall:
    text = server.text
    deadline_s = server.deadline_s(request, body.timeout)
    structured = structured_of(body.response_format, body.structured_outputs)
    wanted = DEFAULT_MAX_TOKENS if body.max_tokens is None else max(1, body.max_tokens)
    prompt_logprobs = body.prompt_logprobs if body.prompt_logprobs is not None or not body.echo else body.logprobs
    jobs: list[Job] = []
    echoes: list[str] = []
    for prompt in prompts:
        ids = await prompt_ids(server, prompt, body.add_special_tokens, "prompt")
        ids, max_tokens = fit(ids, wanted, server, body, "prompt")
        if body.echo:
            echoes.append(await text.decode(ids, skip_special=body.skip_special_tokens is not False))
        for choice in range(body.n or 1):
            params = sampling_params(
                body, server, max_tokens, logprobs=body.logprobs, prompt_logprobs=prompt_logprobs,
                structured=structured, choice=choice,
            )  # fmt: skip
            order = body.priority or 0, adapter, body.cache_salt or "", body.n or 1
            jobs.append(Job(ids, params, bool(body.stream), True, *order))
    names = TokenNames(text.tokens, body.return_tokens_as_token_ids)
    call_id = make_id("cmpl", request, body.request_id)
    return CompletionCall(server, body, call_id, body.model or server.name, jobs, echoes, deadline_s, names)


async def prompt_ids(server: Server, prompt: str | list[int], add_special: bool | None, param: str) -> list[int]:
    """The ids of a text, or the checked ids."""
    if isinstance(prompt, str):
        return await server.text.encode(prompt, add_special=add_special is not False, param=param)
    return server.text.check_ids(prompt, int(server.engine.facts["vocab_size"]), param)


async def _whole(call: CompletionCall, request: Request, ticket: Ticket) -> dict[str, Any]:
    with ticket:
        deltas = await while_connected(request, collect(call.server, call.jobs, call.deadline_s))
    return {
        **call.head(),
        "choices": [_choice(call, index, delta) for index, delta in enumerate(deltas)],
        "usage": call.usage([end_of(delta) for delta in deltas]),
        "system_fingerprint": None,
    }


def _choice(call: CompletionCall, index: int, delta: Delta) -> dict[str, Any]:
    end = end_of(delta)
    if call.is_echo_only:
        delta = Delta([], "", None if delta.logprobs is None else [], end)
    ids = list(call.jobs[index].prompt_ids)
    echo = call.echo(index)
    choice = {
        "index": index,
        "text": (echo or "") + shown_text(delta, call.body.include_stop_str_in_output),
        "logprobs": _logprobs(call, ids, delta, end, echo) if call.body.logprobs is not None else None,
        "finish_reason": "length" if call.is_echo_only else end.finish_reason,
        "stop_reason": end.stop_reason,
    }
    if call.body.prompt_logprobs is not None:
        choice["prompt_logprobs"] = call.names.prompt(end.prompt_logprobs)
    if call.body.return_token_ids:
        choice |= {"prompt_token_ids": ids, "token_ids": delta.token_ids}
    return choice


def _logprobs(call: CompletionCall, ids: list[int], delta: Delta, end: End, echo: str | None) -> dict[str, Any]:
    """Of the new tokens; with echo of the prompt's too, whose first has none."""
    entries: list[Logprob | None] = list(delta.logprobs or [])
    if echo is None:
        return call.names.completion(entries, delta.token_ids, call.offsets())
    prompt = end.prompt_logprobs or []
    # The engine's list may begin with the first token's None, or with the second token.
    prompt = prompt if len(prompt) == len(ids) else [None, *prompt]
    offsets = call.offsets(drops_blank=not echo.startswith(" "))
    return call.names.completion([*prompt, *entries], [*ids, *delta.token_ids], offsets)


class _Choice:
    """One answer that is being streamed."""

    def __init__(self, call: CompletionCall, index: int) -> None:
        self.call = call
        self.index = index
        self.has_begun = False
        self.offsets = call.offsets(start=len(call.echo(index) or ""))
        self.num_tokens = 0
        self.end: End | None = None

    def events(self, delta: Delta) -> str:
        """The chunks for what is new."""
        call, body, end = self.call, self.call.body, delta.end
        ids = list(call.jobs[self.index].prompt_ids)
        if call.is_echo_only:
            delta = Delta([], "", None if delta.logprobs is None else [], end)
        text = shown_text(delta, body.include_stop_str_in_output)
        logprobs = None
        if body.logprobs is not None and delta.logprobs is not None:
            logprobs = call.names.completion(list(delta.logprobs), delta.token_ids, self.offsets)
        more: dict[str, Any] = {}
        if not self.has_begun:
            self.has_begun = True
            text = (call.echo(self.index) or "") + text
            if body.return_token_ids:
                more["prompt_token_ids"] = ids
        if body.return_token_ids:
            more["token_ids"] = delta.token_ids
        self.num_tokens += len(delta.token_ids)
        self.end = end
        if not (text or more or logprobs or end):
            return ""
        return self._event(text, logprobs, end, more)

    def _event(self, text: str, logprobs: dict[str, Any] | None, end: End | None, more: dict[str, Any]) -> str:
        call = self.call
        reason = None if end is None else "length" if call.is_echo_only else end.finish_reason
        choice = {"index": self.index, "text": text, "logprobs": logprobs, "finish_reason": reason, **more}
        if end is not None:
            choice["stop_reason"] = end.stop_reason
        chunk = {**call.head(), "choices": [choice]}
        options = call.body.stream_options
        if options is not None and options.continuous_usage_stats:
            chunk["usage"] = usage(len(call.jobs[self.index].prompt_ids), self.num_tokens, 0)
        elif options is not None and options.include_usage:
            chunk["usage"] = None
        return event(chunk)


async def _events(call: CompletionCall) -> AsyncGenerator[str, None]:
    choices = [_Choice(call, index) for index in range(len(call.jobs))]
    with call.server.engine.generate(call.jobs, call.deadline_s) as generation:
        while new := await generation.take():
            if text := "".join(choices[index].events(delta) for index, delta in new.items()):
                yield text
    options = call.body.stream_options
    if options is not None and options.include_usage:
        ends = [choice.end for choice in choices if choice.end is not None]
        yield event({**call.head(), "choices": [], "usage": call.usage(ends)})
    yield DONE
