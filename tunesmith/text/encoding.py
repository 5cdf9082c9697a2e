"""Rows to tokens and masks: the pure function that every tokenisation process runs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from tunesmith.errors import DataError
from tunesmith.text.chat import ChatText, chat_text, encode_chat_texts
from tunesmith.text.formats import Conversation, PlainText, Preference, RowError, to_example
from tunesmith.text.reader import Row
from tunesmith.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class EncodeSettings:
    """What of the data section decides about tokens and masks."""

    max_length: int
    too_long: Literal["truncate", "skip", "stop"]
    train_on: Literal["answers", "all"]
    system: str | None
    template_arguments: dict[str, Any]


@dataclass
class EncodedRows:
    """Documents laid end to end, and what was left out and why.

    problems: (place, reason) of rows that are wrong, in order; too_long: places of documents over max_length.
    """

    tokens: NDArray[np.int32]
    trained: NDArray[np.bool_]
    lengths: NDArray[np.int64]
    places: NDArray[np.int64]
    hashes: NDArray[np.uint64]
    problems: list[tuple[int, str]] = field(default_factory=list)
    too_long: list[int] = field(default_factory=list)
    truncated: int = 0
    dropped: int = 0
    untrained_turns: int = 0
    straddling: int = 0
    ends_trained: int = 0
    conversations: int = 0
    multi_turn: int = 0


@dataclass
class Documents:
    """Documents being gathered."""

    tokens: list[NDArray[np.int32]] = field(default_factory=list)
    trained: list[NDArray[np.bool_]] = field(default_factory=list)
    places: list[int] = field(default_factory=list)
    hashes: list[int] = field(default_factory=list)

    def add(self, place: int, tokens: Any, trained: NDArray[np.bool_], content: bytes) -> None:
        """One more; `content` is what its hash is made of."""
        self.tokens.append(np.asarray(tokens, dtype=np.int32))
        self.trained.append(trained)
        self.places.append(place)
        self.hashes.append(int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little"))

    def finished(self) -> EncodedRows:
        """All of them, end to end."""
        return EncodedRows(
            np.concatenate([np.empty(0, np.int32), *self.tokens]),
            np.concatenate([np.empty(0, np.bool_), *self.trained]),
            np.array([len(tokens) for tokens in self.tokens], dtype=np.int64),
            np.array(self.places, dtype=np.int64),
            np.array(self.hashes, dtype=np.uint64),
        )


def encode_rows(tokenizer: Tokenizer, settings: EncodeSettings, format_name: str, rows: Sequence[Row]) -> EncodedRows:
    """Documents of these rows, in order. A row that is wrong becomes a problem, never an exception."""
    problems: list[tuple[int, str]] = []
    texts: list[tuple[int, PlainText]] = []
    chats: list[tuple[int, ChatText, bytes]] = []
    multi_turn = 0
    for row in rows:
        try:
            if row.problem is not None:
                raise RowError(row.problem)
            example = to_example(row.value, format_name)
            assert not isinstance(example, Preference), "text/pairs.py encodes the format 'preference'"
            if isinstance(example, PlainText):
                texts.append((row.place, example))
            else:
                chats.append((row.place, *render_conversation(tokenizer, settings, example)))
                multi_turn += sum(message["role"] == "user" for message in example.messages) > 1
        except (RowError, DataError) as error:
            problems.append((row.place, str(error)))
    documents, counts = Documents(), EncodedRows(*[np.empty(0)] * 5)  # type: ignore[arg-type]
    _add_texts(documents, counts, tokenizer, settings, texts)
    _add_chats(documents, counts, tokenizer, settings, chats)
    encoded = documents.finished()
    for name in ("too_long", "truncated", "dropped", "untrained_turns", "straddling", "ends_trained", "conversations"):
        setattr(encoded, name, getattr(counts, name))
    encoded.problems, encoded.multi_turn = problems, multi_turn
    return encoded


def render_conversation(tokenizer: Tokenizer, settings: EncodeSettings, chat: Conversation) -> tuple[ChatText, bytes]:
    """The conversation as text with its answers' spans, and its content for hashing.

    Raises: DataError when the template refuses it.
    """
    messages = chat.messages
    if settings.system is not None and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": settings.system}, *messages]
    switches = dict(settings.template_arguments)
    if chat.tools is not None:
        switches["tools"] = chat.tools
    content = json.dumps([messages, chat.tools], ensure_ascii=False, sort_keys=True).encode("utf-8", "surrogatepass")
    return chat_text(tokenizer, messages, train_on=settings.train_on, **switches), content


def _add_texts(
    documents: Documents,
    counts: EncodedRows,
    tokenizer: Tokenizer,
    settings: EncodeSettings,
    texts: list[tuple[int, PlainText]],
) -> None:
    """Plain documents: bos where the tokenizer puts one, the text, the end-of-sequence token; all trained."""
    encodings = tokenizer.encodings([text.text for _, text in texts], offsets=False)
    begin = [tokenizer.bos_id] if tokenizer.adds_bos else []
    end = [tokenizer.eos_id] if tokenizer.eos_id is not None else []
    for (place, text), encoding in zip(texts, encodings, strict=True):
        ids = np.array((begin if text.begins else []) + encoding.ids + (end if text.ends else []), dtype=np.int32)
        if text.pieces:
            for start in range(0, len(ids), settings.max_length):
                piece = ids[start : start + settings.max_length]
                if len(piece) > 1:
                    documents.add(place, piece, np.arange(len(piece)) > 0, piece.tobytes())
        else:
            _add_document(documents, counts, settings, place, ids, np.arange(len(ids)) > 0, text.text.encode())


def _add_chats(
    documents: Documents,
    counts: EncodedRows,
    tokenizer: Tokenizer,
    settings: EncodeSettings,
    chats: list[tuple[int, ChatText, bytes]],
) -> None:
    encoded = encode_chat_texts(tokenizer, [chat for _, chat, _ in chats], settings.train_on)
    stops = np.array(tokenizer.stop_ids, dtype=np.int32)
    for (place, _, content), chat in zip(chats, encoded, strict=True):
        ids, trained = np.array(chat.tokens, dtype=np.int32), np.array(chat.trained, dtype=np.bool_)
        counts.conversations += 1
        counts.untrained_turns += chat.untrained_turns
        counts.straddling += chat.straddling
        kept = ids[: settings.max_length][trained[: settings.max_length]]
        counts.ends_trained += bool(np.isin(kept, stops).any())
        _add_document(documents, counts, settings, place, ids, trained, content)


def _add_document(
    documents: Documents,
    counts: EncodedRows,
    settings: EncodeSettings,
    place: int,
    ids: NDArray[np.int32],
    trained: NDArray[np.bool_],
    content: bytes,
) -> None:
    """A whole document, cut or left out when it is too long, left out when nothing of it is trained."""
    if len(ids) > settings.max_length:
        if settings.too_long != "truncate":
            counts.too_long.append(place)
            return
        counts.truncated += 1
        ids, trained = ids[: settings.max_length], trained[: settings.max_length]
    if not trained.any():
        counts.dropped += 1
        return
    documents.add(place, ids, trained, content)
