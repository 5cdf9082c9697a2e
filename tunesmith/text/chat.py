"""Conversations to tokens, with an exact mask of what the model is to learn.

    rendered text   <|user|>hi<|end|><|assistant|>hello<|end|>\\n<|user|>...
    answer spans                                  ^^^^^^^^^^^^ from the generation prompt to the end of the turn

A span is either marked by the template (`{% generation %}`) or found by rendering: the prompt of a turn
(`messages[:k]` with the generation prompt) must be a prefix of the whole text, and the turn rendered alone must
agree with it until its end-of-turn token. A turn for which that does not hold is never trained.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise
from typing import Any, Literal

from tunesmith.errors import DataError, TokenizerError
from tunesmith.text.template import Rendered, has_generation_blocks, render_template
from tunesmith.text.tokenizer import Tokenizer

Message = Mapping[str, Any]
Span = tuple[int, int]
# Training renders a fixed date where a template shows today's: the same recipe gives the same tokens tomorrow.
TRAINING_CLOCK = datetime(2024, 7, 26)


@dataclass(frozen=True)
class EncodedChat:
    """Token ids of a conversation, and which of them are trained (the first never is).

    `untrained_turns`: answers that the template renders differently once the conversation goes on, which
    therefore carry no training. `straddling`: a token reaches across the start of an answer, so the prompt's
    ids at serving are not the ids seen in training.
    """

    tokens: list[int]
    trained: list[bool]
    untrained_turns: int = 0
    straddling: bool = False


@dataclass(frozen=True)
class ChatText:
    """A rendered conversation and the character spans of its answers."""

    text: str
    spans: tuple[Span, ...]
    untrained_turns: int = 0


def render(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool,
    now: datetime | None = None,
    **switches: Any,
) -> str:
    """The conversation as the model reads it.

    Args: `switches`: what the template knows besides messages, such as tools or enable_thinking; `now`: the date
        that templates show (none: today's).
    Raises: TokenizerError without a template; DataError when the template refuses the conversation.
    """
    return _rendered(tokenizer, messages, add_generation_prompt, now, switches).text


def encode_prompt(tokenizer: Tokenizer, messages: Sequence[Message], **switches: Any) -> list[int]:
    """Token ids of the conversation up to where the model is to answer."""
    return tokenizer.encode(render(tokenizer, messages, add_generation_prompt=True, **switches), parse_special=True)


def encode_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    *,
    train_on: Literal["answers", "all"] = "answers",
    **switches: Any,
) -> EncodedChat:
    """Token ids and the mask of what is trained: answers with their end-of-turn tokens, or all but the first token.

    Raises: DataError when no answer can be trained, or the template breaks the conversation.
    """
    chat = chat_text(tokenizer, messages, train_on=train_on, now=TRAINING_CLOCK, **switches)
    return encode_chat_texts(tokenizer, [chat], train_on)[0]


def chat_text(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    *,
    train_on: Literal["answers", "all"] = "answers",
    now: datetime | None = TRAINING_CLOCK,
    **switches: Any,
) -> ChatText:
    """The rendered conversation with its answers' spans (`weight: 0` on a message leaves that answer out)."""
    messages, wanted = _without_weights(messages)
    if train_on == "all":
        return ChatText(_rendered(tokenizer, messages, False, now, switches).text, ())
    answers = [k for k, message in enumerate(messages) if message["role"] == "assistant"]
    if not answers:
        raise DataError("the conversation has no assistant turn; there is nothing to train on")
    messages = messages[: answers[-1] + 1]
    full = _rendered(tokenizer, messages, False, now, switches)
    if tokenizer.chat_template is not None and has_generation_blocks(tokenizer.chat_template):
        return _marked(full, answers, wanted)
    return _compared(tokenizer, messages, answers, wanted, full.text, now, switches)


def encode_chat_texts(
    tokenizer: Tokenizer, chats: Sequence[ChatText], train_on: Literal["answers", "all"]
) -> list[EncodedChat]:
    """Tokens and masks of rendered conversations, each tokenised once as a whole."""
    encodings = tokenizer.encodings([chat.text for chat in chats], parse_special=True, offsets=train_on == "answers")
    if train_on == "all":
        return [EncodedChat(e.ids, [i > 0 for i in range(len(e.ids))]) for e in encodings]
    whole = [_masked(tokenizer, chat, e.ids, e.offsets) for chat, e in zip(chats, encodings, strict=True)]
    return [cut_before_answers(tokenizer, c, chat) if c.straddling else c for c, chat in zip(whole, chats, strict=True)]


def _rendered(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    add_generation_prompt: bool,
    now: datetime | None,
    switches: Mapping[str, Any],
) -> Rendered:
    if tokenizer.chat_template is None:
        raise TokenizerError(
            "the tokenizer has no chat template, and no end-of-sequence token to make one with; "
            "name a Jinja file: --set data.chat_template=FILE"
        )
    variables = {**tokenizer.template_variables, **switches, "add_generation_prompt": add_generation_prompt}
    return render_template(tokenizer.chat_template, messages, variables, now)


def _without_weights(messages: Sequence[Message]) -> tuple[list[Message], list[bool]]:
    wanted = [message.get("weight", 1) != 0 for message in messages]
    return [{k: v for k, v in message.items() if k != "weight"} for message in messages], wanted


def _marked(full: Rendered, answers: list[int], wanted: list[bool]) -> ChatText:
    """Spans from the template's own generation blocks: one for every assistant turn."""
    if len(full.spans) != len(answers):
        if not all(wanted[k] for k in answers):
            raise DataError("weight: 0 needs one generation block for every assistant turn in the chat template")
        return ChatText(full.text, full.spans)
    return ChatText(full.text, tuple(span for k, span in zip(answers, full.spans, strict=True) if wanted[k]))


def _compared(
    tokenizer: Tokenizer,
    messages: list[Message],
    answers: list[int],
    wanted: list[bool],
    full: str,
    now: datetime | None,
    switches: Mapping[str, Any],
) -> ChatText:
    """Spans found by rendering every turn's prompt and every turn's end."""
    spans, untrained, text = [], 0, full
    for k in answers:
        if not wanted[k]:
            continue
        try:
            prompt = _rendered(tokenizer, messages[:k], True, now, switches).text
            done = full if k == answers[-1] else _rendered(tokenizer, messages[: k + 1], False, now, switches).text
        except DataError:
            if k == answers[-1]:
                raise
            untrained += 1
            continue
        end = _turn_end(done, full, tokenizer, messages[k])
        if end is not None and len(prompt) < end and full.startswith(prompt):
            spans.append((len(prompt), end))
        elif k == answers[-1]:
            asked = _content(messages[k - 1]) if k else ""
            text = _spliced(prompt, full, asked, messages[k])
            spans = [(len(prompt), len(text))]
            untrained += len(answers) - 1 - untrained
        else:
            untrained += 1
    return ChatText(text, tuple(spans), untrained)


def _turn_end(done: str, full: str, tokenizer: Tokenizer, message: Message) -> int | None:
    """Where the turn's text ends in `full`, or None when the template renders it differently there."""
    if full.startswith(done):
        return len(done)
    common = _common_length(done, full)
    stops = [tokenizer.token_text(stop) for stop in tokenizer.stop_ids]
    end = max((done.rfind(stop, 0, common) + len(stop) for stop in stops if stop in done[:common]), default=None)
    if end is None:
        return None
    left_over = done[end:]
    for stop in stops:
        left_over = left_over.replace(stop, "")
    content = _content(message)
    return end if not left_over.strip() and content in done[:end] else None


def _spliced(prompt: str, full: str, asked: str, message: Message) -> str:
    """The prompt as it is served, followed by the answer as the template closes it.

    Some templates change what stands before an answer once it is there: they leave an empty thinking block out,
    or a system message. The model is trained on what it will be served, if all that follows the last message is
    the same, or more.
    Args: `asked`: the content of the message before the answer.
    """
    content = _content(message)
    start = full.rfind(content)
    head, answer = full[:start], full[start:]
    more = prompt.removeprefix(head) if prompt.startswith(head) else ""
    closing = prompt[prompt.rfind(asked) :] if asked and asked in prompt else ""
    if (
        not content
        or start < 0
        or more.count("<think>") > more.count("</think>")
        or not (prompt.startswith(head) or (closing and head.endswith(closing)))
    ):
        raise DataError(
            f"the chat template asks for an answer with {prompt[-40:]!r} but shows this one as {full[-60:]!r}: "
            f"training and serving would differ; name another template with data.chat_template, "
            f"or set its switches in data.template_arguments"
        )
    return prompt + answer


def _common_length(one: str, other: str) -> int:
    """Characters at the start that two texts share."""
    pairs = zip(one, other, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def _content(message: Message) -> str:
    """What must be seen of a message in the rendered text (templates trim it, and take thoughts off)."""
    content = message.get("content") or ""
    return str(content).split("</think>")[-1].strip()


def cut_before_answers(tokenizer: Tokenizer, whole: EncodedChat, chat: ChatText) -> EncodedChat:
    """The conversation cut before every answer, as serving cuts it, where a token reached across a cut.

    An answer that starts with a line break, say, would merge with the prompt's last one; the served prompt has
    no such token. Kept whole where the tokenizer writes a cut text differently (a space before every piece).
    """
    cuts = [0, *(start for start, _ in chat.spans), len(chat.text)]
    pieces = [chat.text[start:end] for start, end in pairwise(cuts)]
    encodings = tokenizer.encodings(pieces, parse_special=True)
    ids = [token for encoding in encodings for token in encoding.ids]
    if tokenizer.decode(ids) != tokenizer.decode(whole.tokens):
        return whole
    offsets = [(start + cut, end + cut) for cut, e in zip(cuts, encodings, strict=False) for start, end in e.offsets]
    return _masked(tokenizer, chat, ids, offsets)


def _masked(tokenizer: Tokenizer, chat: ChatText, ids: list[int], offsets: list[Span]) -> EncodedChat:
    """A token is trained when its characters lie in an answer, up to that answer's last end-of-turn token."""
    trained, straddling = [False] * len(ids), False
    cursor, previous_end = 0, 0
    ends = {tokenizer.end_of_turn_id} & set(ids) or set(tokenizer.stop_ids)
    for start, end in chat.spans:
        first = last_end = last = None
        while cursor < len(ids):
            # Offsets may leave out the space before a word, which is the token's too.
            token_start, token_end = min(previous_end, offsets[cursor][0]), offsets[cursor][1]
            if token_start >= end or token_end > end:
                break
            straddling |= token_start < start < token_end
            if token_start >= start and token_end > token_start:
                first = cursor if first is None else first
                last = cursor
                last_end = cursor if ids[cursor] in ends else last_end
            previous_end = max(previous_end, token_end)
            cursor += 1
        if first is not None and last is not None:
            for i in range(first, (last if last_end is None else last_end) + 1):
                trained[i] = i > 0
    return EncodedChat(ids, trained, chat.untrained_turns, straddling)
