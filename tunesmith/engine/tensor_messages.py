"""Messages between the processes that share a model: a length, then msgpack. Plain data only."""

from __future__ import annotations

import socket
import struct
from typing import Any, cast

import msgpack  # type: ignore[import-untyped]

Message = dict[str, Any]
"""Numbers, texts, bytes, lists and mappings of these; `kind` says which it is."""
_LENGTH = struct.Struct("<Q")


def send(connection: socket.socket, message: Message) -> None:
    """Send one message. Raises OSError where nobody is there."""
    packed = msgpack.packb(message)
    connection.sendall(_LENGTH.pack(len(packed)) + packed)


class Reader:
    """One message after the other; None when the other side has closed."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection

    def next(self) -> Message | None:
        """The next message. Raises OSError."""
        head = self._exactly(_LENGTH.size)
        body = None if head is None else self._exactly(_LENGTH.unpack(head)[0])
        return None if body is None else cast(Message, msgpack.unpackb(body))

    def _exactly(self, count: int) -> bytes | None:
        parts = bytearray()
        while len(parts) < count:
            part = self.connection.recv(min(count - len(parts), 2**20))
            if not part:
                return None
            parts += part
        return bytes(parts)
