"""An answer's text as it grows: whole characters only, stop texts found across token borders."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol


class TextDecoder(Protocol):
    """Tokens in, whole characters out (`text.tokenizer.StreamDecoder`)."""

    def put(self, token: int) -> str:
        """The characters that this token completes."""

    def finish(self) -> str:
        """What is left at the end."""


class WholeDecoder:
    """A decoder for answers that nobody reads before their end: one call for all tokens, where one for each is slow.

    decode: token ids to text. context: tokens that the answer goes on from.
    """

    def __init__(self, decode: Callable[[list[int]], str], context: Sequence[int]) -> None:
        self.decode = decode
        self.context = list(context)
        self.ids: list[int] = []

    def put(self, token: int) -> str:
        """Nothing yet."""
        self.ids.append(token)
        return ""

    def finish(self) -> str:
        """All of the text: what streaming's pieces are when joined."""
        before = self.decode(self.context)
        # A character that the context begins and the answer ends is the answer's.
        start = len(before) - before.endswith("\N{REPLACEMENT CHARACTER}")
        text = self.decode(self.context + self.ids)[start:]
        self.context, self.ids = [], []
        return text


class AnswerText:
    """Gathers pieces; holds back what might be the beginning of a stop text."""

    def __init__(self, decoder: TextDecoder | None, stop: Sequence[str]) -> None:
        self.decoder = decoder
        self.stop = tuple(stop)
        self.shown: list[str] = []
        self.held = ""
        self.stopped = False
        self.stopped_by: str | None = None

    @property
    def text(self) -> str:
        """Everything given out so far."""
        return "".join(self.shown)

    def push(self, token_id: int, may_stop: bool = True) -> str:
        """The text that can be shown after this token; sets `stopped` when a stop text is complete.

        may_stop: False for an answer that is too short yet: then a stop text that is complete is text like any other.
        """
        if self.decoder is None or self.stopped:
            return ""
        piece = self.decoder.put(token_id)
        if self.stop:
            return self._show(piece, at_end=False, may_stop=may_stop)
        if piece:
            self.shown.append(piece)
        return piece

    def finish(self) -> str:
        """The rest of the text at the end of the answer."""
        if self.decoder is None or self.stopped:
            return ""
        return self._show(self.decoder.finish(), at_end=True)

    def _show(self, piece: str, at_end: bool, may_stop: bool = True) -> str:
        if not self.stop:
            if piece:
                self.shown.append(piece)
            return piece
        self.held += piece
        found = [(at, text) for text in self.stop if may_stop and (at := self.held.find(text)) >= 0]
        if found:
            self.stopped = True
            cut, self.stopped_by = min(found)
            shown, self.held = self.held[:cut], ""
        elif not may_stop:
            shown, self.held = self.held, ""
        else:
            kept = 0 if at_end else _open_length(self.held, self.stop)
            shown, self.held = self.held[: len(self.held) - kept], self.held[len(self.held) - kept :]
        if shown:
            self.shown.append(shown)
        return shown


def _open_length(text: str, stop: Sequence[str]) -> int:
    """Characters at the end of `text` with which a stop text begins (the longest such end)."""
    longest = 0
    for candidate in stop:
        for length in range(min(len(candidate) - 1, len(text)), longest, -1):
            if text.endswith(candidate[:length]):
                longest = length
                break
    return longest
