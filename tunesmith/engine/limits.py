"""What a request may ask of an engine: checked before it is queued, so that what runs can always end."""

from __future__ import annotations

from tunesmith.engine.pages import PAGE_SLOTS
from tunesmith.engine.request import DEFAULT_MAX_TOKENS, SamplingParams
from tunesmith.errors import RequestError


def answer_limit(num_prompt: int, params: SamplingParams, max_model_len: int, num_pages: int) -> int:
    """The answer's tokens at most: what was asked for, or what there is room for in the context and in the cache.

    Raises: RequestError where it doesn't fit.
    """
    limit = min(max_model_len, num_pages * PAGE_SLOTS)
    holds = f"the context holds {limit}" if limit == max_model_len else f"the cache holds {limit} tokens"
    room = limit - num_prompt
    if room < 1:
        raise RequestError(
            f"the prompt has {num_prompt} tokens and {holds}, so there is no room for an answer: "
            f"shorten the prompt to at most {limit - 1} tokens"
        )
    if params.max_tokens is None:
        return min(DEFAULT_MAX_TOKENS, room)
    if params.max_tokens <= room:
        return params.max_tokens
    asked = f"{num_prompt} prompt tokens + max_tokens {params.max_tokens}"
    exceeded = f"exceed the context of {limit} tokens" if limit == max_model_len else f"are too many: {holds}"
    raise RequestError(f"{asked} {exceeded}: ask for max_tokens of at most {room}, or shorten the prompt")
