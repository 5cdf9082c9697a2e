"""A request's fields to the engine's parameters, within what the context holds."""

from __future__ import annotations

import json
from typing import Any

from tunesmith.engine.request import SamplingParams, StructuredSpec
from tunesmith.errors import RequestError
from tunesmith.serve.closed_schema import check_strict, closed
from tunesmith.serve.errors import ApiError, bad_field
from tunesmith.serve.schema.common import (
    JsonObjectFormat,
    JsonSchemaFormat,
    ResponseFormat,
    Sampling,
    StructuredOutputs,
)
from tunesmith.serve.state import Server


def sampling_params(
    body: Sampling,
    server: Server,
    max_tokens: int,
    *,
    logprobs: int | None,
    prompt_logprobs: int | None = None,
    structured: StructuredSpec | None = None,
    choice: int = 0,
    skip_special_tokens: bool | None = None,
) -> SamplingParams:
    """The parameters of one answer. What isn't said comes from the model's generation_config.json, else OpenAI's.

    Args:
        choice: which of the n answers; each has a seed of its own.
        skip_special_tokens: instead of the request's own, which whoever reads the text's tags can't go by.
    Raises: ApiError (400) naming the field.
    """
    defaults = server.text.defaults if server.options.generation_config == "auto" else {}

    def value(name: str, otherwise: float) -> Any:
        given = getattr(body, name)
        return defaults.get(name, otherwise) if given is None else given

    shows = body.skip_special_tokens if skip_special_tokens is None else skip_special_tokens
    try:
        return SamplingParams(
            max_tokens=max_tokens,
            temperature=float(value("temperature", 1.0)),
            top_k=max(0, int(value("top_k", 0))),
            top_p=float(value("top_p", 1.0)),
            min_p=float(value("min_p", 0.0)),
            repetition_penalty=float(value("repetition_penalty", 1.0)),
            presence_penalty=float(body.presence_penalty or 0.0),
            frequency_penalty=float(body.frequency_penalty or 0.0),
            seed=None if body.seed is None else (body.seed + choice) % 2**63,
            stop=() if body.stop is None else (body.stop,) if isinstance(body.stop, str) else tuple(body.stop),
            stop_token_ids=tuple(body.stop_token_ids or ()),
            ignore_eos=bool(body.ignore_eos),
            min_tokens=body.min_tokens or 0,
            logit_bias=_biases(body, server),
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            skip_special_tokens=shows is not False,
            structured=structured,
        )
    except RequestError as error:
        raise bad_field(str(error).split(" ", 1)[0], str(error)) from None


def _biases(body: Sampling, server: Server) -> dict[int, float] | None:
    if not body.logit_bias:
        return None
    vocab_size = int(server.engine.facts["vocab_size"])
    biases = {}
    for token, bias in body.logit_bias.items():
        if not (token.isascii() and token.isdigit() and len(token) < 10 and int(token) < vocab_size):
            raise bad_field("logit_bias", f"logit_bias maps token ids from 0 to {vocab_size - 1}, got {token[:32]!r}")
        biases[int(token)] = float(bias)
    return biases


def fit(ids: list[int], wanted: int | None, server: Server, body: Sampling, param: str) -> tuple[list[int], int]:
    """The prompt, cut where that was asked for, and how long its answer may be.

    Raises: ApiError (400): no token, or prompt and answer together are longer than the context.
    """
    limit = server.max_model_len
    if (keep := body.truncate_prompt_tokens) is not None:
        keep = limit - (wanted or 1) if keep < 0 else keep
        ids = ids[max(0, len(ids) - keep) :]
    if not ids:
        raise bad_field(param, f"{param} has no token: give at least one")
    room = limit - len(ids)
    if room < 1 or (wanted is not None and wanted > room):
        asked = "" if wanted is None else f" and {wanted} were asked for"
        raise ApiError(
            400,
            # By its first words LiteLLM knows this error, and takes a model of a longer context where it has one.
            f"this model's maximum context length is {limit} tokens; the prompt has {len(ids)}{asked}: shorten the "
            f"prompt or lower max_tokens",
            param=param if room < 1 or wanted is None else "max_tokens",
            code="context_length_exceeded",
        )
    return ids, room if wanted is None else wanted


def structured_of(response_format: ResponseFormat | None, outputs: StructuredOutputs | None) -> StructuredSpec | None:
    """What the answer must look like. Raises: ApiError (400) unless structured_outputs says exactly one thing."""
    if isinstance(response_format, JsonObjectFormat):
        return StructuredSpec("json_object")
    if isinstance(response_format, JsonSchemaFormat):
        schema = response_format.json_schema.schema_
        if schema is None:
            raise bad_field("response_format", "response_format.json_schema.schema is missing")
        return json_spec("response_format", schema, response_format.json_schema.strict)
    if outputs is None:
        return None
    said: list[tuple[str, Any]] = [
        ("json", outputs.json_), ("regex", outputs.regex), ("choice", outputs.choice), ("grammar", outputs.grammar),
        ("json_object", outputs.json_object or None),
    ]  # fmt: skip
    given = [(name, value) for name, value in said if value is not None]
    if len(given) != 1:
        raise bad_field(
            "structured_outputs", f"structured_outputs takes exactly one of json, regex, choice, grammar, json_object; "
            f"got {', '.join(name for name, _ in given) or 'none'}"
        )  # fmt: skip
    return _spec(*given[0])


def _spec(name: str, value: Any) -> StructuredSpec:
    if name == "json":
        return (
            StructuredSpec("json_schema", value) if isinstance(value, str) else json_spec("structured_outputs", value)
        )
    if name == "json_object":
        return StructuredSpec("json_object")
    if name == "choice" and not value:
        raise bad_field("structured_outputs", "structured_outputs.choice needs at least one text")
    return StructuredSpec(name, tuple(value) if name == "choice" else value)  # type: ignore[arg-type]


def json_spec(param: str, schema: dict[str, Any], strict: bool | None = None) -> StructuredSpec:
    """A JSON schema; a strict one names all properties that an object may have.

    Raises: ApiError (400) for one that is no JSON, or that is strict and allows other properties.
    """
    try:
        if strict:
            check_strict(schema, param)
            schema = closed(schema)
        return StructuredSpec("json_schema", json.dumps(schema, allow_nan=False, separators=(",", ":")))
    except (ValueError, RecursionError) as error:
        raise bad_field(param, f"{param}: the schema can't be used: {error}") from None
