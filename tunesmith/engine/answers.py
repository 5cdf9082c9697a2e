"""What a step's tokens mean for one request: its text grows, or it ends, and then its completion is made."""

from __future__ import annotations

import logging
import time

from tunesmith.engine.batch import StepResult
from tunesmith.engine.request import Completion, FinishReason, StepOutput, Timings, TokenLogprobs
from tunesmith.engine.scheduler import Scheduled
from tunesmith.engine.sequence import Sequence
from tunesmith.errors import RequestError

log = logging.getLogger(__name__)


def advance(part: Scheduled, result: StepResult, row: int, scored: int) -> StepOutput | None:
    """Take over a step's results: those of the drawn rows from `row` on, and of the prompt's from `scored` on.

    None without a new token. With drafts, the row behind a right guess is right too: tokens are taken up to the first
    one that was not guessed. Written for hundreds a step: the usual case is one token, and nothing else asked for.
    Raises: RequestError where the logits were not numbers, or the grammar was broken; the request can't go on then.
    """
    sequence = part.sequence
    if part.num_scored:
        # A step gives every scored row as many as any of its requests asks for.
        most = sequence.request.params.prompt_logprobs or 0
        found = result.scored[scored : scored + part.num_scored]
        sequence.prompt_logprobs += [TokenLogprobs(one.token_id, one.logprob, one.top[:most]) for one in found]
    if not part.samples:
        return None
    sequence.in_flight -= 1
    if part.num_drafts:
        new, piece, reason = _verify(part, result, row)
    else:
        token = result.tokens[row]
        piece, reason = _say(sequence, token)
        new = [token]
    given = None
    if not sequence.is_plain and sequence.request.params.logprobs is not None:
        given = [own for own in result.logprobs[row : row + len(new)] if own is not None]
        sequence.logprobs += given
    if not sequence.first_token_s:
        sequence.first_token_s = time.perf_counter()
    if reason is None:
        return StepOutput(sequence.request_id, new, piece, None, given)
    piece += sequence.text.finish()
    return StepOutput(sequence.request_id, new, piece, complete(sequence, reason), given)


def _verify(part: Scheduled, result: StepResult, row: int) -> tuple[list[int], str, FinishReason | None]:
    """The drawn tokens up to the first that was not guessed, their text, and why the answer ends, if it does."""
    sequence = part.sequence
    drafts, sequence.drafts = sequence.drafts, []
    new: list[int] = []
    text = ""
    for token, guess in zip(result.tokens[row : row + part.num_rows], [*drafts, None], strict=True):
        piece, reason = _say(sequence, token)
        new.append(token)
        text += piece
        if reason is not None or guess != token:
            break
    # Guesses that were wrong, and the row behind them, are computed again when their place is known.
    sequence.num_computed -= part.num_drafts - (len(new) - 1)
    return new, text, reason


def _say(sequence: Sequence, token: int) -> tuple[str, FinishReason | None]:
    """The text that a new token adds, and why the answer ends with it, if it does."""
    if token < 0:
        raise RequestError(
            "the model's logits are not numbers (or nothing may be drawn): its weights are broken, or its dtype "
            "overflows; try dtype='float32', or check the checkpoint with: tunesmith verify"
        )
    ids = sequence.all_ids
    ids.append(token)
    num_known = len(ids)
    may_stop = num_known >= sequence.may_stop_at
    if sequence.grammar is not None and not sequence.grammar.accept(token):
        raise RequestError(f"token {token} was drawn and the answer's grammar does not allow it")
    if token in sequence.stop_ids and may_stop:
        sequence.stop_reason = token if token in sequence.request.params.stop_token_ids else None
        return "", "stop"
    piece = sequence.text.push(token, may_stop)
    if not sequence.is_plain:
        if sequence.text.stopped:
            sequence.stop_reason = sequence.text.stopped_by
            return piece, "stop"
        if sequence.grammar is not None and sequence.grammar.is_finished:
            return piece, "stop"
    return piece, "length" if num_known >= sequence.limit else None


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


def rest(sequence: Sequence) -> str:
    """The rest of an answer's text that ends early; what can't be told any more is left out."""
    try:
        return sequence.text.finish()
    except Exception:
        log.warning("the rest of an answer has no text", exc_info=True)
        return ""
