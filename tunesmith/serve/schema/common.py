"""What the requests share: strict bodies, sampling fields, structured output, and fields whose only value is "off"."""

from __future__ import annotations

import difflib
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from tunesmith.serve.errors import unsupported

INT64 = 2**63
MAX_TEXT_CHARACTERS = 2**24


def _whole(value: Any) -> Any:
    """1.0 is an integer in JSON Schema's eyes."""
    return int(value) if type(value) is float and value.is_integer() else value


def _whole_list(values: Any) -> Any:
    """The same for a list, which may be long: nothing is done for each item of a list of integers."""
    if isinstance(values, list) and float in set(map(type, values)):
        return [_whole(value) for value in values]
    return values


def at_most(limit: int) -> BeforeValidator:
    """A mapping with more entries is refused before any of them is looked at."""

    def check(value: Any) -> Any:
        if isinstance(value, dict) and len(value) > limit:
            raise ValueError(f"{len(value)} entries; at most {limit} are allowed")
        return value

    return BeforeValidator(check)


WHOLE, WHOLE_LIST = BeforeValidator(_whole), BeforeValidator(_whole_list)
Text = Annotated[str, Field(max_length=MAX_TEXT_CHARACTERS)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
Name = Annotated[str, Field(min_length=1, max_length=256)]
# A list is refused by its first item that is wrong: a million complaints take ten seconds to write.
FIRST_WRONG = Field(fail_fast=True)
_ABSENT = object()
_NEAR_RATIO = 0.75
# Where those who send it to another route want to go.
_ROUTES = {
    "prompt": "/v1/completions",
    "messages": "/v1/chat/completions",
    "input": "/v1/responses and /v1/embeddings",
}
OFF: tuple[Any, ...] = (None,)


Metadata = Annotated[
    dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]], Field(max_length=16), at_most(16)
]
Bias = Annotated[float, Field(ge=-100, le=100)]
# Looked for after every token of an answer.
StopText = Annotated[str, Field(min_length=1, max_length=512)]
User = Annotated[str, Field(max_length=512)]


class Strict(BaseModel):
    """No conversions ("1" is no number), no NaN, no unknown fields."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())


class Body(Strict):
    """A request's body.

    `only`: fields of OpenAI's or vLLM's interface of which this server has one behaviour, with the values that ask for
    it; such a value is taken, any other is refused by name.
    """

    only: ClassVar[dict[str, tuple[Any, ...]]] = {}

    @model_validator(mode="before")
    @classmethod
    def _known_fields(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        for name, allowed in cls.only.items():
            value = data.get(name, _ABSENT)
            if value is not _ABSENT and not any(value is a or (type(value) is type(a) and value == a) for a in allowed):
                raise _custom("unsupported_value", name, _only_message(name, allowed))
        known = [field.alias or name for name, field in cls.model_fields.items()]
        for name in data:
            if name not in known and name not in cls.only:
                text = f"unknown field {_shown(name)}{_hint(str(name), known)}; every field is honoured or refused"
                raise _custom("unknown_parameter", str(name), text)
        return {name: value for name, value in data.items() if name not in cls.only}


def _hint(name: str, known: list[str]) -> str:
    """The field that was probably meant, or the route that has this one."""
    if name in _ROUTES:
        return f": it belongs to {_ROUTES[name]}"
    close = difflib.get_close_matches(name[:64], known, n=1, cutoff=_NEAR_RATIO)
    return f", did you mean '{close[0]}'?" if close else ""


def _custom(code: str, field: str, text: str) -> PydanticCustomError:
    """A complaint that keeps its place in the body; `validation` reads it."""
    return PydanticCustomError(code, "{text}", {"text": text, "field": field[:64]})


def _only_message(name: str, allowed: tuple[Any, ...]) -> str:
    values = [repr(value) for value in allowed if value is not None]
    if not values:
        return f"{name} is not supported by this server: leave it out"
    return f"{name} is not supported by this server: leave it out, or give {' or '.join(values)}"


def _shown(name: object) -> str:
    text = str(name)
    return repr(text if len(text) <= 64 else f"{text[:61]}...")


class StreamOptions(Body):
    """include_usage: a last chunk with the usage; continuous_usage_stats: usage in every chunk."""

    only: ClassVar = {"include_obfuscation": (None, False)}
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class JsonSchema(Body):
    """A schema and its name."""

    name: Annotated[str, Field(min_length=1, max_length=256)]
    description: Text | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class TextFormat(Body):
    """Any text."""

    type: Literal["text"]


class JsonObjectFormat(Body):
    """A JSON object."""

    type: Literal["json_object"]


class JsonSchemaFormat(Body):
    """JSON that a schema describes."""

    type: Literal["json_schema"]
    json_schema: JsonSchema


ResponseFormat = Annotated[TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")]


class StructuredOutputs(Body):
    """vLLM's field: exactly one of json, regex, choice, grammar, json_object."""

    only: ClassVar = {
        "structural_tag": OFF, "whitespace_pattern": OFF,
        "disable_fallback": (None, False), "disable_any_whitespace": (None, False),
        "disable_additional_properties": (None, False),
    }  # fmt: skip
    json_: dict[str, Any] | str | None = Field(None, alias="json")
    regex: str | None = None
    choice: Annotated[list[str], FIRST_WRONG] | None = None
    grammar: str | None = None
    json_object: bool | None = None


class Sampling(Body):
    """How tokens are chosen and when an answer ends; the fields of OpenAI, and vLLM's beside them."""

    only: ClassVar[dict[str, tuple[Any, ...]]] = {
        "use_beam_search": (None, False), "length_penalty": (None, 1.0, 1), "bad_words": (None, []),
        "allowed_token_ids": OFF, "spaces_between_special_tokens": (None, True), "logits_processors": OFF,
        "kv_transfer_params": OFF,
        "vllm_xargs": OFF, "guided_json": OFF, "guided_regex": OFF, "guided_choice": OFF, "guided_grammar": OFF,
        "guided_json_object": OFF, "guided_decoding_backend": OFF, "guided_whitespace_pattern": OFF,
    }  # fmt: skip
    model: Name | None = None
    n: Annotated[int, Field(ge=1, le=128), WHOLE] | None = None
    seed: Annotated[int, Field(ge=-INT64, lt=INT64), WHOLE] | None = None
    stop: StopText | Annotated[list[StopText], FIRST_WRONG] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=2**31), WHOLE] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    logit_bias: Annotated[dict[str, Bias], Field(max_length=1024), at_most(1024)] | None = None
    min_tokens: Annotated[int, Field(ge=0, lt=2**31), WHOLE] | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=1024), FIRST_WRONG, WHOLE_LIST] | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    prompt_logprobs: Annotated[int, Field(ge=0, le=20), WHOLE] | None = None
    truncate_prompt_tokens: Annotated[int, Field(ge=-1, lt=2**31), WHOLE] | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    return_tokens_as_token_ids: bool | None = None
    return_token_ids: bool | None = None
    priority: Annotated[int, Field(ge=0, le=1000), WHOLE] | None = Field(
        None, description="lower goes first; 0 is usual, and nobody can ask for more"
    )
    cache_salt: Name | None = None
    request_id: Annotated[str, Field(min_length=1, max_length=128, pattern=r"^[A-Za-z0-9._:-]+$")] | None = None
    timeout: Annotated[float, Field(gt=0)] | None = Field(None, description="seconds; as the header X-Request-Timeout")
    user: User | None = Field(None, description="shown in the server's request log")

    @model_validator(mode="after")
    def _fits_together(self) -> Sampling:
        if self.stream_options is not None and not self.stream:
            raise unsupported("stream_options", "stream_options goes with stream: true")
        if self.stream and self.prompt_logprobs is not None:
            raise unsupported("prompt_logprobs", "prompt_logprobs is not there with stream: true")
        if self.response_format is not None and self.structured_outputs is not None:
            raise unsupported("structured_outputs", "give response_format or structured_outputs, not both")
        if isinstance(self.stop, list) and len(self.stop) > 32:
            raise unsupported("stop", f"stop holds {len(self.stop)} texts; at most 32 are allowed")
        return self
