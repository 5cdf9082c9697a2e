"""What all answers have: gathered deltas, log-probabilities in each interface's form, the end's words."""

from __future__ import annotations

from codecs import getincrementaldecoder
from collections.abc import Sequence
from typing import Any

from tunesmith.serve.client import Job
from tunesmith.serve.messages import Delta, End, Logprob
from tunesmith.serve.state import Server
from tunesmith.serve.token_text import TokenTexts

# JSON has no infinity; this is what other servers write for it.
LOWEST_LOGPROB = -9999.0


async def collect(server: Server, jobs: Sequence[Job], deadline_s: float) -> list[Delta]:
    """The whole answers. Raises: ApiError when the engine fails one of them."""
    whole = [Delta() for _ in jobs]
    with server.engine.generate(jobs, deadline_s) as generation:
        while new := await generation.take():
            for index, delta in new.items():
                whole[index].add(delta)
    return whole


def end_of(delta: Delta) -> End:
    """How a whole answer ended."""
    assert delta.end is not None
    return delta.end


def shown_text(delta: Delta, includes_stop: bool | None) -> str:
    """The new text; at the end with the stop text, where that was asked for."""
    if includes_stop and delta.end is not None and isinstance(delta.end.stop_reason, str):
        return delta.text + delta.end.stop_reason
    return delta.text


def finite(logprob: float) -> float:
    """A log-probability that JSON can carry."""
    return logprob if logprob > LOWEST_LOGPROB else LOWEST_LOGPROB


class TextOffsets:
    """Where tokens begin in an answer's text, in characters. The parts of one character begin where it does.

    Args:
        start: characters of the text before the first token.
        hides_special: control tokens are not in the text.
        drops_blank: the first token's leading blank isn't, either (SentencePiece writes one before a text).
    """

    def __init__(self, texts: TokenTexts, *, start: int = 0, hides_special: bool, drops_blank: bool = False) -> None:
        self.texts, self.hides_special, self.drops_blank = texts, hides_special, drops_blank
        self.at = start
        self._decoder = getincrementaldecoder("utf-8")("replace")

    def add(self, ids: Sequence[int]) -> list[int]:
        """The places of the next tokens."""
        places = []
        for token in ids:
            places.append(self.at)
            if self.hides_special and self.texts.tokenizer.is_special(token):
                continue
            text = self._decoder.decode(self.texts.token_bytes(token))
            self.at += len(text) - (self.drops_blank and text.startswith(" "))
            self.drops_blank = False
        return places


class TokenNames:
    """How tokens are written beside their log-probabilities: as text, or as token_id:N."""

    def __init__(self, texts: TokenTexts, as_ids: bool | None) -> None:
        self.texts = texts
        self.as_ids = bool(as_ids)

    def name(self, token: int) -> str:
        """The token."""
        return f"token_id:{token}" if self.as_ids else self.texts.text(token)

    def chat(self, logprobs: list[Logprob] | None) -> dict[str, Any] | None:
        """The chat interface's form."""
        return None if logprobs is None else {"content": self.content(logprobs), "refusal": None}

    def content(self, logprobs: list[Logprob]) -> list[dict[str, Any]]:
        """A list of tokens, each with the most likely ones at its place."""
        return [
            {**self._entry(token, logprob), "top_logprobs": [self._entry(*other) for other in top]}
            for token, logprob, top in logprobs
        ]

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        return {"token": self.name(token), "logprob": finite(logprob), "bytes": list(self.texts.token_bytes(token))}

    def completion(
        self, logprobs: Sequence[Logprob | None], ids: Sequence[int], offsets: TextOffsets
    ) -> dict[str, Any]:
        """The completions interface's form: parallel lists; the first token of a prompt has no log-probability."""
        return {
            "tokens": [self.name(token) for token in ids],
            "token_logprobs": [None if entry is None else finite(entry[1]) for entry in logprobs],
            "top_logprobs": [None if entry is None else self._top(entry) for entry in logprobs],
            "text_offset": offsets.add(ids),
        }

    def _top(self, entry: Logprob) -> dict[str, float]:
        """The most likely tokens and the one that is there; of two with the same text the likelier stays."""
        found: dict[str, float] = {}
        for token, logprob in [*entry[2], entry[:2]]:
            found.setdefault(self.name(token), finite(logprob))
        return found

    def prompt(self, logprobs: list[Logprob | None] | None) -> list[dict[str, Any] | None] | None:
        """vLLM's `prompt_logprobs`: for each token a mapping from ids."""
        if logprobs is None:
            return None
        return [None if entry is None else self._by_id(entry) for entry in logprobs]

    def _by_id(self, entry: Logprob) -> dict[str, Any]:
        token, logprob, top = entry
        ranked: dict[int, tuple[float, int | None]] = {
            other: (value, rank) for rank, (other, value) in enumerate(top, start=1)
        }
        ranked.setdefault(token, (logprob, None))
        return {
            str(other): {"logprob": finite(value), "rank": rank, "decoded_token": self.texts.text(other)}
            for other, (value, rank) in ranked.items()
        }
