"""Served = trained, to the token: what the server sends to the engine is what training saw before the answer.

Random conversations in OpenAI's form go both ways: as a training row (formats, template, encoding) and as a request
(schema, messages for the template, ServedText), with the models' own templates and real tokenizers.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tunesmith.errors import DataError
from tunesmith.serve.conversation import plain_messages
from tunesmith.serve.schema.chat import ChatRequest
from tunesmith.serve.text import ServedText
from tunesmith.serve.tool_use import shown_tools
from tunesmith.text.chat import TRAINING_CLOCK, encode_chat_texts
from tunesmith.text.encoding import EncodeSettings, render_conversation
from tunesmith.text.formats import Conversation, to_example
from tunesmith.text.tokenizer import Tokenizer, load_tokenizer

TEXTS = [
    "Hi",
    "你好，世界",
    "😀🎈 ok?",
    " leading",
    "trailing \n",
    "\n\nlines\n",
    "a\tb",
    "naïve <b>",
    "x" * 40,
    "{} [] ''",
]
TOOLS = [
    {"type": "function", "function": {"name": "look_up", "description": "q", "parameters": {
        "type": "object", "properties": {"名": {"type": "string"}}, "required": ["名"]}}},
]  # fmt: skip
# template -> switches that are tried; tools where it shows them
SWITCHES: dict[str, list[dict[str, Any]]] = {
    "Qwen-Qwen2.5-7B-Instruct": [{}],
    "Qwen-Qwen3-0.6B": [{}, {"enable_thinking": False}, {"enable_thinking": True}],
    "deepseek-ai-DeepSeek-R1-Distill-Qwen-32B": [{}, {"enable_thinking": True}],
    "google-gemma-2-2b-it": [{}],
    "meta-llama-Llama-3.1-8B-Instruct": [{}, {"date_string": "1 Jan 2025"}],
    "meta-llama-Llama-3.2-3B-Instruct": [{}],
    "microsoft-Phi-3.5-mini-instruct": [{}],
    "mistralai-Mistral-Nemo-Instruct-2407": [{}],
}


def random_row(rng: random.Random, name: str) -> dict[str, Any]:
    """A conversation as a client would send it, its answer at the end."""
    has_system = rng.random() < 0.4 and "gemma" not in name
    messages: list[dict[str, Any]] = [{"role": "system", "content": rng.choice(TEXTS)}] if has_system else []
    uses_tools = name.startswith("Qwen") and rng.random() < 0.4
    for _ in range(rng.randrange(1, 4)):
        text = rng.choice(TEXTS)
        parts = [{"type": "text", "text": text[:1]}, {"type": "text", "text": text[1:]}]
        messages.append({"role": "user", "content": parts if rng.random() < 0.3 else text})
        if uses_tools and rng.random() < 0.5:
            function = {
                "name": "look_up",
                "arguments": json.dumps({"名": rng.choice(TEXTS)}, ensure_ascii=rng.random() < 0.5),
            }
            call = {"id": "call_1", "type": "function", "function": function}
            messages.append({"role": "assistant", "content": None, "tool_calls": [call]})
            messages.append({"role": "tool", "content": rng.choice(TEXTS), "tool_call_id": "call_1"})
        answer: dict[str, Any] = {"role": "assistant", "content": rng.choice(TEXTS).strip()}
        if "Qwen3" in name and rng.random() < 0.4:
            answer["reasoning_content"] = rng.choice(TEXTS).strip()
        messages.append(answer)
    return {"messages": messages, **({"tools": TOOLS} if uses_tools else {})}


@pytest.fixture(autouse=True, scope="module")
def _one_load() -> Iterator[None]:
    """Each tokenizer is read once, and what its copies for other templates share is made first."""

    @cache
    def load(directory: Path) -> Tokenizer:
        tokenizer = load_tokenizer(directory)
        tokenizer.encode("a")
        assert tokenizer.vocab_size and tokenizer.stop_ids
        return tokenizer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tunesmith.serve.text.load_tokenizer", load)
        yield


def served_ids(text: ServedText, row: dict[str, Any], switches: dict[str, Any]) -> list[int]:
    """The request without its last answer, on its way through the server."""
    tools = {"tools": row["tools"]} if "tools" in row else {}
    body = ChatRequest.model_validate({"messages": row["messages"][:-1], **tools})
    own = {**switches, **shown_tools(body), "now": TRAINING_CLOCK}

    async def go() -> list[int]:
        messages = plain_messages(body.messages, text)
        prompt = await text.chat_prompt(messages, own, continues=False, param="messages")
        return await text.prompt_ids(prompt, "messages")

    return asyncio.run(go())


@pytest.mark.parametrize("name", list(SWITCHES))
def test_prompts_are_served_as_they_were_trained(data_dir: Path, name: str) -> None:
    folder = "tokenizer_mistral" if "mistral" in name else "tokenizer_qwen2.5"
    template = str(data_dir / "chat_templates" / f"{name}.jinja")
    rng, compared = random.Random(name), 0
    folder = str(data_dir / folder)
    text = ServedText({"tokenizer": folder, "model": folder, "chat_template": template})
    for switches in SWITCHES[name]:
        for system in (None, "训练 system"):
            text.template_arguments, text.system = switches, None if "gemma" in name else system
            settings = EncodeSettings(4096, "truncate", "answers", text.system, switches)
            for _ in range(7):
                row = random_row(rng, name)
                example = to_example(row, "messages")
                assert isinstance(example, Conversation)
                try:
                    chat, _ = render_conversation(text.tokenizer, settings, example)
                except DataError:
                    continue
                trained = encode_chat_texts(text.tokenizer, [chat], "answers")[0]
                if trained.straddling:  # counted by training: a token reaches across the start of an answer
                    continue
                served = served_ids(text, row, {})
                assert served == trained.tokens[: len(served)], (name, switches, row)
                # Exactly there the last answer begins to be trained.
                assert trained.trained[len(served)] and not trained.trained[len(served) - 1]
                compared += 1
    assert compared >= 7


def test_a_switch_of_a_request_wins_over_the_run_s(data_dir: Path) -> None:
    template = str(data_dir / "chat_templates" / "Qwen-Qwen3-0.6B.jinja")
    folder = str(data_dir / "tokenizer_qwen2.5")
    facts = {
        "tokenizer": folder,
        "model": folder,
        "chat_template": template,
        "template_arguments": {"enable_thinking": False},
    }
    text = ServedText(facts)
    row = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "x"}]}
    off, on = (text.tokenizer.decode(served_ids(text, row, one)) for one in ({}, {"enable_thinking": True}))
    assert off.endswith("<think>\n\n</think>\n\n") and on.endswith("<|im_start|>assistant\n")
