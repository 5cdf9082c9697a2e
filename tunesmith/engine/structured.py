"""Structured output: what an answer must look like, and the protocol by which the engine holds it to that.

    StructuredSpec --check_spec--> GrammarCompiler (threads) --> MatcherGrammar --state()--> MatcherState
    before each token: state.mask_into(row)    after it: state.accept(token)    speculation: state.rollback(n)

A row is int32, bit `t % 32` of word `t // 32` says whether token t may come next. Stop tokens are allowed only where
the grammar may end; where nothing else may follow, `is_finished` is true and the answer can end without one.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from typing import Any

import numpy as np

from tunesmith.engine.grammar_library import MAX_SPEC_BYTES
from tunesmith.engine.interfaces import RollingState
from tunesmith.engine.request import StructuredSpec
from tunesmith.errors import RequestError

_log = logging.getLogger(__name__)
WORD_BITS = 32
MAX_CHOICES = 4096
# llguidance's own readers refuse deeper ones too; here it is refused before any of them sees it.
MAX_DEPTH = 60


def mask_words(vocab_size: int) -> int:
    """int32 words of a row over `vocab_size` tokens."""
    return -(-vocab_size // WORD_BITS)


def draft_masks(state: RollingState, draft: Sequence[int], rows_DW: np.ndarray) -> int:
    """Rows for a draft: row i says what may follow its first i tokens. The state is left as it was.

    Args: `rows_DW`: at least len(draft) + 1 rows.
    Returns: how many draft tokens the grammar allows; that many rows + 1 are written.
    Raises: RequestError where the first row can't be written. Behind a guess a row that can't is left as it is: the
    guess may be wrong; where it is right, the next step fails as this one would have.
    """
    accepted = 0
    state.mask_into(rows_DW[0])
    try:
        for token in draft:
            if not state.accept(token):
                break
            accepted += 1
            state.mask_into(rows_DW[accepted])
    except RequestError:
        _log.debug("a grammar can't follow a guess", exc_info=True)
    finally:
        state.rollback(accepted)
    return accepted


def check_spec(spec: StructuredSpec, *, max_bytes: int = MAX_SPEC_BYTES) -> None:
    """Refuse what is malformed or too large, in microseconds and without the grammar library.

    Raises: RequestError naming the kind and the limit.
    """
    text = "".join(spec.value) if spec.kind == "choice" else spec.value
    if spec.kind == "choice":
        _check_choices(spec.value)
    elif not isinstance(text, str):
        raise RequestError(f"a structured output of kind {spec.kind} takes a text, got {type(text).__name__}")
    num_bytes = len(str(text).encode("utf-8", errors="replace"))
    if num_bytes > max_bytes:
        raise RequestError(
            f"the {_NAMES[spec.kind]} of the structured output has {num_bytes} bytes; at most {max_bytes} are allowed"
        )
    if spec.kind == "json_schema":
        _check_schema(str(text))
    elif spec.kind in ("regex", "grammar") and not text:
        raise RequestError(f"the {_NAMES[spec.kind]} of the structured output is empty")


_NAMES = {
    "json_schema": "JSON schema",
    "json_object": "JSON object",
    "regex": "regular expression",
    "choice": "list of choices",
    "grammar": "grammar",
}


def _check_choices(choices: object) -> None:
    if not isinstance(choices, tuple) or not choices or not all(isinstance(c, str) and c for c in choices):
        raise RequestError(f"choices must be one or more texts that are not empty, got {choices!r:.100}")
    if len(choices) > MAX_CHOICES:
        raise RequestError(f"{len(choices)} choices were given; at most {MAX_CHOICES} are allowed")


def _check_schema(text: str) -> None:
    try:
        schema = json.loads(text)
    except RecursionError:
        raise RequestError(_too_deep()) from None
    except ValueError as error:
        raise RequestError(f"the JSON schema is no JSON: {error}") from None
    if not isinstance(schema, dict | bool):
        raise RequestError(f"a JSON schema is an object, got {type(schema).__name__}")
    if _depth(schema) > MAX_DEPTH:
        raise RequestError(_too_deep())


def _too_deep() -> str:
    return f"the JSON schema is nested deeper than {MAX_DEPTH} levels"


def _depth(value: Any) -> int:
    """Levels of nesting, without recursion: the value may be hostile."""
    level, depth = [value], 0
    while level:
        depth += 1
        level = [
            child
            for item in level
            if isinstance(item, dict | list)
            for child in (item.values() if isinstance(item, dict) else item)
        ]
    return depth
