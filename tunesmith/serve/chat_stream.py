"""A chat answer as it comes: the role, then text, why it ended, and the usage in a chunk without choices."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from typing import Any

from tunesmith.serve.answers import shown_text
from tunesmith.serve.chat_call import ChatCall
from tunesmith.serve.errors import dumps
from tunesmith.serve.messages import Delta, End
from tunesmith.serve.state import usage, usage_of
from tunesmith.serve.stream import DONE, event
from tunesmith.serve.tool_parsers import Delta as Said
from tunesmith.serve.tool_use import change_of

_KIND = "chat.completion.chunk"


async def chat_events(call: ChatCall) -> AsyncGenerator[str, None]:
    """The events of all n answers, those of one step together."""
    choices = [_Choice(call, index) for index in range(len(call.jobs))]
    with call.server.engine.generate(call.jobs, call.deadline_s) as generation:
        while new := await generation.take():
            if text := "".join(choices[index].events(delta) for index, delta in new.items()):
                yield text
    if call.wants_usage:
        ends = [choice.end for choice in choices if choice.end is not None]
        yield event({**call.head(_KIND), "choices": [], "usage": usage_of(ends, 1)})
    yield DONE


class _Choice:
    """One answer that is being streamed."""

    def __init__(self, call: ChatCall, index: int) -> None:
        self.call = call
        self.index = index
        self.has_begun = False
        self.num_tokens = 0
        self.end: End | None = None
        self.parser = None if call.plan is None else call.plan.parser()
        # Chunks that only have text are put together by hand: at ten thousand a second that counts.
        self.is_plain = not (call.body.logprobs or call.body.return_token_ids or call.wants_usage_always)
        self._before = f'data: {dumps(call.head(_KIND))[:-1]},"choices":[{{"index":{index},"delta":{{"content":'
        usage_null = ',"usage":null' if call.wants_usage else ""
        self._after = f'}},"logprobs":null,"finish_reason":null}}]{usage_null}}}\n\n'

    def events(self, delta: Delta) -> str:
        """The chunks for what is new."""
        body = self.call.body
        self.num_tokens += len(delta.token_ids)
        found = "" if self.has_begun else self._begin()
        text = shown_text(delta, body.include_stop_str_in_output)
        if self.parser is not None:
            found += self._parsed(self.parser.feed(text), delta)
        elif self.is_plain:
            found += f"{self._before}{dumps(text)}{self._after}" if text else ""
        elif text or delta.token_ids:
            found += self._event({"content": text}, delta=delta)
        return found if delta.end is None else found + self._finish(delta.end)

    def _begin(self) -> str:
        self.has_begun = True
        if self.call.body.return_token_ids:
            return self._event({"role": "assistant", "content": ""}, prompt_token_ids=self.call.jobs[0].prompt_ids)
        return self._event({"role": "assistant", "content": ""})

    def _parsed(self, said: list[Said], delta: Delta | None) -> str:
        """Text, thoughts and tool calls; the tokens' facts go with the first of them, or alone."""
        found = ""
        for part in said:
            found += self._event(change_of(part), delta=delta)
            delta = None
        if delta is not None and delta.token_ids and not self.is_plain:
            found += self._event({}, delta=delta)
        return found

    def _finish(self, end: End) -> str:
        self.end = end
        if self.parser is None or self.call.plan is None:
            return self._event({}, reason=end.finish_reason, stop_reason=end.stop_reason)
        found = self._parsed(self.parser.finish(), None)
        reason = self.call.plan.finish_reason(self.parser, end.finish_reason)
        return found + self._event({}, reason=reason, stop_reason=end.stop_reason)

    def _event(
        self,
        change: dict[str, Any],
        *,
        delta: Delta | None = None,
        reason: str | None = None,
        stop_reason: str | int | None = None,
        prompt_token_ids: Sequence[int] | None = None,
    ) -> str:
        call = self.call
        choice: dict[str, Any] = {"index": self.index, "delta": change, "logprobs": None, "finish_reason": reason}
        if delta is not None:
            choice["logprobs"] = call.names.chat(delta.logprobs)
            if call.body.return_token_ids:
                choice["token_ids"] = delta.token_ids
        if reason is not None:
            choice["stop_reason"] = stop_reason
        chunk: dict[str, Any] = {**call.head(_KIND), "choices": [choice]}
        if prompt_token_ids is not None:
            chunk["prompt_token_ids"] = list(prompt_token_ids)
        if call.wants_usage_always:
            chunk["usage"] = usage(len(call.jobs[0].prompt_ids), self.num_tokens, 0)
        elif call.wants_usage:
            chunk["usage"] = None
        return event(chunk)
