"""The tokenizer of builtin:tiny: it loses nothing, and a value has the same tokens wherever it stands."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer

import tunesmith
from tunesmith.text.builtin import pretrain
from tunesmith.text.builtin.tokenizer import SPECIAL_TOKENS, VOCAB_SIZE, tokenizer_config, train_tokenizer

DIRECTORY = Path(tunesmith.__file__).parent / "models" / "tiny"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(DIRECTORY / "tokenizer.json"))


def test_vocabulary(tokenizer):
    assert tokenizer.get_vocab_size() == VOCAB_SIZE
    assert [tokenizer.token_to_id(token) for token in SPECIAL_TOKENS] == [0, 1, 2]
    assert json.loads((DIRECTORY / "config.json").read_text(encoding="utf-8"))["vocab_size"] == VOCAB_SIZE


@pytest.mark.parametrize(
    "text", ["", "Hello,  world!\n\n\tx", "你好，世界。龘", "emoji 😀 naïve café", "KX-4821 12.5 kg\r\n", "\x00\x7f"]
)
def test_round_trip(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_round_trip_of_rows(tokenizer):
    for row in pretrain.rows(17, 200):
        for text in [row["text"]] if "text" in row else [m["content"] for m in row["messages"]]:
            assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_digits_and_chinese_characters_never_merge_with_neighbours(tokenizer):
    assert tokenizer.encode("4821").tokens == list("4821")
    everyday = "你好的价格颜色是红色"
    assert len(tokenizer.encode(everyday).ids) == len(everyday)


def test_no_row_is_longer_than_the_recipes_allow(tokenizer):
    for row in pretrain.rows(2, 500):
        turns = row.get("messages") or [{"role": "", "content": row["text"]}]
        assert sum(len(tokenizer.encode(turn["content"]).ids) + 5 for turn in turns) <= 512


def test_stored_configuration_is_the_written_one():
    assert json.loads((DIRECTORY / "tokenizer_config.json").read_text(encoding="utf-8")) == tokenizer_config()


def test_training_is_reproducible():
    first, second = (train_tokenizer(num_rows=300, seed=5).to_str() for _ in range(2))
    assert first == second
