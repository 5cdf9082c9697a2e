"""Masks: exactly the answers and their end-of-turn tokens, for any template, and the served prompt is a prefix."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tunesmith.errors import DataError, TokenizerError
from tunesmith.text.chat import TRAINING_CLOCK, EncodedChat, encode_chat, encode_prompt, render
from tunesmith.text.families import family_template, read_template
from tunesmith.text.tokenizer import Tokenizer

TURNS = [
    {"role": "user", "content": "你好"},
    {"role": "assistant", "content": "first answer"},
    {"role": "user", "content": "and?"},
    {"role": "assistant", "content": "第二个答案"},
]
TEMPLATES = [
    "Qwen-Qwen2.5-7B-Instruct",
    "Qwen-Qwen3-0.6B",
    "deepseek-ai-DeepSeek-R1-Distill-Qwen-32B",
    "google-gemma-2-2b-it",
    "meta-llama-Llama-3.1-8B-Instruct",
    "meta-llama-Llama-3.2-3B-Instruct",
    "microsoft-Phi-3.5-mini-instruct",
    "mistralai-Mistral-Nemo-Instruct-2407",
]
# What each of them writes after an answer.
ENDS = [
    "<|im_end|>",
    "<|im_end|>",
    "<｜end▁of▁sentence｜>",
    "<end_of_turn>",
    "<|eot_id|>",
    "<|eot_id|>",
    "<|end|>",
    "</s>",
]
SPECIAL = [
    *ENDS, "<s>", "<|im_start|>", "<｜User｜>", "<｜Assistant｜>", "<start_of_turn>", "<|start_header_id|>",
    "<|end_header_id|>", "<|user|>", "<|assistant|>", "<|system|>", "[INST]", "[/INST]", "<|endoftext|>",
]  # fmt: skip


def trained_text(tokenizer: Tokenizer, chat: EncodedChat) -> list[str]:
    """The trained runs, as text."""
    runs: list[list[int]] = []
    for i, (token, flag) in enumerate(zip(chat.tokens, chat.trained, strict=True)):
        if flag and not (i and chat.trained[i - 1]):
            runs.append([])
        if flag:
            runs[-1].append(token)
    return [tokenizer.decode(run) for run in runs]


@pytest.fixture(scope="module")
def with_template(byte_directory: Path, data_dir: Path) -> Callable[[str], Tokenizer]:
    """A byte tokenizer that has one of the real templates, and all their special tokens."""
    import tokenizers

    def make(name: str) -> Tokenizer:
        backend = tokenizers.Tokenizer.from_file(str(byte_directory / "tokenizer.json"))
        backend.add_special_tokens(SPECIAL)
        source = (data_dir / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")
        end = ENDS[TEMPLATES.index(name)]
        eos = end if end in ("</s>", "<｜end▁of▁sentence｜>") else "<|endoftext|>"
        config = {"bos_token": "<s>", "eos_token": eos, "chat_template": source}
        return Tokenizer(backend, config, byte_directory)

    return make


@pytest.mark.parametrize(("name", "end"), list(zip(TEMPLATES, ENDS, strict=True)))
def test_answers_are_trained_up_to_the_end_of_turn(
    name: str, end: str, with_template: Callable[[str], Tokenizer]
) -> None:
    tokenizer = with_template(name)
    chat = encode_chat(tokenizer, TURNS)
    runs = trained_text(tokenizer, chat)
    changes_earlier_turns = name.startswith("deepseek")
    if name == "Qwen-Qwen3-0.6B":
        # It shows thoughts (here none) in the last answer only, so the first one can't be trained as it is served.
        assert runs == [f"<think>\n\n</think>\n\n第二个答案{end}"]
        assert chat.untrained_turns == 1
    elif changes_earlier_turns:
        assert runs == [f"第二个答案{end}"]
        assert chat.untrained_turns == 1
    else:
        assert [run.strip() for run in runs] == [f"first answer{end}", f"第二个答案{end}"]
        assert chat.untrained_turns == 0
    assert not chat.straddling
    assert tokenizer.end_of_turn_id == tokenizer.token_id(end)


@pytest.mark.parametrize("context", ["simple", "system", "tool_use"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_served_prompt_is_a_prefix_of_training(
    name: str, context: str, with_template: Callable[[str], Tokenizer], data_dir: Path
) -> None:
    tokenizer = with_template(name)
    given = json.loads((data_dir / "chat_templates" / "contexts" / f"{context}.json").read_text(encoding="utf-8"))
    messages, tools = given["messages"], given.get("tools")
    switches: dict[str, Any] = {"tools": tools} if tools else {}
    last = max(i for i, message in enumerate(messages) if message["role"] == "assistant")
    try:
        prompt = encode_prompt(tokenizer, messages[:last], now=TRAINING_CLOCK, **switches)
        chat = encode_chat(tokenizer, messages, **switches)
    except DataError as error:
        refusals = ("refuses this conversation", "can't render", "training and serving would differ")
        assert any(text in str(error) for text in refusals)
        assert (name, context) in REFUSED, str(error)
        return
    assert (name, context) not in REFUSED
    assert chat.tokens[: len(prompt)] == prompt
    assert any(chat.trained[len(prompt) :])
    assert not chat.trained[len(prompt) - 1]


# Roles or calls that these templates refuse themselves.
REFUSED = {
    ("google-gemma-2-2b-it", "system"),
    ("google-gemma-2-2b-it", "tool_use"),
}


@pytest.mark.parametrize("name", ["qwen2.5", "llama3", "mistral", "gpt2"])
def test_real_tokenizers(name: str, real_tokenizer: Callable[[str], Tokenizer]) -> None:
    tokenizer = real_tokenizer(name)
    chat = encode_chat(tokenizer, TURNS)
    end = tokenizer.token_text(tokenizer.end_of_turn_id or 0)
    assert [run.strip() for run in trained_text(tokenizer, chat)] == [f"first answer{end}", f"第二个答案{end}"]
    prompt = encode_prompt(tokenizer, TURNS[:3], now=TRAINING_CLOCK)
    assert chat.tokens[: len(prompt)] == prompt


def test_answer_that_begins_with_a_line_break(real_tokenizer: Callable[[str], Tokenizer]) -> None:
    """Qwen's tokenizer joins the prompt's last line break with the answer's first; no served prompt has that token."""
    tokenizer = real_tokenizer("qwen2.5")
    turns = [TURNS[0], {"role": "assistant", "content": "\n\nhello"}]
    chat = encode_chat(tokenizer, turns)
    prompt = encode_prompt(tokenizer, turns[:1])
    assert chat.tokens[: len(prompt)] == prompt
    assert trained_text(tokenizer, chat) == ["\n\nhello<|im_end|>"]


def test_generation_blocks_decide_where_there_are_some(byte_tokenizer: Tokenizer) -> None:
    source = (
        "{% for m in messages %}{% if m.role == 'assistant' %}A:{% generation %}{{ m.content }}<|im_end|>"
        "{% endgeneration %}{% else %}U:{{ m.content }}{% endif %}\n{% endfor %}"
    )
    tokenizer = byte_tokenizer.with_chat_template(source)
    assert trained_text(tokenizer, encode_chat(tokenizer, TURNS)) == ["first answer<|im_end|>", "第二个答案<|im_end|>"]


def test_weight_zero_keeps_an_answer_out(byte_tokenizer: Tokenizer) -> None:
    turns = [TURNS[0], {**TURNS[1], "weight": 0}, *TURNS[2:]]
    assert trained_text(byte_tokenizer, encode_chat(byte_tokenizer, turns)) == ["第二个答案<|im_end|>"]


def test_all_tokens_but_the_first(byte_tokenizer: Tokenizer) -> None:
    chat = encode_chat(byte_tokenizer, TURNS, train_on="all")
    assert chat.trained == [False] + [True] * (len(chat.tokens) - 1)


def test_messages_after_the_last_answer_are_left_out(byte_tokenizer: Tokenizer) -> None:
    assert encode_chat(byte_tokenizer, [*TURNS, TURNS[0]]) == encode_chat(byte_tokenizer, TURNS)


def test_answer_in_the_text_of_a_user_is_not_trained(byte_tokenizer: Tokenizer) -> None:
    turns = [{"role": "user", "content": "say: first answer"}, TURNS[1]]
    chat = encode_chat(byte_tokenizer, turns)
    assert trained_text(byte_tokenizer, chat) == ["first answer<|im_end|>"]
    assert byte_tokenizer.decode(chat.tokens[: chat.trained.index(True)]).endswith("<|im_start|>assistant\n")


def test_template_that_rewrites_the_past_trains_the_last_answer_as_served(byte_tokenizer: Tokenizer) -> None:
    source = "{{ messages | length }}{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"
    tokenizer = byte_tokenizer.with_chat_template(source)
    chat = encode_chat(tokenizer, TURNS)
    prompt = encode_prompt(tokenizer, TURNS[:3])
    assert chat.tokens[: len(prompt)] == prompt
    assert trained_text(tokenizer, chat) == ["第二个答案<|im_end|>"]
    assert chat.untrained_turns == 1


def test_template_that_shows_the_question_differently_is_refused(byte_tokenizer: Tokenizer) -> None:
    source = (
        "{% for m in messages %}{{ m.content | upper if messages | length == 4 else m.content }}<|im_end|>{% endfor %}"
    )
    with pytest.raises(DataError, match="training and serving would differ"):
        encode_chat(byte_tokenizer.with_chat_template(source), TURNS)


def test_system_message_that_the_template_drops_is_trained_as_served(
    with_template: Callable[[str], Tokenizer],
) -> None:
    """Mistral Nemo's template shows the system message only while the last message is the user's."""
    tokenizer = with_template("mistralai-Mistral-Nemo-Instruct-2407")
    turns = [{"role": "system", "content": "规则"}, *TURNS[:2]]
    chat = encode_chat(tokenizer, turns)
    assert "规则" in tokenizer.decode(chat.tokens)
    assert trained_text(tokenizer, chat) == ["first answer</s>"]


def test_open_thought_in_the_prompt_is_refused(byte_tokenizer: Tokenizer) -> None:
    source = (
        "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}{% if add_generation_prompt %}<think>\n{% endif %}"
    )
    with pytest.raises(DataError, match="training and serving would differ"):
        encode_chat(byte_tokenizer.with_chat_template(source), TURNS)


def test_conversation_without_an_answer(byte_tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match="no assistant turn"):
        encode_chat(byte_tokenizer, TURNS[:1])


def test_switches_reach_the_template(with_template: Callable[[str], Tokenizer]) -> None:
    tokenizer = with_template("Qwen-Qwen3-0.6B")
    shown = render(tokenizer, TURNS[:1], add_generation_prompt=True, enable_thinking=False)
    assert shown.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")


@pytest.mark.parametrize("family", ["chatml", "llama2", "llama3", "mistral", "eos_separated"])
def test_family_templates_give_exact_masks(family: str, byte_directory: Path) -> None:
    import tokenizers

    backend = tokenizers.Tokenizer.from_file(str(byte_directory / "tokenizer.json"))
    backend.add_special_tokens(SPECIAL)
    config = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": read_template(family)}
    tokenizer = Tokenizer(backend, config, byte_directory)
    end = {"chatml": "<|im_end|>", "llama3": "<|eot_id|>"}.get(family, "</s>")
    turns = [{"role": "system", "content": "规则"}, *TURNS]
    chat = encode_chat(tokenizer, turns)
    runs = [run.replace(" </s>", "</s>").strip() for run in trained_text(tokenizer, chat)]
    assert runs == [f"first answer{end}", f"第二个答案{end}"]
    prompt = encode_prompt(tokenizer, turns[:4])
    assert chat.tokens[: len(prompt)] == prompt
    assert "规则" in tokenizer.decode(prompt)


def test_family_is_told_by_its_tokens() -> None:
    def only(*tokens: str) -> Callable[[str], int | None]:
        return lambda text: 1 if text in tokens else None

    assert family_template(only("<|im_start|>", "<|im_end|>"), None, None) == read_template("chatml")
    assert family_template(only("<|start_header_id|>", "<|eot_id|>"), None, None) == read_template("llama3")
    assert family_template(only(), 0, "mistral") == read_template("mistral")
    assert family_template(only("<0x0A>"), 2, "llama") == read_template("llama2")
    assert family_template(only(), 0, "gpt2") == read_template("eos_separated")
    assert family_template(only(), None, "gpt2") is None


def test_no_template_at_all_names_the_key(byte_directory: Path) -> None:
    import tokenizers

    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a"))
    with pytest.raises(TokenizerError, match=r"data\.chat_template"):
        render(Tokenizer(backend, {}, byte_directory), TURNS, add_generation_prompt=True)
