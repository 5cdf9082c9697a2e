"""A workload that a server can answer: lengths inside its context, token ids inside its vocabulary.

What was typed is kept; only defaults shrink, and a note says what became of them.
"""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from dataclasses import replace

from tunesmith.bench.serve.record import in_words
from tunesmith.bench.serve.target import Target
from tunesmith.bench.serve.workload import Workload, make_requests
from tunesmith.errors import TunesmithError

SMALLER_IDS = (4096, 1000, 256)
"""What is tried below the ids of the workload where a server refuses those: numbers of ids."""
REFUSALS = (400, 404, 422)


def fit(workload: Workload, target: Target, api_key: str | None, timeout_s: float) -> tuple[Workload, tuple[str, ...]]:
    """The workload for this server, and what was changed for it: a sentence each.

    Raises: TunesmithError where the server takes no token ids.
    """
    limits = [limit for limit in (workload.max_model_len, target.max_model_len) if limit is not None]
    fitted, length_note = fit_lengths(replace(workload, max_model_len=min(limits, default=None)))
    if fitted.num_ids is None and target.num_ids is not None:
        fitted = replace(fitted, num_ids=target.num_ids)
    ids_note = None
    if fitted.num_ids is None:
        fitted, ids_note = _ask_for_ids(fitted, target, api_key, timeout_s)
    return fitted, tuple(note for note in (length_note, ids_note) if note is not None)


def fit_lengths(workload: Workload) -> tuple[Workload, str | None]:
    """Default lengths that prompt and answer together stay inside max_model_len; None where nothing had to change."""
    limit = workload.max_model_len
    if workload.kind != "synthetic" or limit is None or limit < 2:
        return workload, None
    prompt, output = workload.prompts, workload.outputs
    if prompt[1] + output[1] <= limit:
        return workload, None
    # Half of the context each, unless one of the two was typed: then the other gets what is left.
    most_prompt = limit // 2 if workload.output_tokens is None else limit - workload.output_tokens[1]
    if workload.prompt_tokens is None and most_prompt > 0:
        prompt = _below(prompt, most_prompt)
    if workload.output_tokens is None and prompt[1] < limit:
        output = _below(output, limit - prompt[1])
    if (prompt, output) == (workload.prompts, workload.outputs):
        return workload, None
    note = f"lengths were shrunk to the {limit} tokens of context: {_span(prompt)} tokens in, {_span(output)} out"
    return replace(workload, prompt_tokens=prompt, output_tokens=output), note


def _below(span: tuple[int, int], most: int) -> tuple[int, int]:
    high = min(span[1], most)
    return min(span[0], max(1, high // 8)) if high < span[1] else span[0], high


def _span(span: tuple[int, int]) -> str:
    return str(span[0]) if span[0] == span[1] else f"{span[0]}..{span[1]}"


def _ask_for_ids(
    workload: Workload, target: Target, api_key: str | None, timeout_s: float
) -> tuple[Workload, str | None]:
    """Ask for one token after the workload's highest id, then after lower ones, until one is taken."""
    prompts = [item.prompt for item in make_requests(workload).items if not isinstance(item.prompt, str)]
    if not prompts:
        return workload, None
    highest = max(max(prompt, default=0) for prompt in prompts)
    why = _refusal(target, highest, api_key, timeout_s)
    if why is None:
        return workload, None
    for num_ids in SMALLER_IDS:
        if num_ids <= highest and _refusal(target, num_ids - 1, api_key, timeout_s) is None:
            note = f"the server refuses token id {highest}: ids below {num_ids} are sent (--num-ids says otherwise)"
            return replace(workload, num_ids=num_ids), note
    raise TunesmithError(
        f"the server refuses prompts of token ids: {why}; if its vocabulary is small, say --num-ids N; "
        "a server that takes only text is measured with --workload gsm8k --data FILE"
    )


def _refusal(target: Target, token: int, api_key: str | None, timeout_s: float) -> str | None:
    """Why a prompt of this one id is refused; None where it is not, or where the server fails in another way."""
    body = json.dumps({"model": target.model, "prompt": [token], "max_tokens": 1}).encode()
    headers = {"Content-Type": "application/json"} | ({} if api_key is None else {"Authorization": f"Bearer {api_key}"})
    request = urllib.request.Request(f"{target.url}/v1/completions", body, headers)
    try:
        with urllib.request.urlopen(request, timeout=timeout_s) as answer:
            answer.read()
    except urllib.error.HTTPError as error:
        with error:
            said = in_words(error.code, error.read().decode(errors="replace"))
        return said if error.code in REFUSALS else None
    except OSError:
        return None
    return None
