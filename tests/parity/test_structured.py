"""The packaged model under constraint: whatever it says is valid, and nobody beside it in the batch is disturbed."""

from __future__ import annotations

import json
import random
import re
from typing import Any

import jsonschema
import pytest

from tunesmith.engine.llm import LLM
from tunesmith.engine.request import Completion, SamplingParams, StructuredSpec

WORDS = ["red", "你好", "😀🎈", 'q"u\\o\n', "naïve", "</think>", "a b"]
PROMPTS = ["What is the capital of France?", "天空是什么颜色？", "Say 😀", "Once upon a time"]


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM("builtin:tiny", device="cpu", max_num_seqs=16, max_model_len=512, debug_pages=True)


def random_schema(rng: random.Random, depth: int = 2) -> dict[str, Any]:
    kind = rng.choice(["text", "enum", "integer", "boolean", "pattern"] + ["object", "array", "any"] * (depth > 0))
    if kind == "object":
        names = rng.sample(["id", "名", "a b", "😀"], rng.randrange(1, 4))
        parts = {name: random_schema(rng, depth - 1) for name in names}
        required = [name for name in names if rng.random() < 0.7]
        return {"type": "object", "properties": parts, "required": required, "additionalProperties": False}
    if kind == "array":
        low = rng.randrange(3)
        return {"type": "array", "items": random_schema(rng, depth - 1), "minItems": low, "maxItems": low + 2}
    if kind == "any":
        return {"anyOf": [random_schema(rng, depth - 1) for _ in range(2)]}
    low = rng.randrange(-50, 50)
    return {
        "text": {"type": "string", "maxLength": rng.randrange(1, 12)},
        "enum": {"enum": rng.sample(WORDS, 3)},
        "integer": {"type": "integer", "minimum": low, "maximum": low + rng.randrange(500)},
        "boolean": {"type": "boolean"},
        "pattern": {"type": "string", "pattern": "^[一-龥]{1,4}$"},
    }[kind]


def answers(llm: LLM, specs: list[StructuredSpec], **options: Any) -> list[Completion]:
    params = [
        SamplingParams(structured=spec, seed=seed, **{"max_tokens": 256, **options}) for seed, spec in enumerate(specs)
    ]
    chats = [[{"role": "user", "content": PROMPTS[n % len(PROMPTS)]}] for n in range(len(specs))]
    return llm.chat_many(chats, params, progress=False)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_answers_under_random_schemas_are_valid_json(llm: LLM, temperature: float) -> None:
    rng = random.Random(5)
    schemas = [random_schema(rng) for _ in range(8)]
    specs = [StructuredSpec("json_schema", json.dumps(schema, ensure_ascii=False)) for schema in schemas]
    done = answers(llm, specs, temperature=temperature)
    assert {completion.finish_reason for completion in done} == {"stop"}
    for schema, completion in zip(schemas, done, strict=True):
        jsonschema.validate(json.loads(completion.text), schema)


def test_expressions_choices_and_grammars(llm: LLM) -> None:
    choices = ("你好", "yes", "yes or no", "😀")
    specs = [
        StructuredSpec("regex", r"(是|否)，[一-龥]{2,6}。"),
        StructuredSpec("regex", r"\d{3}-[A-F]{2}"),
        *[StructuredSpec("choice", choices)] * 4,
        StructuredSpec("grammar", 'start: "f(" NUM ("," NUM){0,3} ")"\nNUM: /[0-9]{1,2}/'),
    ]
    done = answers(llm, specs, temperature=1.0)
    assert all(completion.finish_reason == "stop" for completion in done)
    texts = [completion.text for completion in done]
    assert re.fullmatch(r"(是|否)，[一-龥]{2,6}。", texts[0]) and re.fullmatch(r"\d{3}-[A-F]{2}", texts[1])
    assert set(texts[2:6]) <= set(choices)
    assert re.fullmatch(r"f\(\d{1,2}(,\d{1,2}){0,3}\)", texts[6])


def test_an_object_is_an_object_or_cut_at_the_limit(llm: LLM) -> None:
    for completion in answers(llm, [StructuredSpec("json_object")] * 3, temperature=1.0, max_tokens=120):
        if completion.finish_reason == "stop":
            assert isinstance(json.loads(completion.text), dict)
        else:
            assert completion.finish_reason == "length" and completion.text.startswith("{")


def test_those_beside_a_constrained_answer_say_what_they_say_alone(llm: LLM) -> None:
    alone = llm.generate("The colour of the sky is", max_tokens=12)[0]
    specs = [StructuredSpec("regex", "a{20,30}"), None, StructuredSpec("json_schema", '{"type": 3}'), None]
    params = [SamplingParams(max_tokens=12, structured=spec) for spec in specs]
    done = llm.generate(["The colour of the sky is"] * 4, params, progress=False, raise_errors=False)
    assert done[0].text == "a" * len(done[0].text) and done[0].text
    assert done[1].token_ids == done[3].token_ids == alone.token_ids
    assert done[2].finish_reason == "error" and "JSON schema can't be used" in (done[2].error or "")
    assert llm.engine.stats().pages_used == 0


def test_an_answer_ends_with_its_grammar_even_where_ends_are_ignored(llm: LLM) -> None:
    """Greedy, seeded and streamed: the grammar's end is the answer's, with no stop token needed."""
    spec = StructuredSpec("choice", ("yes",))
    done = llm.generate("Well:", structured=spec, ignore_eos=True, max_tokens=50)[0]
    assert done.text == "yes" and done.finish_reason == "stop"
    assert "".join(llm.stream("Well:", structured=spec)) == "yes"
    unlikely = dict.fromkeys(llm.encode("yes"), -100.0)
    either = llm.generate("Well:", structured=StructuredSpec("choice", ("yes", "no")), logit_bias=unlikely)[0]
    assert either.text in ("yes", "no")
