"""Rows of preference pairs to tokens and masks: two documents a row, the chosen and then the rejected one.

    <|user|>hi<|end|><|assistant|>good answer<|end|>     chosen
    <|user|>hi<|end|><|assistant|>bad<|end|>             rejected
    prompt: the same ids in both ^ only the answers are trained

What becomes of a pair is decided for both: cut, left out or wrong together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from tunesmith.errors import DataError
from tunesmith.text.chat import ChatText, EncodedChat, cut_before_answers, encode_chat_texts
from tunesmith.text.encoding import Documents, EncodedRows, EncodeSettings, render_conversation
from tunesmith.text.formats import Conversation, Preference, RowError, to_example
from tunesmith.text.reader import Row
from tunesmith.text.tokenizer import Tokenizer

_Chats = tuple[EncodedChat, EncodedChat]


@dataclass(frozen=True)
class _RenderedPair:
    place: int
    chosen: ChatText
    rejected: ChatText
    content: bytes


def encode_pairs(tokenizer: Tokenizer, settings: EncodeSettings, format_name: str, rows: Sequence[Row]) -> EncodedRows:
    """Documents of these pairs, in order: 2i is chosen, 2i + 1 rejected, with one hash (of the pair) and place.

    The counts are of pairs; ends_trained counts those with a trained end-of-turn token in both answers. A row that
    is wrong becomes a problem, never an exception.
    """
    problems: list[tuple[int, str]] = []
    rendered: list[_RenderedPair] = []
    for row in rows:
        try:
            rendered.append(_rendered_pair(tokenizer, settings, format_name, row))
        except (RowError, DataError) as error:
            problems.append((row.place, str(error)))
    chats = encode_chat_texts(
        tokenizer, [text for pair in rendered for text in (pair.chosen, pair.rejected)], "answers"
    )
    gathered = _Pairs(tokenizer, settings)
    for pair, chosen, rejected in zip(rendered, chats[::2], chats[1::2], strict=True):
        try:
            gathered.add(pair, _with_one_prompt(tokenizer, pair, (chosen, rejected)))
        except RowError as error:
            problems.append((pair.place, str(error)))
    return gathered.finished(sorted(problems))


def _rendered_pair(tokenizer: Tokenizer, settings: EncodeSettings, format_name: str, row: Row) -> _RenderedPair:
    """Both conversations as text, with the span of the last answer only: earlier ones are part of the prompt."""
    if row.problem is not None:
        raise RowError(row.problem)
    example = to_example(row.value, format_name)
    assert isinstance(example, Preference), "text/encoding.py encodes the other formats"
    texts, contents = [], []
    for answer in (example.chosen, example.rejected):
        chat = Conversation([*example.prompt, answer], example.tools)
        text, content = render_conversation(tokenizer, settings, chat)
        if not text.spans:
            raise RowError("the chat template marks no answer; name another one with data.chat_template")
        texts.append(replace(text, spans=text.spans[-1:]))
        contents.append(content)
    return _RenderedPair(row.place, texts[0], texts[1], b"\0".join(contents))


def _with_one_prompt(tokenizer: Tokenizer, pair: _RenderedPair, chats: _Chats) -> _Chats:
    """The pair with the same ids before both answers, cut there where one answer's start changes a token.

    Raises: RowError when the ids differ even so.
    """
    chosen, rejected = chats
    if not any(chosen.trained) or not any(rejected.trained) or _prompt(chosen) == _prompt(rejected):
        return chats
    cut = (
        cut_before_answers(tokenizer, chosen, pair.chosen),
        cut_before_answers(tokenizer, rejected, pair.rejected),
    )
    if _prompt(cut[0]) != _prompt(cut[1]):
        raise RowError(
            "the prompt has other tokens before the chosen than before the rejected answer: the chat template or the "
            "tokenizer joins it with the answer; name another template with data.chat_template"
        )
    return cut


def _prompt(chat: EncodedChat) -> list[int]:
    """The ids before the answer."""
    return chat.tokens[: chat.trained.index(True)] if any(chat.trained) else chat.tokens


class _Pairs:
    """Pairs being gathered, and counts of them."""

    def __init__(self, tokenizer: Tokenizer, settings: EncodeSettings) -> None:
        self._stops, self._settings = np.array(tokenizer.stop_ids, dtype=np.int32), settings
        self._documents = Documents()
        self._too_long: list[int] = []
        self._pairs = self._truncated = self._dropped = self._straddling = self._ends_trained = 0

    def add(self, pair: _RenderedPair, chats: _Chats) -> None:
        """Both documents, cut or left out when one is too long; left out when of the answers nothing is left, or
        the same."""
        most = self._settings.max_length
        over = any(len(chat.tokens) > most for chat in chats)
        self._pairs += 1
        self._straddling += any(chat.straddling for chat in chats)
        if over and self._settings.too_long != "truncate":
            self._too_long.append(pair.place)
            return
        self._truncated += over
        ids = [np.array(chat.tokens[:most], dtype=np.int32) for chat in chats]
        masks = [np.array(chat.trained[:most], dtype=np.bool_) for chat in chats]
        chosen, rejected = (tokens[mask] for tokens, mask in zip(ids, masks, strict=True))
        if not len(chosen) or not len(rejected) or np.array_equal(chosen, rejected):
            self._dropped += 1
            return
        self._ends_trained += all(bool(np.isin(answer, self._stops).any()) for answer in (chosen, rejected))
        for tokens, mask in zip(ids, masks, strict=True):
            self._documents.add(pair.place, tokens, mask, pair.content)

    def finished(self, problems: list[tuple[int, str]]) -> EncodedRows:
        """The pairs end to end, with what was left out."""
        return replace(
            self._documents.finished(),
            problems=problems,
            too_long=self._too_long,
            truncated=self._truncated,
            dropped=self._dropped,
            straddling=self._straddling,
            ends_trained=self._ends_trained,
            conversations=self._pairs,
        )
