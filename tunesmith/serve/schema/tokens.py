"""POST /tokenize and /detokenize, as vLLM has them."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, model_validator

from tunesmith.serve.errors import bad_field
from tunesmith.serve.schema.chat import ChatMessage, Tool
from tunesmith.serve.schema.common import FIRST_WRONG, WHOLE_LIST, Body, Name, Text, TokenId


class TokenizeRequest(Body):
    """A text, or a conversation."""

    model: Name | None = None
    prompt: Text | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=16384), FIRST_WRONG] | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: Annotated[list[Tool], Field(max_length=128), FIRST_WRONG] | None = None

    @model_validator(mode="after")
    def _is_one(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise bad_field("prompt", "give prompt or messages")
        if self.prompt is not None:
            for name in ("add_generation_prompt", "continue_final_message", "chat_template_kwargs", "tools"):
                if getattr(self, name) is not None:
                    raise bad_field(name, f"{name} goes with messages")
        elif self.continue_final_message and self.messages and self.messages[-1].role != "assistant":
            raise bad_field("continue_final_message", "continue_final_message needs an assistant's message as the last")
        return self


class DetokenizeRequest(Body):
    """Token ids."""

    model: Name | None = None
    tokens: Annotated[list[TokenId], Field(max_length=2**20), FIRST_WRONG, WHOLE_LIST]
