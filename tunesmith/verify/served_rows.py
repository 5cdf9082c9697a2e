"""What served = trained is tried on: the run's own rows, rendered as training rendered them and as serving does."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from tunesmith.errors import DataError, TokenizerError
from tunesmith.recipe.schema import DataSection
from tunesmith.text.chat import TRAINING_CLOCK, EncodedChat, encode_chat_texts
from tunesmith.text.encoding import EncodeSettings, render_conversation
from tunesmith.text.files import find_sources
from tunesmith.text.formats import Conversation, RowError, detect_format, to_example
from tunesmith.text.reader import read_rows
from tunesmith.text.tokenizer import Tokenizer

ROWS = 16
_LOOK_AT = 64
QUESTIONS = (
    ("What is the capital of France?", "The capital of France is Paris."),
    ("天空为什么是蓝色的？", "因为空气把蓝光散射得最多。"),
    ("Write a line of Python that prints 'hi' 😀.", "print('hi')"),
)
# (messages, switches of the template) -> the ids of the prompt that is served
Encode = Callable[[Sequence[Mapping[str, Any]], Mapping[str, Any]], list[int]]


@dataclass(frozen=True)
class TrainedRow:
    """A conversation as the run's data had it, and the ids and mask that training saw."""

    conversation: Conversation
    encoded: EncodedChat


@dataclass(frozen=True)
class TrainedRows:
    """rows, and in words where they are from. Empty where the run was trained on plain text or random tokens."""

    rows: tuple[TrainedRow, ...]
    origin: str


@dataclass(frozen=True)
class PromptCheck:
    """Prompts of answers that were compared, and how many were the same ids; in words the first that was not.

    num_straddling: rows left out because one token holds the prompt's end and the answer's beginning (training counts
        them too); no prompt can be the same then.
    dated: the template shows today's date, where training showed a fixed one; compared with the same date in both.
    """

    num_prompts: int
    num_equal: int
    first_difference: str | None = None
    num_straddling: int = 0
    dated: bool = False

    @property
    def passed(self) -> bool:
        """Whether all were the same."""
        return self.num_prompts == self.num_equal


def trained_rows(data: DataSection, tokenizer: Tokenizer) -> TrainedRows:
    """The first conversations of the run's validation files (its training files where it had none), as it encoded them.

    Where they can't be read, or are no conversations, built-in questions take their place.
    """
    entries, name = (data.validation, "validation rows") if data.validation else (data.train, "first rows")
    try:
        found = list(islice(_conversations(data, entries), ROWS))
    except (DataError, OSError):
        found = []
    own = _encoded(data, tokenizer, found)
    if own:
        return TrainedRows(own, f"the run's {name}")
    if tokenizer.chat_template is None or data.format == "text":
        return TrainedRows((), "a built-in text")
    made = [
        Conversation([{"role": "user", "content": asked}, {"role": "assistant", "content": said}])
        for asked, said in QUESTIONS
    ]
    return TrainedRows(_encoded(data, tokenizer, made), "built-in questions")


def _conversations(data: DataSection, entries: Sequence[str]) -> Iterator[Conversation]:
    if data.format in ("tokens", "preference", "text"):
        return
    for source in find_sources(entries):
        rows = [row.value for row in islice(read_rows(source, data.encoding), _LOOK_AT) if row.problem is None]
        format_name = detect_format(rows) if data.format == "auto" else data.format
        for value in rows if format_name is not None else ():
            try:
                example = to_example(value, str(format_name))
            except RowError:
                continue
            if isinstance(example, Conversation):
                yield example


def _encoded(data: DataSection, tokenizer: Tokenizer, chats: Sequence[Conversation]) -> tuple[TrainedRow, ...]:
    settings = EncodeSettings(data.max_length, data.too_long, data.train_on, data.system, data.template_arguments)
    kept, texts = [], []
    for chat in chats:
        try:
            texts.append(render_conversation(tokenizer, settings, chat)[0])
            kept.append(chat)
        except (DataError, TokenizerError):
            continue
    encoded = encode_chat_texts(tokenizer, texts, data.train_on)
    return tuple(TrainedRow(chat, one) for chat, one in zip(kept, encoded, strict=True))


def check_prompts(rows: Sequence[TrainedRow], system: str | None, tokenizer: Tokenizer, encode: Encode) -> PromptCheck:
    """Whether the prompt that is served for a row's answers is what training saw before them.

    Of answers before the last only those are compared that training has trained: templates may show earlier turns
    differently once a conversation goes on.
    """
    num = equal = 0
    first: str | None = None
    for number, row in enumerate(rows, 1):
        if row.encoded.straddling:
            continue
        for served, trained in _prompts(row, system, encode):
            num += 1
            if served == trained:
                equal += 1
            elif first is None:
                first = f"row {number}: {_difference(served, trained, tokenizer)}"
    straddling = sum(row.encoded.straddling for row in rows)
    return PromptCheck(num, equal, first, straddling, "strftime_now" in (tokenizer.chat_template or ""))


def _prompts(row: TrainedRow, system: str | None, encode: Encode) -> Iterator[tuple[list[int], list[int]]]:
    """(served, trained) ids up to the last answer, and up to those before it that are trained."""
    messages = [{k: v for k, v in message.items() if k != "weight"} for message in row.conversation.messages]
    if system is not None and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system}, *messages]
    switches: dict[str, Any] = {"now": TRAINING_CLOCK}
    if row.conversation.tools is not None:
        switches["tools"] = row.conversation.tools
    tokens, trained = row.encoded.tokens, row.encoded.trained
    starts = {at for at in range(1, len(tokens)) if trained[at] and not trained[at - 1]}
    answers = [k for k, message in enumerate(messages) if message["role"] == "assistant"]
    for k in answers:
        try:
            served = encode(messages[:k], switches)
        except DataError:
            continue
        if k == answers[-1] or len(served) in starts:
            yield served, tokens[: len(served)]


def _difference(served: list[int], trained: list[int], tokenizer: Tokenizer) -> str:
    pairs = zip(served, trained, strict=False)
    at = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(served), len(trained)))
    here, there = (tokenizer.decode(ids[max(0, at - 3) : at + 5]) for ids in (served, trained))
    return f"token {at}: served as {here!r}, trained as {there!r}"
