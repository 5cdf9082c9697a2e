"""What answers look like in the OpenAPI document. They are built by hand, so these models only describe."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, Field


class ErrorFields(BaseModel):
    """What went wrong. `param` names the field, `code` is for programs."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(BaseModel):
    """OpenAI's error object."""

    error: ErrorFields


class ChatAnswer(BaseModel):
    """A chat completion."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[dict[str, Any]]
    usage: dict[str, Any]


class CompletionAnswer(BaseModel):
    """A text completion."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[dict[str, Any]]
    usage: dict[str, Any]


class ResponsesAnswer(BaseModel):
    """A response."""

    id: str
    object: Literal["response"]
    created_at: int
    model: str
    status: str
    output: list[dict[str, Any]]
    usage: dict[str, Any] | None


class EmbeddingAnswer(BaseModel):
    """Vectors."""

    object: Literal["list"]
    data: list[dict[str, Any]]
    model: str
    usage: dict[str, Any]


class ModelAnswer(BaseModel):
    """A model."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    single_turns: bool = Field(
        description="it learnt from conversations of one question each: clients should send each question alone"
    )
    vocab_size: int = Field(description="token ids are from 0 to one below it")


class ModelsAnswer(BaseModel):
    """All models."""

    object: Literal["list"]
    data: list[ModelAnswer]


class TokenizeAnswer(BaseModel):
    """Token ids."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeAnswer(BaseModel):
    """A text."""

    prompt: str


class AdapterAnswer(BaseModel):
    """An adapter that was loaded or unloaded."""

    status: str
    lora_name: str


class HealthAnswer(BaseModel):
    """All is well."""

    status: Literal["ok"]


class VersionAnswer(BaseModel):
    """The version."""

    version: str
