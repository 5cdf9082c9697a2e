"""What the HTTP process and the engine process say to each other: plain data, packed with msgpack, never pickled.

A frame is four bytes of length (big-endian) and a msgpack array [kind, values of the dataclass's fields in order].
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import astuple, dataclass, field, fields
from typing import Any

import msgpack  # type: ignore[import-untyped]

HEADER = struct.Struct(">I")
MAX_FRAME_BYTES = 2**30


@dataclass(frozen=True)
class Start:
    """The first message: what to load, and how (`options.EngineOptions` as a mapping)."""

    options: dict[str, Any]


@dataclass(frozen=True)
class Submit:
    """A request. `params` are the fields of SamplingParams that differ from their defaults.

    stream: outputs are wanted as they come; else all at the end.
    continues: the answer's text goes on from the prompt's (no chat).
    """

    id: int
    prompt_ids: list[int]
    params: dict[str, Any]
    stream: bool = True
    continues: bool = False
    priority: int = 0
    adapter: str | None = None
    cache_salt: str = ""


@dataclass(frozen=True)
class Abort:
    """End a request, if it is still there."""

    id: int


@dataclass(frozen=True)
class Embed:
    """Pool the hidden states of these token ids (`pooling`: "mean" or "last")."""

    id: int
    inputs: list[list[int]]
    pooling: str


@dataclass(frozen=True)
class LoadAdapter:
    """Load a LoRA adapter's directory under a name. `follow`: a run's newer checkpoints take its place as they come."""

    id: int
    name: str
    path: str
    follow: bool = False


@dataclass(frozen=True)
class UnloadAdapter:
    """Drop a loaded adapter."""

    id: int
    name: str


@dataclass(frozen=True)
class AskStats:
    """Ask for `Stats` at once (debugging)."""


@dataclass(frozen=True)
class Shutdown:
    """End the engine process."""


@dataclass(frozen=True)
class Source:
    """What the model's name stands for, known before it is loaded: its tokenizer's place, its template's switches."""

    facts: dict[str, Any]


@dataclass(frozen=True)
class Ready:
    """The model is loaded; its limits and how it is held."""

    facts: dict[str, Any]


@dataclass(frozen=True)
class Failed:
    """The model can't be loaded. `is_user_error`: by a mistake that trying again won't mend."""

    message: str
    is_user_error: bool


@dataclass(frozen=True)
class Outputs:
    """What steps brought: rows of [id, token_ids, text, logprobs or None, end or None] (see `Delta`)."""

    rows: list[list[Any]]


@dataclass(frozen=True)
class Rejected:
    """A request that the engine refuses (`is_user_error`) or that failed inside it."""

    id: int
    message: str
    is_user_error: bool


@dataclass(frozen=True)
class Embedded:
    """The vectors of an `Embed`, float32 little-endian."""

    id: int
    vectors: list[bytes]


@dataclass(frozen=True)
class Done:
    """An order was carried out (LoadAdapter, UnloadAdapter)."""

    id: int


@dataclass(frozen=True)
class Stats:
    """The heartbeat of the engine's loop: EngineStats as a mapping, and how many requests are known."""

    stats: dict[str, Any]


_KINDS: tuple[type, ...] = (
    Start, Submit, Abort, Embed, LoadAdapter, UnloadAdapter, AskStats, Shutdown,
    Source, Ready, Failed, Outputs, Rejected, Embedded, Done, Stats,
)  # fmt: skip
_BY_NAME = {kind.__name__: kind for kind in _KINDS}
_FIELDS = {kind: tuple(f.name for f in fields(kind)) for kind in _KINDS}
Message = Any


def pack(message: Message) -> bytes:
    """One frame."""
    values = [getattr(message, name) for name in _FIELDS[type(message)]]
    body = msgpack.packb([type(message).__name__, *values])
    return HEADER.pack(len(body)) + body


def unpack(body: bytes | memoryview) -> Message:
    """The message of a frame's body. Raises ValueError for anything else."""
    kind, *values = msgpack.unpackb(body, strict_map_key=False)
    known = _BY_NAME.get(kind)
    if known is None:
        raise ValueError(f"no message is called {kind!r}")
    return known(*values)


class Frames:
    """Cuts received bytes into messages."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[Message]:
        """The messages that these bytes complete. Raises ValueError for a frame that is too long."""
        self._buffer += data
        while len(self._buffer) >= HEADER.size:
            (length,) = HEADER.unpack_from(self._buffer)
            if length > MAX_FRAME_BYTES:
                raise ValueError(f"a frame of {length} bytes; at most {MAX_FRAME_BYTES} are allowed")
            end = HEADER.size + length
            if len(self._buffer) < end:
                return
            body = bytes(self._buffer[HEADER.size : end])
            del self._buffer[:end]
            yield unpack(body)


Logprob = list[Any]
"""[token id, log-probability, [[id, log-probability], ...] of the most likely ones, the best first]"""


@dataclass
class End:
    """How an answer ended."""

    finish_reason: str
    stop_reason: str | int | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    error: str | None = None
    prompt_logprobs: list[Logprob | None] | None = None
    queued_s: float = 0.0
    ttft_s: float = 0.0
    total_s: float = 0.0

    def as_list(self) -> list[Any]:
        """The fields' values in order."""
        return list(astuple(self))


@dataclass
class Delta:
    """What is new of one answer; several that nobody has read yet become one."""

    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    logprobs: list[Logprob] | None = None
    end: End | None = None

    def add(self, later: Delta) -> None:
        """Append what came afterwards."""
        self.token_ids += later.token_ids
        self.text += later.text
        if later.logprobs is not None:
            self.logprobs = (self.logprobs or []) + later.logprobs
        self.end = later.end


Row = list[Any]
"""[id, token ids, text, log-probabilities or None, `End` as a list or None]"""


def delta_of(row: Row) -> Delta:
    """A row of `Outputs`."""
    _, token_ids, text, logprobs, end = row
    return Delta(token_ids, text, logprobs, None if end is None else End(*end))
