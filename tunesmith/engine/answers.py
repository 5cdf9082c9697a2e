"""What a step's tokens mean for one request: its text grows, or it ends, and then its completion is made."""

from __future__ import annotations

import time

from tunesmith.engine.batch import StepResult
from tunesmith.engine.request import Completion, FinishReason, StepOutput, Timings, TokenLogprobs
from tunesmith.engine.scheduler import Scheduled
from tunesmith.engine.sequence import Sequence
from tunesmith.errors import RequestError


def advance(part: Scheduled, result: StepResult, drawn: range, scored: range) -> StepOutput | None:
    """Take over a step's results: those of the rows `drawn`, and the prompt's of `scored`. None without a new token.

    With drafts, the row behind a right guess is right too: tokens are taken up to the first one that was not guessed.
    Raises: RequestError where the logits were not numbers, or the grammar was broken; the request can't go on then.
    """
    sequence = part.sequence
    sequence.prompt_logprobs += [result.scored[row] for row in scored]
    if not part.samples:
        return None
    drafts, sequence.drafts = sequence.drafts, []
    sequence.in_flight -= 1
    new: list[int] = []
    logprobs: list[TokenLogprobs] = []
    piece, reason = "", None
    for index, row in enumerate(drawn):
        token = result.tokens[row]
        if token < 0:
            raise RequestError(
                "the model's logits are not numbers (or nothing may be drawn): its weights are broken, or its dtype "
                "overflows; try dtype='float32', or check the checkpoint with: tunesmith verify"
            )
        new.append(token)
        own = result.logprobs[row] if result.logprobs else None
        if own is not None:
            logprobs.append(own)
        more, reason = _say(sequence, token)
        piece += more
        if reason is not None or index >= len(drafts) or drafts[index] != token:
            break
    # Guesses that were wrong, and the row behind them, are computed again when their place is known.
    sequence.num_computed -= max(0, part.num_drafts - (len(new) - 1))
    sequence.logprobs += logprobs
    if sequence.num_generated == len(new):
        sequence.first_token_s = time.perf_counter()
    given = logprobs if sequence.request.params.logprobs is not None else None
    if reason is None:
        return StepOutput(sequence.request.id, new, piece, None, given)
    piece += sequence.text.finish()
    return StepOutput(sequence.request.id, new, piece, complete(sequence, reason), given)


def _say(sequence: Sequence, token: int) -> tuple[str, FinishReason | None]:
    """The text that a new token adds, and why the answer ends with it, if it does."""
    params = sequence.request.params
    sequence.all_ids.append(token)
    may_stop = sequence.num_generated >= params.min_tokens
    if sequence.grammar is not None and not sequence.grammar.accept(token):
        raise RequestError(f"token {token} was drawn and the answer's grammar does not allow it")
    if token in sequence.stop_ids and may_stop:
        sequence.stop_reason = token if token in params.stop_token_ids else None
        return "", "stop"
    piece = sequence.text.push(token, may_stop=may_stop)
    if sequence.text.stopped:
        sequence.stop_reason = sequence.text.stopped_by
        return piece, "stop"
    if sequence.grammar is not None and sequence.grammar.is_finished:
        return piece, "stop"
    return piece, "length" if sequence.num_generated >= sequence.request.max_tokens else None


def complete(sequence: Sequence, reason: FinishReason, error: str | None = None) -> Completion:
    """The whole answer, as far as it came."""
    request, now = sequence.request, time.perf_counter()
    num_tokens = sequence.num_generated
    first = sequence.first_token_s or now
    timings = Timings(
        queued_s=(sequence.started_s or now) - request.arrived_s,
        ttft_s=first - request.arrived_s,
        total_s=now - request.arrived_s,
        tpot_s=(now - first) / (num_tokens - 1) if num_tokens > 1 else None,
    )
    return Completion(
        text=sequence.text.text,
        token_ids=sequence.token_ids,
        finish_reason=reason,
        prompt_tokens=sequence.num_prompt,
        timings=timings,
        logprobs=None if request.params.logprobs is None else sequence.logprobs,
        prompt_logprobs=None if request.params.prompt_logprobs is None else sequence.prompt_logprobs,
        cached_tokens=sequence.num_cached,
        stop_reason=sequence.stop_reason,
        error=error,
    )
