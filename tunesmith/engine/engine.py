"""The engine's loop: admit, run one step, choose tokens, hand out text; finish or abort."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence

from tunesmith.engine.request import (
    DEFAULT_MAX_TOKENS,
    Completion,
    FinishReason,
    Request,
    SamplingParams,
    StepOutput,
    Timings,
)
from tunesmith.engine.runner import Runner
from tunesmith.engine.sampling import Sampler, choose_tokens
from tunesmith.engine.scheduler import Scheduler
from tunesmith.engine.scheduler import Sequence as Running
from tunesmith.engine.text import AnswerText, TextDecoder
from tunesmith.errors import RequestError


class Engine:
    """Requests in, step outputs out. Not thread-safe: one owner calls `step`."""

    def __init__(
        self,
        runner: Runner,
        *,
        stop_ids: Collection[int] = (),
        make_decoder: Callable[[Sequence[int]], TextDecoder] | None = None,
        max_running: int = 1,
    ) -> None:
        self.runner = runner
        self.stop_ids = frozenset(stop_ids)
        self.make_decoder = make_decoder
        self.scheduler = Scheduler(max_running)
        self.num_requests = 0
        self.mail: dict[int, list[StepOutput]] = {}

    def submit(self, prompt_ids: Sequence[int], params: SamplingParams, *, text_context: Sequence[int] = ()) -> int:
        """Queue a request; returns its id. Raises RequestError when it can never be served."""
        if not prompt_ids:
            raise RequestError("the prompt has no token: give at least one, for instance the beginning-of-text token")
        if params.stop and self.make_decoder is None:
            raise RequestError("stop texts need a tokenizer, and this model was loaded without one")
        max_tokens = self._max_tokens(len(prompt_ids), params)
        self.num_requests += 1
        request = Request(
            id=self.num_requests,
            prompt_ids=tuple(prompt_ids),
            params=params,
            max_tokens=max_tokens,
            arrived_s=time.perf_counter(),
            text_context=tuple(text_context),
        )
        self.scheduler.submit(request)
        return request.id

    def _max_tokens(self, num_prompt: int, params: SamplingParams) -> int:
        """The answer's limit within the context. Raises RequestError where it doesn't fit."""
        limit = self.runner.max_model_len
        room = limit - num_prompt
        if room < 1:
            raise RequestError(
                f"the prompt has {num_prompt} tokens and the context holds {limit}, so there is no room for an answer: "
                f"shorten the prompt to at most {limit - 1} tokens"
            )
        if params.max_tokens is None:
            return min(DEFAULT_MAX_TOKENS, room)
        if params.max_tokens > room:
            raise RequestError(
                f"{num_prompt} prompt tokens + max_tokens {params.max_tokens} exceed the context of {limit} tokens: "
                f"ask for max_tokens of at most {room}, or shorten the prompt"
            )
        return params.max_tokens

    @property
    def has_work(self) -> bool:
        """Whether any request waits or runs."""
        return self.scheduler.has_work

    def step(self) -> list[StepOutput]:
        """One forward pass over everything that runs: one new token per request.

        A step that is interrupted leaves caches and answers out of step, so what was running then is dropped.
        """
        self.scheduler.admit(self._start)
        running = list(self.scheduler.running)
        if not running:
            return []
        try:
            logits_BV = self.runner.step([(sequence.lease, sequence.pending) for sequence in running])
            tokens = choose_tokens(logits_BV, [sequence.sampler for sequence in running])
        except BaseException:
            for sequence in running:
                self.scheduler.finish(sequence)
            raise
        return [self._advance(sequence, token) for sequence, token in zip(running, tokens, strict=True)]

    def collect(self, wanted: Collection[int]) -> list[StepOutput]:
        """New outputs of the wanted requests, after a step if none wait; other requests' outputs are kept for them."""
        waiting = [request_id for request_id in self.mail if request_id in wanted]
        found = [output for request_id in waiting for output in self.mail.pop(request_id)]
        if found:
            return found
        if not self.has_work:
            raise RequestError("the request is gone: a step that it shared with others was interrupted; send it again")
        for output in self.step():
            if output.request_id in wanted:
                found.append(output)
            else:
                self.mail.setdefault(output.request_id, []).append(output)
        return found

    def _start(self, request: Request) -> Running | None:
        lease = self.runner.open(request.total_tokens)
        if lease is None:
            return None
        decoder = None if self.make_decoder is None else self.make_decoder(request.text_context)
        return Running(
            request=request,
            lease=lease,
            sampler=Sampler(request.params, request.prompt_ids),
            text=AnswerText(decoder, request.params.stop),
            started_s=time.perf_counter(),
            pending=list(request.prompt_ids),
        )

    def _advance(self, sequence: Running, token: int) -> StepOutput:
        if not sequence.token_ids:
            sequence.first_token_s = time.perf_counter()
        sequence.token_ids.append(token)
        sequence.pending = [token]
        piece, reason = self._say(sequence, token)
        if reason is None:
            return StepOutput(sequence.request.id, [token], piece)
        piece += sequence.text.finish()
        self.scheduler.finish(sequence)
        return StepOutput(sequence.request.id, [token], piece, _complete(sequence, reason))

    def _say(self, sequence: Running, token: int) -> tuple[str, FinishReason | None]:
        """The text this token adds, and why the answer ends here, if it does."""
        if token in self.stop_ids and not sequence.request.params.ignore_eos:
            return "", "stop"
        piece = sequence.text.push(token)
        if sequence.text.stopped:
            return piece, "stop"
        return piece, "length" if len(sequence.token_ids) >= sequence.request.max_tokens else None

    def abort(self, request_id: int) -> Completion | None:
        """End a request wherever it is and free its pages; what it has said so far, or None when it had not begun."""
        self.mail.pop(request_id, None)
        if self.scheduler.withdraw(request_id) is not None:
            return None
        sequence = self.scheduler.find(request_id)
        if sequence is None:
            return None
        sequence.text.finish()
        self.scheduler.finish(sequence)
        return _complete(sequence, "abort")


def _complete(sequence: Running, reason: FinishReason) -> Completion:
    request, now = sequence.request, time.perf_counter()
    num_tokens = len(sequence.token_ids)
    first = sequence.first_token_s or now
    timings = Timings(
        queued_s=sequence.started_s - request.arrived_s,
        ttft_s=first - request.arrived_s,
        total_s=now - request.arrived_s,
        tpot_s=(now - first) / (num_tokens - 1) if num_tokens > 1 else None,
    )
    return Completion(sequence.text.text, sequence.token_ids, reason, len(request.prompt_ids), timings)
