"""Speculation: the next tokens of a request are guessed, and one step says how many of the guesses are right.

    known   a b c d        guessed   e f g
    step    d e f g   ->   drawn     e f h i      e and f were right: the answer goes on with e f h

The step draws a token behind every guess just as it would without guesses: the noise of a draw is a function of the
request's seed and the token's position alone. Guesses are kept as far as they are what was drawn, so the answer is the
one without speculation, greedy or sampled, as far as the logits of a step do not depend on how many tokens it has.
That is rejection sampling: a single guess is right with the probability that the model gives it, and what is drawn
instead is distributed as the rest. Draws with penalties or a grammar depend on the tokens before them: a row behind a
guess counts it as seen, and its grammar goes on by it (`guesses.py`), for the row is used only if the guess was right.

n-gram lookup guesses that what followed the last few tokens before follows them again. Sources: arXiv 2211.17192,
section 2.3 (rejection sampling); arXiv 2304.04487, section 3 (guesses copied from the text itself).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args

from tunesmith.engine.interfaces import Drafted
from tunesmith.errors import RequestError, nearest

Method = Literal["ngram", "draft"]
_MOST_TOKENS = 16


@dataclass(frozen=True)
class Speculation:
    """How tokens are guessed.

    method: "ngram" looks up what followed the same tokens before; "draft" asks a smaller model.
    num_tokens: guesses of a step at most; a request whose guesses are wrong gets fewer for a while.
    min_ngram, max_ngram: how many of the last tokens must have come before, the longest first.
    model: the smaller model, of the same vocabulary. dtype, quantize: how it is held; None: as the large one.
    """

    method: Method
    num_tokens: int = 4
    min_ngram: int = 2
    max_ngram: int = 4
    model: str | Path | None = None
    dtype: str | None = None
    quantize: str | None = None

    def __post_init__(self) -> None:
        rules = (
            ("method", self.method in get_args(Method), f"one of {', '.join(get_args(Method))}"),
            ("num_tokens", 1 <= self.num_tokens <= _MOST_TOKENS, f"between 1 and {_MOST_TOKENS}"),
            ("min_ngram", 1 <= self.min_ngram <= self.max_ngram, "between 1 and max_ngram"),
            ("model", (self.model is not None) == (self.method == "draft"), "given with method 'draft', and only then"),
        )
        for name, ok, allowed in rules:
            if not ok:
                raise RequestError(f"speculative.{name} must be {allowed}, got {getattr(self, name)!r}")

    @classmethod
    def of(cls, given: Mapping[str, Any] | Speculation | None) -> Speculation | None:
        """From a mapping like {"method": "ngram", "num_tokens": 4}. Raises: RequestError for what it does not know."""
        if given is None or isinstance(given, Speculation):
            return given
        known = [entry.name for entry in fields(cls)]
        for name in given:
            if name not in known:
                raise RequestError(f"speculative has no {name!r}{nearest(name, known)} (it takes {', '.join(known)})")
        if "method" not in given:
            raise RequestError(f"speculative needs a method: one of {', '.join(get_args(Method))}")
        return cls(**given)


@dataclass
class Pace:
    """How many tokens to guess next, by how the last guesses went: half as many after a miss, twice after a hit."""

    most: int
    now: int = field(init=False)
    _guessed: list[int] = field(default_factory=list)
    _length: int = 0

    def __post_init__(self) -> None:
        self.now = self.most

    def look(self, all_ids: Sequence[int]) -> int:
        """Compare what was guessed last with what came; the number of tokens to guess now."""
        if self._guessed:
            came = all_ids[self._length : self._length + len(self._guessed)]
            right = sum(1 for _ in _common(self._guessed, came))
            if right == len(self._guessed):
                self.now = min(self.most, 2 * self.now)
            elif not right:
                self.now = max(1, self.now // 2)
        self._guessed = []
        return self.now

    def note(self, all_ids: Sequence[int], guessed: Sequence[int]) -> None:
        """These are guessed to follow."""
        self._guessed, self._length = list(guessed), len(all_ids)


def _common(left: Sequence[int], right: Sequence[int]) -> Sequence[int]:
    """What both begin with."""
    for index, (one, other) in enumerate(zip(left, right, strict=False)):
        if one != other:
            return left[:index]
    return left[: len(right)]


class _Grams:
    """Where every short run of one request's tokens ended last."""

    def __init__(self, shortest: int, longest: int) -> None:
        self.sizes = range(longest, shortest - 1, -1)
        self.ends: dict[int, int] = {}
        self.num_seen = 0

    def follow(self, ids: Sequence[int], count: int) -> list[int]:
        """What followed the longest known run of last tokens, so many tokens; it may run into itself."""
        self._add(ids)
        for size in self.sizes:
            if size >= len(ids):
                continue
            last = tuple(ids[-size:])
            end = self.ends.get(hash(last))
            if end is not None and tuple(ids[end - size : end]) == last:
                return _continued(ids, end, count)
        return []

    def _add(self, ids: Sequence[int]) -> None:
        """Note the runs that something follows."""
        for end in range(self.num_seen + 1, len(ids)):
            for size in self.sizes:
                if size <= end:
                    self.ends[hash(tuple(ids[end - size : end]))] = end
        self.num_seen = max(self.num_seen, len(ids) - 1)


def _continued(ids: Sequence[int], start: int, count: int) -> list[int]:
    """ids[start : start + count], going on into what was copied where the tokens end."""
    out: list[int] = []
    for place in range(start, start + count):
        out.append(ids[place] if place < len(ids) else out[place - len(ids)])
    return out


class NgramDrafter:
    """Guesses by lookup in the request's own tokens, prompt and answer."""

    def __init__(self, max_drafts: int = 4, min_ngram: int = 2, max_ngram: int = 4) -> None:
        self.max_drafts = max_drafts
        self.min_ngram, self.max_ngram = min_ngram, max_ngram
        self._known: dict[int, tuple[_Grams, Pace]] = {}

    def propose(self, sequences: Sequence[Drafted]) -> list[list[int]]:
        """For each sequence at most `max_drafts` tokens that may follow its `all_ids`; [] for no guess."""
        return [self._propose(sequence) for sequence in sequences]

    def _propose(self, sequence: Drafted) -> list[int]:
        known = self._known.get(sequence.request_id)
        if known is None:
            known = _Grams(self.min_ngram, self.max_ngram), Pace(self.max_drafts)
            self._known[sequence.request_id] = known
        grams, pace = known
        guessed = grams.follow(sequence.all_ids, pace.look(sequence.all_ids))
        pace.note(sequence.all_ids, guessed)
        return guessed

    def forget(self, request_id: int) -> None:
        """The sequence has ended."""
        self._known.pop(request_id, None)
