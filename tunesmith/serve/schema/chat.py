"""POST /v1/chat/completions."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from tunesmith.serve.errors import bad_field, unsupported
from tunesmith.serve.schema.common import FIRST_WRONG, OFF, WHOLE, Body, Metadata, Name, Sampling, Strict, Text, User


class TextPart(Body):
    """A part of a message; images, sound and files are refused."""

    @model_validator(mode="before")
    @classmethod
    def _is_text(cls, data: Any) -> Any:
        kind = data.get("type") if isinstance(data, dict) else None
        if isinstance(kind, str) and kind != "text":
            text = f"parts of type {kind[:32]!r} are not supported: this server takes parts of type 'text' only"
            raise PydanticCustomError("unsupported_value", "{text}", {"text": text, "field": "type"})
        return data

    type: Literal["text"]
    text: Text


Content = Text | Annotated[list[TextPart], FIRST_WRONG]


class FunctionCall(Strict):
    """What a tool was called with; `arguments` is JSON as text."""

    name: Name
    arguments: Text


class ToolCall(Strict):
    """A call that the assistant made."""

    id: Name
    type: Literal["function"] = "function"
    function: FunctionCall


class SystemMessage(Body):
    """What the assistant is told about itself. "developer" is another word for "system"."""

    role: Literal["system", "developer"]
    content: Content
    name: Name | None = None


class UserMessage(Body):
    """What the person says."""

    role: Literal["user"]
    content: Content
    name: Name | None = None


class AssistantMessage(Body):
    """What the model said before."""

    only: ClassVar = {
        "refusal": OFF, "audio": OFF, "function_call": OFF, "annotations": (None, []),
        # LiteLLM's wrapping of our own answer's `refusal`, which it sends back with the next turn.
        "provider_specific_fields": (None, {}, {"refusal": None}),
    }  # fmt: skip
    role: Literal["assistant"]
    content: Content | None = None
    name: Name | None = None
    tool_calls: Annotated[list[ToolCall], FIRST_WRONG] | None = None
    reasoning_content: Text | None = None
    reasoning: Text | None = None

    @model_validator(mode="after")
    def _says_something(self) -> AssistantMessage:
        if self.content is None and not self.tool_calls:
            raise bad_field("messages", "an assistant's message needs content or tool_calls")
        return self


class ToolMessage(Body):
    """What a tool answered."""

    role: Literal["tool"]
    content: Content
    tool_call_id: Name
    name: Name | None = None


ChatMessage = Annotated[
    SystemMessage | UserMessage | AssistantMessage | ToolMessage, Field(discriminator="role")
]  # fmt: skip


class FunctionDefinition(Body):
    """A function that the model may call."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,128}$")]
    description: Text | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Body):
    """A tool; functions are the only kind."""

    type: Literal["function"]
    function: FunctionDefinition


class ChosenFunction(Body):
    """The name of the function that must be called."""

    name: Name


class ChosenTool(Body):
    """One tool that must be called."""

    type: Literal["function"]
    function: ChosenFunction


class ChatRequest(Sampling):
    """A conversation to be answered."""

    only: ClassVar = {
        **Sampling.only,
        "audio": OFF, "function_call": OFF, "functions": OFF, "modalities": (None, ["text"]),
        "moderation": OFF, "prediction": OFF, "prompt_cache_options": OFF,
        "prompt_cache_retention": (None, "in_memory"), "service_tier": (None, "auto", "default"),
        "store": (None, False), "verbosity": OFF, "web_search_options": OFF, "echo": (None, False),
        "chat_template": OFF, "mm_processor_kwargs": OFF, "include_reasoning": (None, True),
    }  # fmt: skip
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=16384), FIRST_WRONG]
    max_tokens: Annotated[int, Field(ge=1, lt=2**31), WHOLE] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, lt=2**31), WHOLE] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20), WHOLE] | None = None
    tools: Annotated[list[Tool], Field(max_length=128), FIRST_WRONG] | None = None
    tool_choice: Literal["none", "auto", "required"] | ChosenTool | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    add_special_tokens: bool | None = None
    documents: Annotated[list[dict[str, Any]], FIRST_WRONG] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    metadata: Metadata | None = Field(None, description="shown in the server's request log")
    safety_identifier: User | None = Field(None, description="the newer name of user")
    prompt_cache_key: User | None = Field(None, description="all requests share one prefix cache, whatever their keys")

    @model_validator(mode="after")
    def _is_whole(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise unsupported("top_logprobs", "top_logprobs goes with logprobs: true")
        both = self.max_tokens is not None and self.max_completion_tokens is not None
        if both and self.max_tokens != self.max_completion_tokens:
            raise unsupported("max_tokens", "max_tokens is the old name of max_completion_tokens: give one of them")
        if self.continue_final_message and self.messages[-1].role != "assistant":
            raise bad_field("continue_final_message", "continue_final_message needs an assistant's message as the last")
        if self.continue_final_message and self.add_generation_prompt:
            raise bad_field("continue_final_message", "continue_final_message goes without add_generation_prompt")
        if self.tool_choice not in (None, "none") and not self.tools:
            raise bad_field("tool_choice", "tool_choice goes with tools")
        if self.user is not None and self.safety_identifier not in (None, self.user):
            raise unsupported("safety_identifier", "safety_identifier is the newer name of user: give one of them")
        return self

    @property
    def answer_tokens(self) -> int | None:
        """The answer's limit, by its new name or its old one."""
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens
