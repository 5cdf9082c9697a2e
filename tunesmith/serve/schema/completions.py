"""POST /v1/completions."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field, model_validator

from tunesmith.serve.errors import unsupported
from tunesmith.serve.schema.common import FIRST_WRONG, OFF, WHOLE, WHOLE_LIST, Sampling, Text, TokenId

Ids = Annotated[list[TokenId], Field(min_length=1), FIRST_WRONG, WHOLE_LIST]
Prompt = Annotated[Text, Field(min_length=1)]
Prompts = (
    Prompt | Ids | Annotated[list[Prompt], Field(min_length=1, max_length=2048), FIRST_WRONG]
    | Annotated[list[Ids], Field(min_length=1, max_length=2048), FIRST_WRONG]
)  # fmt: skip


class CompletionRequest(Sampling):
    """Texts, or lists of token ids, to be continued."""

    only: ClassVar = {**Sampling.only, "suffix": OFF, "prompt_embeds": OFF}
    prompt: Prompts
    max_tokens: Annotated[int, Field(ge=0, lt=2**31), WHOLE] | None = None
    logprobs: Annotated[int, Field(ge=0, le=20), WHOLE] | None = None
    echo: bool | None = None
    best_of: Annotated[int, Field(ge=1, le=128), WHOLE] | None = None
    add_special_tokens: bool | None = None

    @model_validator(mode="after")
    def _is_whole(self) -> CompletionRequest:
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise unsupported("best_of", f"best_of must equal n ({self.n or 1}): every answer that is made is returned")
        if self.echo and self.stream and self.logprobs is not None:
            raise unsupported("logprobs", "logprobs of an echoed prompt are not there with stream: true")
        if self.max_tokens == 0 and not self.echo:
            raise unsupported("max_tokens", "max_tokens: 0 goes with echo: true")
        return self

    def prompts(self) -> list[str | list[int]]:
        """The prompts one by one."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return list(self.prompt)
