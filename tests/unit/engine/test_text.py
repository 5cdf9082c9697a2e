"""An answer's text: stop texts across token borders, nothing shown that is taken back."""

from __future__ import annotations

import random

import pytest

from tunesmith.engine.text import AnswerText


class Pieces:
    """A decoder whose token i is the i-th piece; the last piece comes only at the end."""

    def __init__(self, pieces: list[str], tail: str = "") -> None:
        self.pieces, self.tail = pieces, tail

    def put(self, token: int) -> str:
        return self.pieces[token]

    def finish(self) -> str:
        return self.tail


def say(pieces: list[str], stop: tuple[str, ...] = (), tail: str = "") -> tuple[list[str], AnswerText]:
    text = AnswerText(Pieces(pieces, tail), stop)
    shown = []
    for token in range(len(pieces)):
        shown.append(text.push(token))
        if text.stopped:
            return shown, text
    shown.append(text.finish())
    return shown, text


def test_without_stop_texts_everything_is_shown_at_once() -> None:
    shown, text = say(["a", "", "bc"], tail="d")
    assert shown == ["a", "", "bc", "d"]
    assert text.text == "abcd"


def test_a_stop_text_across_three_tokens_is_never_shown() -> None:
    shown, text = say(["hello E", "N", "D and more"], ("END",))
    assert shown == ["hello ", "", ""]
    assert text.stopped and text.text == "hello "


def test_a_false_start_is_shown_when_it_is_known_to_be_one() -> None:
    shown, text = say(["a<", "|b", "c"], ("<|end|>",))
    assert shown == ["a", "<|b", "c", ""]
    assert not text.stopped


def test_a_start_that_never_completes_is_shown_at_the_end() -> None:
    shown, _ = say(["a<|e"], ("<|end|>",))
    assert shown == ["a", "<|e"]


def test_the_earliest_stop_text_wins() -> None:
    _, text = say(["xbya"], ("a", "b"))
    assert text.text == "x"


def test_a_stop_text_in_the_tail_cuts_too() -> None:
    _, text = say(["ab"], ("c",), tail="cd")
    assert text.text == "ab" and text.stopped


@pytest.mark.parametrize("seed", range(30))
def test_random_cuts_give_the_text_before_the_first_stop(seed: int) -> None:
    choice = random.Random(seed)
    whole = "".join(choice.choice("ab") for _ in range(60))
    stop = tuple("".join(choice.choice("ab") for _ in range(choice.randint(3, 6))) for _ in range(2))
    cuts = sorted(choice.sample(range(61), 15))
    pieces = [whole[i:j] for i, j in zip([0, *cuts], [*cuts, 60], strict=True)]
    shown, text = say(pieces, stop)
    ends = [whole.find(s) for s in stop if s in whole]
    # Two stop texts may complete in one piece; then the earlier start wins, and a cut can only be earlier than that.
    first_complete = min((whole.find(s) + len(s) for s in stop if s in whole), default=None)
    assert "".join(shown) == text.text
    assert text.stopped == bool(ends)
    if first_complete is None:
        assert text.text == whole
    else:
        assert text.text in [whole[:e] for e in ends]
