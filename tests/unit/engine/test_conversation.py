"""History: turns, overflow, what an interrupted answer leaves."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tunesmith.engine.conversation import Conversation, Mode
from tunesmith.engine.llm import LLM
from tunesmith.engine.request import SamplingParams
from tunesmith.errors import RequestError

GREEDY = SamplingParams(max_tokens=6, ignore_eos=True)


@pytest.fixture(scope="module")
def llm(tiny_model_dir: Callable[..., Path]) -> LLM:
    return LLM(tiny_model_dir("qwen2", initializer_range=0.3), device="cpu", max_model_len=200)


def test_an_answer_sees_the_turns_before_it(llm: LLM) -> None:
    talk = Conversation(llm, GREEDY, system="be kind")
    first = "".join(talk.say("你好"))
    second = "".join(talk.say("and now?"))
    messages = [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": "你好"},
        {"role": "assistant", "content": first},
        {"role": "user", "content": "and now?"},
    ]
    assert llm.chat(messages, GREEDY).text == second
    assert talk.messages() == [*messages, {"role": "assistant", "content": second}]
    assert talk.last is not None and talk.last.text == second
    talk.reset()
    assert talk.messages() == messages[:1]


def test_the_oldest_turns_go_when_the_context_is_full(llm: LLM) -> None:
    talk = Conversation(llm, GREEDY, system="be kind")
    dropped = 0
    for i in range(8):
        list(talk.say(f"message number {i}"))
        dropped += talk.num_dropped
        assert talk.last is not None and talk.last.prompt_tokens + 6 <= 200
        assert talk.turns[0]["role"] == "user"
    assert dropped > 0
    assert len(talk.turns) + dropped == 16
    assert talk.messages()[0]["role"] == "system"
    assert talk.turns[-2]["content"] == "message number 7"


def test_a_message_that_alone_is_too_long_is_refused_and_forgotten(llm: LLM) -> None:
    talk = Conversation(llm, GREEDY)
    list(talk.say("before"))
    turns = list(talk.turns)
    with pytest.raises(RequestError, match="shorten it"):
        talk.say("x" * 300)
    assert talk.turns == turns
    list(talk.say("after"))


def test_an_answer_fills_what_room_there_is(llm: LLM) -> None:
    talk = Conversation(llm, SamplingParams(max_tokens=500, ignore_eos=True))
    list(talk.say("hello"))
    assert talk.last is not None
    assert talk.last.prompt_tokens + len(talk.last.token_ids) == 200


def test_a_closed_answer_stays_in_the_history_as_far_as_it_came(llm: LLM) -> None:
    talk = Conversation(llm, SamplingParams(max_tokens=60, ignore_eos=True, temperature=1.0, seed=4))
    answer = talk.say("tell me")
    piece = next(answer)
    answer.close()
    answer.close()
    assert talk.turns[-1] == {"role": "assistant", "content": piece}
    assert talk.last is not None and talk.last.finish_reason == "abort"
    assert not llm.engine.has_work


@pytest.mark.parametrize("mode", ["chat", "complete"])
def test_every_question_of_a_seeded_conversation_has_a_draw_of_its_own(llm: LLM, mode: Mode) -> None:
    """The same seed began anew for each turn: a question that was asked again had the same answer for ever."""
    params = SamplingParams(max_tokens=6, ignore_eos=True, temperature=1.0, seed=4)

    def answers() -> list[str]:
        talk = Conversation(llm, params, mode=mode, history=False)
        return ["".join(talk.say("again")) for _ in range(3)]

    first = answers()
    assert len(set(first)) == 3
    assert answers() == first
    alone = Conversation(llm, params, mode=mode)
    assert "".join(alone.say("again")) == first[0]


def test_completing_keeps_no_history(llm: LLM) -> None:
    talk = Conversation(llm, GREEDY, mode="complete")
    said = "".join(talk.say("once"))
    assert said == llm.generate("once", GREEDY)[0].text
    assert talk.turns == []


def test_without_history_every_question_stands_alone(llm: LLM) -> None:
    talk = Conversation(llm, GREEDY, system="be kind", history=False)
    list(talk.say("before"))
    second = "".join(talk.say("and now?"))
    head = {"role": "system", "content": "be kind"}
    assert llm.chat([head, {"role": "user", "content": "and now?"}], GREEDY).text == second
    assert len(talk.turns) == 4
    assert [[m["role"] for m in row] for row in talk.rows()] == [["system", "user", "assistant"]] * 2
    talk.history = True
    assert talk.asked() == talk.messages() and talk.rows() == [talk.messages()]


def test_without_history_nothing_is_dropped(llm: LLM) -> None:
    talk = Conversation(llm, GREEDY, history=False)
    for i in range(8):
        list(talk.say(f"message number {i}"))
        assert talk.num_dropped == 0
    assert len(talk.turns) == 16
