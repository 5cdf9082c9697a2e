"""What is counted while rows become documents."""

from __future__ import annotations

from tunesmith.text.encoding import EncodeSettings, encode_rows
from tunesmith.text.reader import Row
from tunesmith.text.tokenizer import Tokenizer

ASK, SAY, CALL, TOOL = (
    {"role": "user", "content": "q"},
    {"role": "assistant", "content": "a"},
    {"role": "assistant", "content": "let me see"},
    {"role": "tool", "content": "42"},
)


def test_conversations_with_a_second_question_are_counted(byte_tokenizer: Tokenizer) -> None:
    """Several answers to one question, as with tools, are one turn for whoever asks."""
    talks = [[ASK, SAY], [ASK, SAY, ASK, SAY], [ASK, CALL, TOOL, SAY]]
    rows = [Row(place, {"messages": talk}) for place, talk in enumerate(talks, 1)]
    encoded = encode_rows(byte_tokenizer, EncodeSettings(64, "truncate", "answers", None, {}), "messages", rows)
    assert encoded.problems == []
    assert (encoded.conversations, encoded.multi_turn) == (3, 1)
