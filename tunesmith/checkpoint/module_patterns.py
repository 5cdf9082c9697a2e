"""The regular expressions in adapter_config.json that choose modules, matched as PEFT does, but never for long.

A backtracking matcher can take for ever over a few characters. How many ways a pattern can be tried is bounded before
it is used: every repetition multiplies them by the length of a name, every group by its alternatives.
"""

from __future__ import annotations

import re
from functools import lru_cache

from tunesmith.errors import AdapterError

MOST_WAYS = 1_000_000
_NAME_LENGTH = 64
_TOKEN = re.compile(
    r"""\\.                                     # an escape
    | \[\^?\]?(?:\\.|[^\]\\])*+\]               # a class of characters
    | \((?:\?(?:P?<\w+>|P=|<?[=!]|[\w-]*:?))?     # the start of a group, with what it is
    | .""",
    re.VERBOSE | re.DOTALL,
)


def matches_end(pattern: str, module: str) -> bool:
    """Whether the pattern matches the module's name, or all of it after a dot.

    Raises: AdapterError for a pattern that is no regular expression, or that could take for ever.
    """
    return _compiled(pattern).match(module) is not None


@lru_cache(maxsize=4096)
def _compiled(pattern: str) -> re.Pattern[str]:
    if ways_to_match(pattern) > MOST_WAYS:
        raise AdapterError(
            f"adapter_config.json: the pattern {_short(pattern)} could take for ever to match: repeat no group, "
            f"and no more than three single characters"
        )
    try:
        return re.compile(rf"(.*\.)?({pattern})$")
    except (re.error, RecursionError, OverflowError) as error:
        raise AdapterError(
            f"adapter_config.json: the pattern {_short(pattern)} is no regular expression: {error}"
        ) from None


def ways_to_match(pattern: str) -> float:
    """An upper bound for the ways in which a pattern can be tried on a name; infinite where that is not told."""
    ways, alternatives, before = 1.0, [1], ""
    for token in _TOKEN.findall(pattern):
        if token.startswith("(?") and "<" not in token and "x" in token:
            return float("inf")  # blanks that mean nothing would hide what is repeated
        if token.startswith("("):
            alternatives.append(1)
        elif token == "|":
            alternatives[-1] += 1
        elif token == ")" and len(alternatives) > 1:
            ways *= alternatives.pop()
        elif token in "*+{" and before == ")":
            return float("inf")
        elif token in "*+{?":
            ways *= 2 if token == "?" else _NAME_LENGTH
        before = token
    return ways * alternatives[0]


def _short(pattern: str) -> str:
    return repr(pattern if len(pattern) <= 80 else pattern[:77] + "...")
