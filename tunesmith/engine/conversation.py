"""A conversation with history: turns in, streamed answers out, the oldest turns dropped when the context is full."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

from tunesmith.engine.request import DEFAULT_MAX_TOKENS, Completion, SamplingParams
from tunesmith.errors import RequestError

if TYPE_CHECKING:  # a conversation with a server loads no model, and imports nothing of one
    from tunesmith.engine.llm import LLM
    from tunesmith.engine.stream import TextStream

Mode = Literal["chat", "complete"]
Turn = dict[str, str]


@dataclass
class Conversation:
    """What was said so far with one model.

    mode: "chat" renders the template over all turns; "complete" goes on from the last text alone, which is all that
    can be asked of a base model.
    history: whether an answer sees the turns before its question; all turns are kept either way.
    num_asked: questions so far; with a seed each has one of its own, the seed plus this.
    """

    llm: LLM
    params: SamplingParams = field(default_factory=SamplingParams)
    system: str | None = None
    mode: Mode = "chat"
    history: bool = True
    turns: list[Turn] = field(default_factory=list)
    num_dropped: int = 0
    num_asked: int = 0
    last: Completion | None = None

    def messages(self) -> list[Turn]:
        """The system message, if there is one, and all turns."""
        head = [{"role": "system", "content": self.system}] if self.system else []
        return [*head, *self.turns]

    def asked(self) -> list[Turn]:
        """What the model reads for the last question: all messages, or without history only those that it needs."""
        messages = self.messages()
        return messages if self.history else [*messages[: len(messages) - len(self.turns)], *self.turns[-1:]]

    def rows(self) -> list[list[Turn]]:
        """The conversation as training rows: one, or without history one for each question."""
        messages = self.messages()
        if self.history or not self.turns:
            return [messages]
        head = messages[: len(messages) - len(self.turns)]
        return [[*head, *self.turns[at : at + 2]] for at in range(0, len(self.turns), 2)]

    def say(self, text: str) -> Answer:
        """The answer to `text`, to be iterated. `num_dropped` tells how many old turns had to go for it.

        Raises: RequestError when not even `text` alone leaves room for an answer.
        """
        if self.mode == "complete":
            stream = self.llm.stream(text, self._params(self.llm.encode(text)))
            self.num_asked += 1
            return Answer(self, stream, keeps=False)
        self.turns.append({"role": "user", "content": text})
        try:
            ids = self._fit()
            stream = self.llm.stream_chat(self.asked(), self._params(ids))
        except BaseException:
            self.turns.pop()
            raise
        self.num_asked += 1
        return Answer(self, stream, keeps=True)

    def _fit(self) -> list[int]:
        """The prompt's ids, after dropping the oldest turns until an answer has room."""
        self.num_dropped = 0
        kept = list(self.turns)
        limit = self.llm.max_model_len
        room = min(self.params.max_tokens or DEFAULT_MAX_TOKENS, limit // 4)
        ids = self.llm.encode_messages(self.asked())
        while self.history and len(ids) + room > limit and len(self.turns) > 1:
            # A question goes with its answer: what is left begins with the user again.
            del self.turns[: 2 if len(self.turns) > 2 else 1]
            ids = self.llm.encode_messages(self.asked())
        if len(ids) >= limit:
            self.turns[:] = kept
            raise RequestError(
                f"the message has {len(ids)} tokens with its system message and the context holds {limit}: "
                f"shorten it to leave room for an answer"
            )
        self.num_dropped = len(kept) - len(self.turns)
        return ids

    def _params(self, ids: list[int]) -> SamplingParams:
        """The answer's limit, cut to what the context has left, and its seed."""
        room = self.llm.max_model_len - len(ids)
        wanted = self.params.max_tokens or DEFAULT_MAX_TOKENS
        seed = None if self.params.seed is None else (self.params.seed + self.num_asked) % 2**63
        return replace(self.params, max_tokens=max(1, min(wanted, room)), seed=seed)

    def reset(self) -> None:
        """Forget the turns; the system message stays."""
        self.turns.clear()
        self.last = None


class Answer(Iterator[str]):
    """Pieces of an answer. However it ends, what was said of it enters the history."""

    def __init__(self, conversation: Conversation, stream: TextStream, keeps: bool) -> None:
        self.conversation = conversation
        self.stream = stream
        self.keeps = keeps
        self.text = ""
        self._recorded = False

    def __next__(self) -> str:
        try:
            piece = next(self.stream)
        except BaseException:
            self.close()
            raise
        self.text += piece
        return piece

    def close(self) -> None:
        """End the answer here, if it has not ended, and record it."""
        self.stream.close()
        if self._recorded:
            return
        self._recorded = True
        self.conversation.last = self.stream.completion
        if self.keeps:
            self.conversation.turns.append({"role": "assistant", "content": self.text})
