"""An answer's text as it grows: whole characters only, stop texts found across token borders."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class TextDecoder(Protocol):
    """Tokens in, whole characters out (`text.tokenizer.StreamDecoder`)."""

    def put(self, token: int) -> str:
        """The characters that this token completes."""

    def finish(self) -> str:
        """What is left at the end."""


class AnswerText:
    """Gathers pieces; holds back what might be the beginning of a stop text."""

    def __init__(self, decoder: TextDecoder | None, stop: Sequence[str]) -> None:
        self.decoder = decoder
        self.stop = tuple(stop)
        self.shown: list[str] = []
        self.held = ""
        self.stopped = False

    @property
    def text(self) -> str:
        """Everything given out so far."""
        return "".join(self.shown)

    def push(self, token_id: int) -> str:
        """The text that can be shown after this token; sets `stopped` when a stop text is complete."""
        if self.decoder is None or self.stopped:
            return ""
        return self._show(self.decoder.put(token_id), at_end=False)

    def finish(self) -> str:
        """The rest of the text at the end of the answer."""
        if self.decoder is None or self.stopped:
            return ""
        return self._show(self.decoder.finish(), at_end=True)

    def _show(self, piece: str, at_end: bool) -> str:
        self.held += piece
        cut = min((at for at in map(self.held.find, self.stop) if at >= 0), default=-1)
        if cut >= 0:
            self.stopped = True
            shown, self.held = self.held[:cut], ""
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
