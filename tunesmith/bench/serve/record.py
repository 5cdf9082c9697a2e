"""What one request saw, in seconds from the start of its point."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

ERROR_CHARACTERS = 300


def in_words(status: int, text: str) -> str:
    """An answer's error without its JSON: "400: the prompt is too long"."""
    try:
        said = json.loads(text)
    except ValueError:
        said = None
    for key in ("error", "message", "detail"):
        if isinstance(said, dict) and said.get(key):
            said = said[key]
    words = said if isinstance(said, str) else text
    return f"{status}: {' '.join(words.split())}"[:ERROR_CHARACTERS]


@dataclass
class Record:
    """A request from its sender's side.

    intended_s      when it should have been sent: latencies count from here, also when the client was late
    sent_s          when the client began to send it
    contents_s      when each chunk with content arrived (text, reasoning or a tool call; a role alone is none)
    ended_s         when the stream was over, or had failed
    output_tokens   by the server's usage; where it says none, the chunks with content, and `is_counted` is False
    status          HTTP's; None where there was no answer
    error           what went wrong, in words; None where nothing did
    """

    index: int
    intended_s: float
    sent_s: float
    contents_s: list[float] = field(default_factory=list)
    ended_s: float = 0.0
    prompt_tokens: int | None = None
    output_tokens: int = 0
    cached_tokens: int | None = None
    is_counted: bool = True
    finish_reason: str | None = None
    status: int | None = None
    error: str | None = None

    @property
    def is_ok(self) -> bool:
        """Answered to the end, with content."""
        return self.error is None

    @property
    def ttft_s(self) -> float | None:
        """From when it should have been sent to the first content."""
        return self.contents_s[0] - self.intended_s if self.contents_s else None

    @property
    def e2e_s(self) -> float:
        """From when it should have been sent to the end of the stream."""
        return self.ended_s - self.intended_s

    @property
    def tpot_s(self) -> float | None:
        """From the first content to the last, by the tokens after the first; None for one token, or one arrival."""
        if len(self.contents_s) < 2 or self.output_tokens < 2 or self.is_whole:
            return None
        return (self.contents_s[-1] - self.contents_s[0]) / (self.output_tokens - 1)

    @property
    def is_whole(self) -> bool:
        """Whether all of several chunks were read at the same moment: no time lies between them, and none is known."""
        return len(self.contents_s) > 1 and self.contents_s[-1] == self.contents_s[0]

    @property
    def itl_s(self) -> list[float]:
        """The waits between one content chunk and the next, whatever number of tokens a chunk holds."""
        return [after - before for before, after in zip(self.contents_s, self.contents_s[1:], strict=False)]

    def plain(self) -> dict[str, Any]:
        """The record as plain data."""
        return asdict(self)
