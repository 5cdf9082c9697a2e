"""What callers of `LLM` hand over, brought into one form: prompts, and parameters for each of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

from tunesmith.engine.request import Completion, SamplingParams
from tunesmith.errors import RequestError
from tunesmith.text.tokenizer import Tokenizer

Prompt = str | Sequence[int]
Params = SamplingParams | Sequence[SamplingParams] | None


def encode_text(tokenizer: Tokenizer, text: str) -> list[int]:
    """A raw prompt: special tokens may be written out, and the beginning-of-text token is added once."""
    ids = tokenizer.encode(text, parse_special=True, add_special=True)
    twice = tokenizer.bos_id is not None and ids[:2] == [tokenizer.bos_id] * 2
    return ids[1:] if twice else ids


def params_of(params: SamplingParams | None, options: Mapping[str, Any]) -> SamplingParams:
    """The parameters with these fields changed. Raises RequestError for one that there is not."""
    known = SamplingParams.__dataclass_fields__
    for name in options:
        if name not in known:
            raise RequestError(f"{name!r} is not a sampling option; there are: {', '.join(known)}")
    return replace(params or SamplingParams(), **options)


def checked(completions: list[Completion]) -> list[Completion]:
    """Raises RequestError for the first answer that could not go on."""
    for completion in completions:
        if completion.error is not None:
            raise RequestError(completion.error)
    return completions


def params_of_each(params: Params, options: Mapping[str, Any], num_prompts: int) -> list[SamplingParams]:
    """Every prompt's own parameters."""
    if params is None or isinstance(params, SamplingParams):
        return [params_of(params, options)] * num_prompts
    if len(params) != num_prompts:
        raise RequestError(
            f"give one SamplingParams for all prompts or one for each: got {len(params)}, {num_prompts} prompts"
        )
    return [params_of(own, options) for own in params]


def as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt or several, as several."""
    if isinstance(prompts, str):
        return [prompts]
    if prompts and all(isinstance(item, int) for item in prompts):
        return [cast("Sequence[int]", prompts)]
    return list(cast("Sequence[Prompt]", prompts))
