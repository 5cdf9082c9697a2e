"""POST /v1/responses: text in, text out; nothing is stored."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from tunesmith.serve.errors import unsupported
from tunesmith.serve.schema.common import (
    FIRST_WRONG,
    OFF,
    WHOLE,
    Body,
    JsonObjectFormat,
    Metadata,
    Name,
    Text,
    TextFormat,
    User,
)


class InputText(Body):
    """A part of a message."""

    only: ClassVar = {"annotations": (None, [])}
    type: Literal["input_text", "output_text", "text"]
    text: Text
    logprobs: list[Any] | None = Field(None, description="of an earlier answer; a message's text says it all")


class InputMessage(Body):
    """A turn of the conversation; what an earlier response's `output` held can be given back as it is."""

    only: ClassVar = {"status": (None, "completed", "incomplete", "in_progress"), "phase": OFF}
    type: Literal["message"] | None = None
    id: Annotated[str, Field(max_length=256)] | None = None
    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[InputText], FIRST_WRONG]


class ResponsesJsonSchema(Body):
    """JSON that a schema describes."""

    type: Literal["json_schema"]
    name: Name
    schema_: dict[str, Any] = Field(alias="schema")
    description: Text | None = None
    strict: bool | None = None


class TextOptions(Body):
    """What the text must look like."""

    only: ClassVar = {"verbosity": OFF}
    format: Annotated[TextFormat | JsonObjectFormat | ResponsesJsonSchema, Field(discriminator="type")] | None = None


class ResponsesRequest(Body):
    """A text or a list of messages to be answered."""

    only: ClassVar = {
        "background": (None, False), "background_options": OFF, "context_management": OFF, "conversation": OFF,
        "access_programs": OFF, "image": OFF, "max_tool_calls": OFF, "moderation": OFF, "previous_response_id": OFF,
        "prompt": OFF, "prompt_cache_options": OFF, "prompt_cache_retention": (None, "in_memory"), "reasoning": OFF,
        "service_tier": (None, "auto", "default"),
        "store": (None, False), "stream_options": OFF, "tools": (None, []), "tool_choice": (None, "none", "auto"),
        "truncation": (None, "disabled"),
    }  # fmt: skip
    model: Name | None = None
    input: Text | Annotated[list[InputMessage], Field(min_length=1, max_length=16384), FIRST_WRONG]
    instructions: Text | None = None
    max_output_tokens: Annotated[int, Field(ge=1, lt=2**31), WHOLE] | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20), WHOLE] | None = None
    include: Annotated[list[Literal["message.output_text.logprobs"]], FIRST_WRONG] | None = None
    parallel_tool_calls: bool | None = None
    text: TextOptions | None = None
    stream: bool | None = None
    metadata: Metadata | None = None
    safety_identifier: User | None = Field(None, description="the newer name of user")
    prompt_cache_key: User | None = Field(None, description="all requests share one prefix cache, whatever their keys")
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63), WHOLE] | None = None
    user: User | None = Field(None, description="shown in the server's request log")
    timeout: Annotated[float, Field(gt=0)] | None = None

    @model_validator(mode="after")
    def _is_whole(self) -> ResponsesRequest:
        if self.top_logprobs is not None and "message.output_text.logprobs" not in (self.include or []):
            raise unsupported("top_logprobs", "top_logprobs goes with include: ['message.output_text.logprobs']")
        if self.user is not None and self.safety_identifier not in (None, self.user):
            raise unsupported("safety_identifier", "safety_identifier is the newer name of user: give one of them")
        return self
