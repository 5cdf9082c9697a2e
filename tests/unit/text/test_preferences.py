"""Preference pairs: one prompt, two answers, and every policy decided for the pair."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tunesmith.errors import DataError
from tunesmith.recipe.schema import DataSection
from tunesmith.text import tokenise as tokenise_module
from tunesmith.text.chat import encode_chat
from tunesmith.text.dataset import load_data
from tunesmith.text.formats import Preference, RowError, detect_format, to_example
from tunesmith.text.packing import build_pack
from tunesmith.text.preferences import (
    PreferenceData,
    PreferencePair,
    PreferencePairs,
    holds_preferences,
    load_preferences,
)
from tunesmith.text.preview import check_trainable, pair_preview
from tunesmith.text.store import cache_folder
from tunesmith.text.tokenizer import Tokenizer

Write = Callable[..., str]
ROWS: list[Any] = [{"prompt": f"问 {i}", "chosen": f"好 {i}", "rejected": f"坏坏 {i}"} for i in range(40)]
USER, GOOD, BAD = (
    {"role": role, "content": text} for role, text in (("user", "hi"), ("assistant", "你好"), ("assistant", "no"))
)
BARE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}<END>{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "缓存"))


def load(tokenizer: Tokenizer, *files: str, seed: int = 0, **section: Any) -> PreferenceData:
    return load_preferences(DataSection(train=list(files), **section), tokenizer, seed=seed)


def texts(pair: PreferencePair, tokenizer: Tokenizer) -> tuple[str, str]:
    return tokenizer.decode(pair.chosen.tokens), tokenizer.decode(pair.rejected.tokens)


def answers(pair: PreferencePair, tokenizer: Tokenizer) -> tuple[str, str]:
    chosen, rejected = (tokenizer.decode(one.tokens[one.trained]) for one in pair)
    return chosen, rejected


def all_texts(pairs: PreferencePairs | None, tokenizer: Tokenizer) -> set[tuple[str, str]]:
    return {texts(pair, tokenizer) for pair in pairs or ()}


def share_a_prompt(pair: PreferencePair) -> bool:
    most = pair.prompt_tokens
    return (
        most == int(pair.rejected.trained.argmax())
        and np.array_equal(pair.chosen.tokens[:most], pair.rejected.tokens[:most])
        and not pair.chosen.trained[:most].any()
        and not pair.rejected.trained[:most].any()
    )


def test_a_pair_is_two_documents_with_exact_masks(byte_tokenizer: Tokenizer, write_rows: Write) -> None:
    path = write_rows(ROWS)
    data = load(byte_tokenizer, path, validation_fraction=0)
    assert data.validation is None
    assert len(data.train) == 40
    pair = data.train[3]
    assert (pair.chosen.row, pair.rejected.row) == (f"{path}:4", f"{path}:4")
    assert answers(pair, byte_tokenizer) == ("好 3<|im_end|>", "坏坏 3<|im_end|>")
    assert share_a_prompt(pair)
    prompt = byte_tokenizer.decode(pair.chosen.tokens[: pair.prompt_tokens])
    assert prompt == "<|im_start|>user\n问 3<|im_end|>\n<|im_start|>assistant\n"
    assert data.train.prompt_lengths.tolist() == [one.prompt_tokens for one in data.train]
    assert data.train.lengths.tolist() == [[len(one.chosen.tokens), len(one.rejected.tokens)] for one in data.train]
    assert texts(data.train[-1], byte_tokenizer) == texts(data.train[39], byte_tokenizer)
    with pytest.raises(IndexError):
        data.train[40]


def test_documents_are_those_of_the_conversations(byte_tokenizer: Tokenizer, write_rows: Write) -> None:
    pair = load(byte_tokenizer, write_rows(ROWS[:1])).train[0]
    for document, answer in ((pair.chosen, "好 0"), (pair.rejected, "坏坏 0")):
        chat = [{"role": "user", "content": "问 0"}, {"role": "assistant", "content": answer}]
        encoded = encode_chat(byte_tokenizer, chat)
        assert (document.tokens.tolist(), document.trained.tolist()) == (encoded.tokens, encoded.trained)


def test_pairs_pack_like_any_documents(byte_tokenizer: Tokenizer, write_rows: Write) -> None:
    train = load(byte_tokenizer, write_rows(ROWS), validation_fraction=0).train
    pack = build_pack(train.documents, [6, 7], 256, packing=True, max_length=128)
    assert pack.num_trained == int(train[3].chosen.trained.sum() + train[3].rejected.trained.sum())


def test_earlier_answers_are_prompt(byte_tokenizer: Tokenizer, write_rows: Write) -> None:
    turns = [{"from": "human", "value": "一"}, {"from": "gpt", "value": "二"}, {"from": "human", "value": "三"}]
    row = {"conversations": turns, "chosen": {"from": "gpt", "value": "四"}, "rejected": {"from": "gpt", "value": "五"}}
    marked = byte_tokenizer.with_chat_template(
        "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>"
        "{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    for tokenizer in (byte_tokenizer, marked):
        (pair,) = load(tokenizer, write_rows([row])).train
        assert answers(pair, tokenizer) == ("四<|im_end|>", "五<|im_end|>")
        assert "二" in tokenizer.decode(pair.rejected.tokens[: pair.prompt_tokens])
        assert share_a_prompt(pair)


def test_system_message_and_tools_are_in_both(byte_tokenizer: Tokenizer, write_rows: Write, tmp_path: Path) -> None:
    (pair,) = load(byte_tokenizer, write_rows(ROWS[:1]), system="规则").train
    assert all("规则" in text for text in texts(pair, byte_tokenizer))
    (tmp_path / "t.jinja").write_text(
        "{{ tools[0].name }}{% for m in messages %}<{{ m.role }}>{{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    path = write_rows([{**ROWS[0], "tools": json.dumps([{"name": "查"}])}])
    data = load(byte_tokenizer, path, chat_template=str(tmp_path / "t.jinja"))
    assert all(text.startswith("查<user>") for text in texts(data.train[0], byte_tokenizer))
    assert data.tokenizer.chat_template != byte_tokenizer.chat_template


@pytest.mark.parametrize("name", ["qwen2.5", "llama3", "gpt2"])
def test_an_answer_that_joins_the_prompt_is_cut_off(
    name: str, real_tokenizer: Callable[[str], Tokenizer], write_rows: Write
) -> None:
    """One answer's first line break would merge with the prompt's last: the prompt's ids would not be shared."""
    tokenizer = real_tokenizer(name).with_chat_template(BARE.replace(": ", ":\n"))
    path = write_rows(
        [{"prompt": "a", "chosen": "\nb", "rejected": "c"}, {"prompt": "a", "chosen": "b", "rejected": " c"}]
    )
    for pair, (chosen, rejected) in zip(
        load(tokenizer, path, validation_fraction=0).train, (("\nb", "c"), ("b", " c")), strict=True
    ):
        assert share_a_prompt(pair)
        assert answers(pair, tokenizer) == (chosen + "<END>", rejected + "<END>")


def test_a_prompt_that_can_not_be_shared_is_a_bad_row(
    real_tokenizer: Callable[[str], Tokenizer], write_rows: Write
) -> None:
    tokenizer = real_tokenizer("mistral").with_chat_template(BARE)
    with pytest.raises(DataError, match=r":1: the prompt has other tokens .*data\.chat_template"):
        load(tokenizer, write_rows([{"prompt": "a", "chosen": "yes", "rejected": "no"}]))


def test_split_is_by_pair_and_chosen_by_the_seed(byte_tokenizer: Tokenizer, write_rows: Write) -> None:
    path = write_rows(ROWS + ROWS)

    def parts(seed: int) -> tuple[set[tuple[str, str]], set[tuple[str, str]]]:
        data = load(byte_tokenizer, path, seed=seed, validation_fraction=0.2)
        assert data.summary.overlap == 0
        assert data.summary.pairs + data.summary.validation_pairs == 80
        assert all(share_a_prompt(pair) for pair in data.validation or ())
        return all_texts(data.train, byte_tokenizer), all_texts(data.validation, byte_tokenizer)

    train, held = parts(0)
    assert not train & held
    assert len(train | held) == 40
    assert 6 <= len(held) <= 10
    assert parts(0) == (train, held)
    assert parts(1) != (train, held)
    backwards = load(byte_tokenizer, write_rows(ROWS[::-1] + ROWS, "b.jsonl"), validation_fraction=0.2)
    assert all_texts(backwards.validation, byte_tokenizer) == held


def test_validation_files(byte_tokenizer: Tokenizer, write_rows: Write) -> None:
    train, held = write_rows(ROWS[:10], "a.jsonl"), write_rows(ROWS[8:12], "b.jsonl")
    data = load(byte_tokenizer, train, validation=[held])
    assert (data.summary.pairs, data.summary.validation_pairs, data.summary.overlap) == (10, 4, 2)
    assert data.validation is not None
    assert data.validation[0].chosen.row == f"{held}:1"
    assert any("2 validation pairs are in the training data too" in line for line in data.summary.lines())


def test_too_long_is_decided_for_the_pair(byte_tokenizer: Tokenizer, write_rows: Write) -> None:
    rows = [
        {"prompt": "q", "chosen": "a" * 200, "rejected": "b"},  # one side is cut
        {"prompt": "q" * 200, "chosen": "a", "rejected": "b"},  # no answer is left
        {"prompt": "q", "chosen": "a" * 99 + "x", "rejected": "a" * 99 + "y"},  # what is left is the same
        {"prompt": "q", "chosen": "a", "rejected": "b" * 200},
        {"prompt": "q", "chosen": "a", "rejected": "b"},
    ]
    path = write_rows(rows)
    common: dict[str, Any] = {"max_length": 64, "validation_fraction": 0}
    cut = load(byte_tokenizer, path, **common)
    assert (cut.summary.pairs, cut.summary.truncated, cut.summary.dropped) == (3, 4, 2)
    assert cut.train.lengths.max() == 64
    assert [pair.chosen.row.rpartition(":")[2] for pair in cut.train] == ["1", "4", "5"]
    assert all(share_a_prompt(pair) for pair in cut.train)
    assert answers(cut.train[1], byte_tokenizer)[0] == "a<|im_end|>"
    left = load(byte_tokenizer, path, too_long="skip", **common)
    assert (left.summary.pairs, left.summary.too_long, left.summary.truncated) == (1, 4, 0)
    with pytest.raises(DataError, match=r":1: .*longer than data\.max_length \(64\)"):
        load(byte_tokenizer, path, too_long="stop", **common)


def test_bad_rows_stop_with_file_and_line_or_are_counted(byte_tokenizer: Tokenizer, write_rows: Write) -> None:
    path = write_rows([*ROWS[:3], {"prompt": "a", "chosen": "b"}, *ROWS[3:6], {**ROWS[7], "rejected": ""}])
    with pytest.raises(DataError, match=r"数据\.jsonl:4: .*needs 'chosen' and 'rejected'.*data\.bad_rows=skip"):
        load(byte_tokenizer, path)
    summary = load(byte_tokenizer, path, bad_rows="skip").summary
    assert (summary.rows, summary.skipped, summary.pairs + summary.validation_pairs) == (8, 2, 6)
    assert sorted(kind["first"] for kind in summary.skipped_reasons.values()) == [f"{path}:4", f"{path}:8"]
    assert sum("1 row skipped" in line for line in summary.lines()) == 2


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "the same answer"),
        ({"prompt": "a", "chosen": " ", "rejected": "b"}, "assistant turn is empty"),
        ({"prompt": "", "chosen": "b", "rejected": "c"}, "'prompt' is empty"),
        ({"chosen": "b", "rejected": "c"}, "a text without a prompt"),
        ({"system": "s", "chosen": "b", "rejected": "c"}, "a text without a prompt"),
        ({"chosen": [GOOD], "rejected": [BAD]}, "the pair has no prompt"),
        ({"chosen": [], "rejected": []}, "must end with an assistant's answer"),
        ({"chosen_messages": [], "rejected_messages": []}, "must end with an assistant's answer"),
        ({"chosen_messages": [USER, GOOD]}, "needs 'chosen' and 'rejected'"),
        ({"chosen": [USER], "rejected": [USER, BAD]}, "'chosen' must end with"),
        ({"chosen": [USER, GOOD], "rejected": [{**USER, "content": "ho"}, BAD]}, "answer different prompts"),
        ({"prompt": "ho", "chosen": [USER, GOOD], "rejected": [USER, BAD]}, "another prompt than the row's"),
        ({"chosen": [USER, {**GOOD, "weight": 0}], "rejected": [USER, BAD]}, "weight 0"),
        ({"messages": [USER, GOOD], "label": True}, "feedback rows with a label"),
        ({**ROWS[0], "images": ["a.png"]}, "images"),
        ({**ROWS[0], "rejected": "a\ud800"}, "lone surrogate"),
        (7, "must be an object"),
    ],
)
def test_what_is_wrong_with_a_pair_is_said(row: Any, reason: str) -> None:
    with pytest.raises(RowError, match=reason):
        to_example(row, "preference")


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": "hi", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"question": "hi", "chosen": "你好", "rejected": "no"},
        {"messages": [USER], "chosen": GOOD, "rejected": BAD},
        {"chosen_messages": [USER, {**GOOD, "loss_weight": 1.0}], "rejected_messages": [USER, BAD]},
    ],
)
def test_shapes_that_people_have(row: Any) -> None:
    assert detect_format([row]) == "preference"
    assert to_example(row, "preference") == Preference([USER], GOOD, BAD)


def test_history_and_system_of_an_alpaca_pair() -> None:
    row = {
        "instruction": "hi",
        "input": "you",
        "system": "s",
        "history": [["a", "b"]],
        "chosen": "你好",
        "rejected": "no",
    }
    example = to_example(row, "preference")
    assert isinstance(example, Preference)
    assert [message["content"] for message in example.prompt] == ["s", "a", "b", "hi\nyou"]


def test_the_store_is_cached_and_is_not_the_conversations(byte_tokenizer: Tokenizer, write_rows: Write) -> None:
    path = write_rows(ROWS)
    first, again = load(byte_tokenizer, path), load(byte_tokenizer, path, seed=3)
    assert (first.summary.cached, again.summary.cached) == (False, True)
    assert len(list(cache_folder().iterdir())) == 1
    assert again.summary.tokens == first.summary.tokens
    with pytest.raises(DataError, match="preference training"):
        load_data(DataSection(train=[path]), byte_tokenizer, seed=0)
    assert not load(byte_tokenizer, path, max_length=100).summary.cached
    assert not load(byte_tokenizer, path, cache=False).summary.cached


def test_processes_give_what_one_process_gives(
    byte_tokenizer: Tokenizer, write_rows: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenise_module, "_BATCH_ROWS", 7)
    monkeypatch.setattr(tokenise_module, "_IN_PROCESS_BATCHES", 1)
    path = write_rows([*ROWS, {"prompt": "a", "chosen": "b"}])
    alone, together = (load(byte_tokenizer, path, workers=n, cache=False, bad_rows="skip") for n in (0, 2))
    assert [texts(pair, byte_tokenizer) for pair in alone.train] == [
        texts(pair, byte_tokenizer) for pair in together.train
    ]
    assert alone.summary == together.summary


def test_summary_counts(byte_tokenizer: Tokenizer, write_rows: Write) -> None:
    data = load(byte_tokenizer, write_rows(ROWS), validation_fraction=0)
    summary = data.summary
    assert summary.chosen_tokens == sum(int(pair.chosen.trained.sum()) for pair in data.train)
    assert summary.rejected_tokens == sum(int(pair.rejected.trained.sum()) for pair in data.train)
    assert summary.tokens == int(data.train.lengths.sum())
    assert summary.lengths["prompt"].max == data.train[39].prompt_tokens
    longest = max(len(pair.rejected.tokens) - pair.prompt_tokens for pair in data.train)
    assert summary.lengths["rejected"].max == longest
    assert summary.ends_trained == 40
    assert summary.chosen_longer_ratio == 0.0
    assert any("40 pairs to train on, 0 to validate on" in line for line in summary.lines())
    json.dumps(summary.as_dict())


def test_progress_counts_rows(byte_tokenizer: Tokenizer, write_rows: Write) -> None:
    seen: list[tuple[str, int, int]] = []
    data = DataSection(train=[write_rows(ROWS)], max_rows=30)
    load_preferences(data, byte_tokenizer, seed=0, progress=lambda *news: seen.append(news))
    assert seen[-1] == ("tokenising", 30, 30)


def test_preview_shows_both_masks(byte_tokenizer: Tokenizer, write_rows: Write) -> None:
    data = load(byte_tokenizer, write_rows(ROWS), validation_fraction=0)
    preview = pair_preview(data.train[0], byte_tokenizer)
    trained = [
        [piece["text"] for piece in preview.data[side]["pieces"] if piece["trained"]] for side in ("chosen", "rejected")
    ]
    assert trained == [["好 0<|im_end|>"], ["坏坏 0<|im_end|>"]]
    green = [preview.text.plain[span.start : span.end] for span in preview.text.spans if "green" in str(span.style)]
    assert green[1::2] == ["好 0<|im_end|>", "坏坏 0<|im_end|>"]
    assert all("tokens are trained: what the model learns to write" in legend for legend in green[::2])
    json.dumps(preview.data)
    check_trainable(data.train.documents, data.tokenizer, DataSection())


def test_other_rows_are_refused(byte_tokenizer: Tokenizer, write_rows: Write) -> None:
    chats = write_rows([{"instruction": "a", "output": "b"}], "a.jsonl")
    pairs = write_rows(ROWS, "b.jsonl")
    assert [holds_preferences(DataSection(train=[path])) for path in (chats, pairs)] == [False, True]
    assert holds_preferences(DataSection(train=[chats], format="preference"))
    with pytest.raises(DataError, match=r"a\.jsonl holds no preference pairs, its format is alpaca"):
        load(byte_tokenizer, pairs, chats)
    with pytest.raises(DataError, match=r"b\.jsonl holds preference pairs .* tunesmith data .*b\.jsonl"):
        load_data(DataSection(train=[chats, pairs], bad_rows="skip"), byte_tokenizer, seed=0)
    with pytest.raises(DataError, match=r"data\.train_on is 'all'"):
        load(byte_tokenizer, pairs, train_on="all")
    with pytest.raises(DataError, match="no rows"):
        load(byte_tokenizer, write_rows([], "c.jsonl"))


@pytest.mark.parametrize(
    ("file", "rows"), [("dpo_zh_demo.json.xz", 60), ("dpo_en_demo.json.xz", 60), ("v1_dpo_demo.jsonl", 10)]
)
@pytest.mark.parametrize("name", ["qwen2.5", "llama3"])
def test_real_files(
    file: str, rows: int, name: str, data_dir: Path, real_tokenizer: Callable[[str], Tokenizer]
) -> None:
    path = str(data_dir / "llamafactory_demos" / file)
    data = load(real_tokenizer(name), path, max_rows=rows, max_length=16384, validation_fraction=0, workers=0)
    summary = data.summary
    assert (summary.rows, summary.skipped, summary.truncated, summary.dropped) == (rows, 0, 0, 0)
    assert len(data.train) == summary.ends_trained == rows
    assert all(share_a_prompt(pair) for pair in data.train)
    for pair in data.train:
        chosen, rejected = answers(pair, data.tokenizer)
        assert chosen != rejected
        ends = {data.tokenizer.end_of_turn_id}
        assert {int(one.tokens[one.trained][-1]) for one in pair} == ends
