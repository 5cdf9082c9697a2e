"""The model's words on the HTTP side: prompts to token ids, tokens to text. Long work goes to threads."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from tunesmith.errors import TokenizerError, TunesmithError
from tunesmith.serve.errors import bad_field
from tunesmith.serve.template_words import TemplateWords, dropped_message
from tunesmith.serve.token_text import TokenTexts
from tunesmith.serve.tools import answer_format
from tunesmith.text.chat import render
from tunesmith.text.tokenizer import Tokenizer, load_tokenizer

Result = TypeVar("Result")
_THREADS = 2
# Below this many characters a hand-over to a thread costs more than the work.
_SHORT_CHARACTERS = 8192
SAMPLING_DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


class ServedText:
    """Tokenizer and template of the served model.

    Args: `facts`: the engine's `Source`: where the tokenizer is, and how the run that trained the model called its
        template.
    """

    def __init__(
        self,
        facts: Mapping[str, Any],
        *,
        chat_template: str | None = None,
        tool_parser: str = "auto",
        reasoning_parser: str = "none",
    ) -> None:
        tokenizer = load_tokenizer(Path(facts["tokenizer"]))
        template = _read(chat_template or facts.get("chat_template"))
        self.tokenizer: Tokenizer = tokenizer if template is None else tokenizer.with_chat_template(template)
        self.template_arguments: dict[str, Any] = dict(facts.get("template_arguments") or {})
        self.format = answer_format(self.tokenizer, tool_parser=tool_parser, reasoning_parser=reasoning_parser)
        self.system: str | None = facts.get("system")
        self.defaults = sampling_defaults(Path(facts["model"]))
        self.tokens = TokenTexts(self.tokenizer)
        self.words = TemplateWords(self.tokenizer, self.template_arguments)
        self.vocab_size = self.tokenizer.vocab_size
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="text")

    async def run(self, size: int, work: Callable[[], Result]) -> Result:
        """Do `work` here when it is short (`size` in characters), else in a thread."""
        if size <= _SHORT_CHARACTERS:
            return work()
        return await asyncio.get_running_loop().run_in_executor(self._pool, work)

    def with_system(self, messages: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
        """The messages, with the system message of the training data where there was one and these have none."""
        if self.system is None or any(message["role"] == "system" for message in messages):
            return messages
        return [{"role": "system", "content": self.system}, *messages]

    async def chat_prompt(
        self, messages: Sequence[Mapping[str, Any]], switches: Mapping[str, Any], *, continues: bool, param: str
    ) -> str:
        """The conversation as the model reads it.

        Args: continues: go on with the last message, which is the assistant's, instead of beginning a new one.
        Raises: ApiError (400) when the template refuses it, leaves a message out, or there is none.
        """
        given, messages = messages, self.with_system(messages)
        arguments = {**self.template_arguments, **switches}
        begins = bool(arguments.pop("add_generation_prompt", True)) and not continues
        size = sum(len(str(message.get("content") or "")) for message in messages)

        def work() -> str:
            text = render(self.tokenizer, messages, add_generation_prompt=begins, **arguments)
            if (dropped := dropped_message(given, text)) is not None:
                role = given[dropped]["role"]
                raise TokenizerError(f"this model's chat template leaves the {role}'s message {dropped} out: move it")
            return _without_end(text, messages[-1]) if continues else text

        try:
            return await self.run(size, work)
        except TunesmithError as error:
            raise bad_field(param, str(error)) from None

    async def prompt_ids(self, prompt: str, param: str) -> list[int]:
        """The ids of a rendered conversation. Raises: ApiError (400) for text that can't be tokenised."""
        try:
            return await self.run(len(prompt), lambda: self.tokenizer.encode(prompt, parse_special=True))
        except TunesmithError as error:
            raise bad_field(param, str(error)) from None

    async def encode(self, text: str, *, add_special: bool, param: str) -> list[int]:
        """The ids of a raw prompt: special tokens may be written out; the beginning-of-text token comes once.

        Raises: ApiError (400) for text that can't be tokenised.
        """

        def work() -> list[int]:
            ids = self.tokenizer.encode(text, parse_special=True, add_special=add_special)
            twice = self.tokenizer.bos_id is not None and ids[:2] == [self.tokenizer.bos_id] * 2
            return ids[1:] if twice and add_special else ids

        try:
            return await self.run(len(text), work)
        except TunesmithError as error:
            raise bad_field(param, str(error)) from None

    async def decode(self, ids: Sequence[int], *, skip_special: bool) -> str:
        """The text of ids."""
        return await self.run(len(ids) * 4, lambda: self.tokenizer.decode(ids, skip_special=skip_special))

    def check_ids(self, ids: Sequence[int], vocab_size: int, param: str) -> list[int]:
        """The ids. Raises: ApiError (400) for one that the model doesn't have."""
        wrong = next((token for token in ids if not 0 <= token < vocab_size), None)
        if wrong is not None:
            raise bad_field(param, f"token ids must be from 0 to {vocab_size - 1}, got {wrong}")
        return list(ids)


def _without_end(text: str, last: Mapping[str, Any]) -> str:
    """The conversation up to the end of the last message's text, without what closes its turn."""
    content = str(last["content"]).strip()
    at = text.rfind(content)
    if not content or at < 0:
        raise TokenizerError("continue_final_message: the chat template doesn't show the last message as it is")
    return text[: at + len(content)]


def sampling_defaults(directory: Path) -> dict[str, float]:
    """What the model's generation_config.json says of sampling; greedy where it says that nothing is sampled."""
    file = directory / "generation_config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except (OSError, ValueError):
        return {}
    if not isinstance(config, dict):
        return {}
    if config.get("do_sample") is False:
        return {"temperature": 0.0}
    return {name: config[name] for name in SAMPLING_DEFAULTS if isinstance(config.get(name), int | float)}


def _read(template: str | None) -> str | None:
    """A template's text, of its file."""
    if template is None:
        return None
    try:
        return Path(template).expanduser().read_text(encoding="utf-8")
    except OSError as error:
        raise TokenizerError(f"the chat template {template} can't be read: {error.strerror}") from None
