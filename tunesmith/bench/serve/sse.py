"""Server-sent events, as OpenAI's servers send them: `data: {...}` lines, blank lines between, `data: [DONE]` last.

Source: the HTML standard, section 9.2, "Server-sent events" (comments and other fields are skipped).
"""

from __future__ import annotations

from collections.abc import Iterator

DONE = b"[DONE]"


class EventReader:
    """Bytes in, whatever way they were cut; the payload of every complete `data:` line out.

    OpenAI's servers put one JSON object on one line, so that a line is an event and nothing waits for the blank one.
    """

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> Iterator[bytes]:
        """The payloads that are complete with `data`."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield line[5:].strip()

    @property
    def rest(self) -> bytes:
        """What came after the last end of line."""
        return self._rest
