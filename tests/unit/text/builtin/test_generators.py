"""The generators: the same rows for the same seed, and nothing held out that training could have seen."""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Iterable
from random import Random
from typing import Any

import pytest

from tunesmith.errors import DataError
from tunesmith.text import sources
from tunesmith.text.builtin import pretrain, questions, shop, vocabulary
from tunesmith.text.builtin.vocabulary import VALUES, Split, split_of
from tunesmith.text.sources import SOURCES, builtin_rows

SPLITS: tuple[Split, ...] = ("pretrain", "train", "validation", "heldout")


def text_of(rows: Iterable[dict[str, Any]]) -> str:
    return "\n".join(row.get("text") or "\n".join(m["content"] for m in row["messages"]) for row in rows)


def occurs(needle: str, text: str) -> bool:
    """Whether a value stands in a text as a value: not as a part of a longer word or number."""
    # The value first, for which the search is quick; then that nothing stands before it.
    value = re.escape(needle)
    before = rf"(?<![0-9A-Za-z.]{value})" if needle[0].isascii() else ""
    return re.search(rf"{value}{before}(?![0-9A-Za-z])", text) is not None


def test_a_value_occurs_only_as_one():
    text = "1.5 kg, 25 m and 红色的 Amer-b2; x7"
    assert all(occurs(value, text) for value in ("1.5 kg", "25", "红色", "b2", "1.5"))
    assert not any(occurs(value, text) for value in ("5 kg", "5", "2", "Ame", "7", "1.", "b", "9"))


@pytest.fixture(scope="module")
def pretraining_text() -> str:
    return text_of(pretrain.rows(1, 4000))


@pytest.fixture(scope="module")
def seen_text(pretraining_text: str) -> str:
    """What a training run may have read: pre-training rows and the shop's training rows, several seeds."""
    rows = [*pretrain.rows(9, 1000), *shop.rows("train", 0, 400), *shop.rows("train", 5, 200)]
    return pretraining_text + "\n" + text_of(rows)


def test_rows_are_a_function_of_the_seed():
    assert list(pretrain.rows(3, 200)) == list(pretrain.rows(3, 200))
    assert list(pretrain.rows(3, 50)) != list(pretrain.rows(4, 50))
    assert list(shop.rows("train", 1, 20)) == list(shop.rows("train", 1, 20))
    assert list(shop.rows("train", 1, 20)) != list(shop.rows("train", 2, 20))


def test_rows_do_not_change_with_the_version():
    """builtin:tiny was trained on these rows: whoever changes the generator changes what its recipe means."""
    digest = hashlib.sha256(text_of(pretrain.rows(1, 300)).encode()).hexdigest()
    assert digest[:16] == "09dac9d827aa8ec8"


def test_shards_together_are_all_rows():
    whole = list(pretrain.rows(1, 100))
    shards = [list(pretrain.rows(1, 100, shard, 3)) for shard in range(3)]
    assert [shards[i % 3][i // 3] for i in range(100)] == whole


@pytest.mark.parametrize("language", ["en", "zh"])
def test_every_value_belongs_to_its_split(language):
    rng = Random(0)
    for kind, make in VALUES[language].items():
        if kind in ("place", "person") and language == "en":
            continue  # put together from made-up words, each of which belongs to the split
        for split in SPLITS:
            drawn = [make(rng, split) for _ in range(50)]
            core = [d[:-1] for d in drawn] if (kind, language) == ("place", "zh") else drawn
            assert all(split_of(value) == split for value in core), (kind, split)


def test_syllables_are_apart():
    pools = [set(vocabulary.syllables(split)) for split in SPLITS]
    assert min(map(len, pools)) > 300
    assert sum(map(len, pools)) == len(set.union(*pools))


def test_phrasings_are_apart():
    for splits in questions.PHRASINGS.values():
        seen = {p.casefold() for split in ("pretrain", "train") for p in splits[split]}
        assert not seen & {p.casefold() for p in splits["heldout"]}
        assert not {p.casefold() for p in splits["pretrain"]} & {p.casefold() for p in splits["train"]}


def test_held_out_products_and_values_were_never_seen(seen_text):
    for asked in shop.shop_questions("heldout", 0, 200) + shop.shop_questions("validation", 0, 100):
        product, *facts = asked.context.split("\n")
        assert product not in seen_text
        for fact in facts:
            value = re.split("：|: ", fact, maxsplit=1)[1]
            assert not occurs(value, seen_text), value


def test_held_out_phrasings_were_never_seen(seen_text):
    for phrasings in (questions.PHRASINGS["en"]["heldout"], questions.PHRASINGS["zh"]["heldout"]):
        for phrasing in phrasings:
            pattern = re.sub(r"\\\{[knN]\\\}", ".{1,60}?", re.escape(phrasing))
            assert re.search(f"(?m)(?:^|[.。 ]){pattern}$", seen_text) is None, phrasing


def test_no_shop_manner_occurs_in_pretraining(pretraining_text):
    for manners in shop.MANNERS.values():
        for manner in manners:
            pattern = re.sub(r"\\\{[kvS]\\\}", ".{1,60}?", re.escape(manner))
            assert re.search(pattern, pretraining_text) is None, manner


def test_an_answer_holds_the_value_and_the_value_stands_in_the_context():
    owner = shop.shop(0)
    for asked in shop.shop_questions("heldout", 1, 100):
        joint = owner.joint[asked.language]
        facts = dict(line.split(joint, 1) for line in asked.context.split("\n")[1:])
        assert sum(value in asked.answer for value in facts.values()) >= 1
        key = next(key for key, value in facts.items() if value in asked.answer and key in asked.question)
        assert key in asked.answer
        assert owner.name[asked.language] in asked.answer


def test_shuffled_contexts_keep_the_question_and_the_answer():
    plain, shuffled = (list(shop.rows("heldout", 0, 40, shuffled=flag)) for flag in (False, True))
    right = 0
    for one, other in zip(plain, shuffled, strict=True):
        assert one["messages"][1] == other["messages"][1]
        context, question = other["messages"][0]["content"].split("\n\n")
        assert one["messages"][0]["content"].endswith(question)
        assert not one["messages"][0]["content"].startswith(context)
        right += any(line and line in one["messages"][1]["content"] for line in re.split("：|: |\n", context)[2::2])
    assert right < 0.2 * len(plain)


def test_the_mix_of_languages_and_shops():
    asked = shop.shop_questions("train", 0, 50, chinese=0.4)
    assert sum(one.language == "zh" for one in asked) == 20
    assert len({str(shop.shop(number)) for number in range(6)}) == 6


def test_generation_is_quick():
    """At least 2000 rows a second on a busy core (12000 on an idle one)."""
    start = time.process_time()
    assert sum(1 for _ in pretrain.rows(1, 2000)) == 2000
    assert time.process_time() - start < 1.0


def test_sources_take_arguments():
    assert len(list(builtin_rows("shop?rows=7&seed=2"))) == 7
    assert all(list(builtin_rows(f"{name}?rows=30")) for name in SOURCES)


def test_the_two_pretraining_sources_together_are_all_rows(monkeypatch):
    """A source has one format, so that conversations and plain texts are two sources; workers change nothing."""
    monkeypatch.setattr(sources, "_ROWS_OF_A_JOB", 100)
    monkeypatch.setattr(sources, "available_cores", lambda: 2)
    made = [*builtin_rows("pretrain?rows=1150&seed=4"), *builtin_rows("pretrain-text?rows=1150&seed=4")]
    assert sorted(map(repr, made)) == sorted(map(repr, pretrain.rows(4, 1150)))


@pytest.mark.parametrize(
    ("address", "part"),
    [("shops", "did you mean 'shop'"), ("shop?row=3", "did you mean 'rows'"), ("shop?rows=many", "whole number")],
)
def test_mistakes_in_an_address_are_named(address, part):
    with pytest.raises(DataError, match=re.escape(part)):
        list(builtin_rows(address))
