"""Tools by the models' own templates: what is detected, what is rendered, what is forced, what is read."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest

import tunesmith
from tunesmith.engine.grammar_compile import GrammarCompiler
from tunesmith.engine.grammar_text import validate_spec
from tunesmith.engine.request import StructuredSpec
from tunesmith.errors import RequestError
from tunesmith.serve.tool_parsers import ParsedAnswer, join_deltas
from tunesmith.serve.tool_sections import SYNTAXES
from tunesmith.serve.tools import (
    AnswerFormat,
    AnswerPlan,
    answer_format,
    plan_answer,
    template_messages,
    template_tools,
)
from tunesmith.text.chat import render
from tunesmith.text.formats import to_example
from tunesmith.text.tokenizer import Tokenizer, load_tokenizer

TINY = Path(tunesmith.__file__).parent / "models" / "tiny"
TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather, 天气",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"$ref": "#/$defs/city"},
                    "days": {"type": "integer", "minimum": 1, "maximum": 9},
                },
                "required": ["city"],
                "additionalProperties": False,
                "$defs": {"city": {"enum": ["北京", "Zürich", "a \"b\" 🌤"]}},
            },
        },
    },
    {"type": "function", "function": {"name": "time", "strict": True}},
]  # fmt: skip
ASK = [{"role": "user", "content": "Weather?"}]
THINKER = "{% for m in messages %}{{ m.content }}{% endfor %}{{ tools }}<tool_call>{% if think %}<think>\n{% endif %}"


@cache
def tiny() -> Tokenizer:
    return load_tokenizer(TINY)


@cache
def compiler() -> GrammarCompiler:
    return GrammarCompiler(tiny(), tiny().vocab_size, tiny().stop_ids)


def forced(plan: AnswerPlan, seed: int) -> ParsedAnswer:
    """A random answer within the plan's grammar, read by the plan's parser."""
    assert plan.structured is not None
    rng, parser, deltas = random.Random(seed), plan.parser(), []
    state = compiler().compile(plan.structured).state()
    row, ids = np.zeros(compiler().num_mask_words, dtype=np.int32), []
    while not state.is_finished and len(ids) < 2000:
        state.mask_into(row)
        allowed = np.flatnonzero(np.unpackbits(row.view(np.uint8), bitorder="little"))
        ids.append(int(rng.choice(allowed)))
        assert state.accept(ids[-1])
    assert state.is_finished
    text = tiny().decode([token for token in ids if token not in tiny().stop_ids])
    for at in range(0, len(text), 3):
        deltas += parser.feed(text[at : at + 3])
    return join_deltas(deltas + parser.finish())


def check_calls(answer: ParsedAnswer) -> None:
    for call in answer.tool_calls:
        tool = next(tool["function"] for tool in TOOLS if tool["function"]["name"] == call.name)
        schema = tool.get("parameters", {"type": "object", "maxProperties": 0})
        jsonschema.validate(json.loads(call.arguments), schema)


@pytest.mark.parametrize("syntax", list(SYNTAXES))
def test_required_calls_are_calls_that_fit_their_schemas(syntax: str) -> None:
    answers = AnswerFormat(SYNTAXES[syntax], None, has_tools=True)
    numbers, names = set(), set()
    for seed in range(12):
        answer = forced(plan_answer(answers, tiny(), "", tools=TOOLS, tool_choice="required"), seed)
        assert answer.content is None and answer.tool_calls
        check_calls(answer)
        numbers.add(len(answer.tool_calls))
        names |= {call.name for call in answer.tool_calls}
        alone = plan_answer(answers, tiny(), "", tools=TOOLS, tool_choice="required", parallel_tool_calls=False)
        assert len(forced(alone, seed).tool_calls) == 1
        chosen = {"type": "function", "function": {"name": "weather"}}
        named = forced(plan_answer(answers, tiny(), "", tools=TOOLS, tool_choice=chosen), seed)
        assert [call.name for call in named.tool_calls] == ["weather"]
        check_calls(named)
    assert names == {"weather", "time"}
    assert numbers == {1} if syntax == "llama3" else max(numbers) > 1


@pytest.mark.parametrize("syntax", list(SYNTAXES))
def test_auto_with_a_strict_tool_leaves_text_free_and_holds_calls_to_their_schemas(syntax: str) -> None:
    plan = plan_answer(AnswerFormat(SYNTAXES[syntax], None, True), tiny(), "", tools=TOOLS, tool_choice="auto")
    assert plan.structured is not None
    grammar = compiler().compile(plan.structured)

    def takes(text: str) -> bool:
        state = grammar.state()
        return all(state.accept(token) for token in tiny().encode(text)) and state.may_end

    mark = SYNTAXES[syntax].begin
    assert takes("It is sunny. 你好") and takes("")
    assert not takes(f"Hm. {mark}nonsense") or syntax == "llama3"
    calls = {
        "hermes": '<tool_call>\n{"name": "time", "arguments": {}}\n</tool_call>',
        "llama3": '{"name": "time", "parameters": {}}',
        "mistral": '[TOOL_CALLS][{"name": "time", "arguments": {}}]',
        "mistral-args": "[TOOL_CALLS]time[ARGS]{}",
        "deepseek": "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>time\n```json\n{}\n```"
        "<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
    }
    assert takes(calls[syntax])
    assert not takes(calls[syntax].replace("{}", '{"zone": 1}'))


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "open"}}])
def test_a_forced_call_has_the_keys_that_its_schema_names_and_no_others(choice: Any) -> None:
    """Without additionalProperties: false the model could add keys of its own, at every depth."""
    at = {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]}
    schema = {"type": "object", "properties": {"at": at, "tags": {"type": "object", "additionalProperties": {}}}}

    def takes(parameters: dict[str, Any], arguments: str) -> bool:
        tool = {"type": "function", "function": {"name": "open", "parameters": parameters}}
        answers = AnswerFormat(SYNTAXES["hermes"], None, has_tools=True)
        plan = plan_answer(answers, tiny(), "", tools=[tool], tool_choice=choice)
        assert plan.structured is not None
        state = compiler().compile(plan.structured).state()
        text = f'<tool_call>\n{{"name": "open", "arguments": {arguments}}}\n</tool_call>'
        return all(state.accept(token) for token in tiny().encode(text)) and state.may_end

    assert takes(schema, '{"at": {"x": 1}, "tags": {"any": 1}}')
    assert not takes(schema, '{"at": {"x": 1}, "more": 1}') and not takes(schema, '{"at": {"x": 1, "y": 2}}')
    assert takes({**schema, "additionalProperties": True}, '{"at": {"x": 1}, "more": 1}')
    strict = {"name": "open", "parameters": {**schema, "additionalProperties": True}, "strict": True}
    with pytest.raises(RequestError, match="additionalProperties can only be false"):
        tool = {"type": "function", "function": strict}
        plan_answer(AnswerFormat(SYNTAXES["hermes"], None, True), tiny(), "", tools=[tool], tool_choice=choice)


def test_auto_with_a_response_format_is_a_call_or_the_format() -> None:
    answers = AnswerFormat(SYNTAXES["hermes"], None, True)
    plan = plan_answer(answers, tiny(), "", tools=TOOLS, structured=StructuredSpec("choice", ("yes", "no")))
    seen = set()
    for seed in range(16):
        answer = forced(plan, seed)
        check_calls(answer)
        seen.add(bool(answer.tool_calls))
        assert answer.tool_calls or answer.content in ("yes", "no")
    assert seen == {True, False}


def test_a_forced_call_may_follow_a_thought() -> None:
    tokenizer = tiny().with_chat_template(THINKER)
    answers = answer_format(tokenizer)
    assert answers.tools is not None and answers.reasoning is not None and answers.has_tools
    for think, state in ((True, "open"), (False, "free")):
        prompt = render(tokenizer, ASK, add_generation_prompt=True, tools=TOOLS, think=think)
        plan = plan_answer(answers, tokenizer, prompt, tools=TOOLS, tool_choice="required", parallel_tool_calls=False)
        assert plan.in_thought is (state == "open")
        parser = plan.parser()
        deltas = parser.feed(("" if think else "<think>") + "\nwell\n</think>\n\n<tool_call>\n")
        deltas += parser.feed('{"name": "time", "arguments": {}}\n</tool_call>') + parser.finish()
        answer = join_deltas(deltas)
        assert (answer.reasoning, answer.content, answer.tool_calls[0].name) == ("well", None, "time")
        assert plan.finish_reason(parser, "stop") == "tool_calls" and plan.finish_reason(parser, "length") == "length"
    closed = plan_answer(answers, tokenizer, "hi<think>\n\n</think>\n\n", tools=TOOLS, tool_choice="required")
    assert closed.reasoning is None and forced(closed, 3).tool_calls
    free = plan_answer(answers, tokenizer, "hi", structured=StructuredSpec("choice", ("yes",)))
    assert free.structured is not None and "thought" in str(free.structured.value)


def test_templates_say_how_their_models_answer(data_dir: Path) -> None:
    found = {}
    for file in sorted((data_dir / "chat_templates").glob("*.jinja")):
        answers = answer_format(tiny().with_chat_template(file.read_text(encoding="utf-8")))
        found[file.stem] = (answers.tools and answers.tools.name, answers.reasoning and "think", answers.has_tools)
    assert found == {
        "Qwen-Qwen2.5-7B-Instruct": ("hermes", None, True),
        "Qwen-Qwen3-0.6B": ("hermes", "think", True),
        "deepseek-ai-DeepSeek-R1-Distill-Qwen-32B": ("deepseek", "think", False),
        "google-gemma-2-2b-it": (None, None, False),
        "meta-llama-Llama-3.1-8B-Instruct": ("llama3", None, True),
        "meta-llama-Llama-3.2-3B-Instruct": ("llama3", None, True),
        "microsoft-Phi-3.5-mini-instruct": (None, None, False),
        "mistralai-Mistral-Nemo-Instruct-2407": ("mistral", None, True),
    }


def test_a_parser_can_be_named_or_turned_off() -> None:
    assert answer_format(tiny(), tool_parser="mistral").tools == SYNTAXES["mistral"]
    tokenizer = tiny().with_chat_template(THINKER)
    off = answer_format(tokenizer, tool_parser="none", reasoning_parser="none")
    assert off.tools is None and off.reasoning is None
    with pytest.raises(RequestError, match="did you mean 'hermes'"):
        answer_format(tiny(), tool_parser="herms")


@pytest.mark.parametrize("name", ["Qwen-Qwen2.5-7B-Instruct", "Qwen-Qwen3-0.6B", "meta-llama-Llama-3.2-3B-Instruct"])
def test_what_the_template_writes_for_a_call_is_what_is_forced_and_read(data_dir: Path, name: str) -> None:
    """A call in the history, an answer of the model and the grammar have one form: trained, served and forced agree."""
    template = (data_dir / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")
    tokenizer = tiny().with_chat_template(template)
    answers = answer_format(tokenizer)
    calls = [{"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "北京"}'}}]
    history = template_messages([*ASK, {"role": "assistant", "content": None, "tool_calls": calls}], tokenizer)
    tools = template_tools(TOOLS, "auto")
    with_prompt = {"tools": tools, "enable_thinking": False}
    prompt = render(tokenizer, history[:1], add_generation_prompt=True, **with_prompt)
    assert all(tool["function"]["name"] in prompt for tool in TOOLS) and "strict" not in prompt
    whole = render(tokenizer, history, add_generation_prompt=False, **with_prompt)
    answer = whole[whole.rindex("weather") - 60 :]
    answer = answer[answer.index("<tool_call>" if answers.tools is SYNTAXES["hermes"] else '{"name"') :]
    answer = answer.split("<|im_end|>")[0].split("<|eot_id|>")[0]
    plan = plan_answer(answers, tokenizer, prompt, tools=TOOLS, tool_choice="required")
    assert plan.structured is not None
    state = compiler().compile(plan.structured).state()
    assert all(state.accept(token) for token in tiny().encode(answer)) and state.may_end
    parser = plan.parser()
    read = join_deltas(parser.feed(answer) + parser.finish())
    assert [(call.name, json.loads(call.arguments)) for call in read.tool_calls] == [("weather", {"city": "北京"})]


def test_messages_are_what_training_reads_of_the_same_row() -> None:
    row = {
        "messages": [
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "你"}, {"type": "text", "text": "好"}]},
            {
                "role": "assistant",
                "content": None,
                "reasoning_content": "Hm",
                "tool_calls": [{"id": "a", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}],
            },
            {"role": "tool", "content": "[]", "tool_call_id": "a"},
            {"role": "assistant", "content": "Done"},
        ]
    }
    example = to_example(row, "messages")
    assert template_messages(row["messages"], tiny()) == list(example.messages)


def test_control_tokens_of_a_syntax_reach_the_parser_and_the_grammar(make_special: Callable[..., Tokenizer]) -> None:
    tokenizer = make_special("[TOOL_CALLS]")
    answers = AnswerFormat(SYNTAXES["mistral"], None, has_tools=True)
    plan = plan_answer(answers, tokenizer, "", tools=TOOLS, tool_choice="required")
    assert not plan.skip_special_tokens and plan.structured is not None
    assert f"<[{tokenizer.token_id('[TOOL_CALLS]')}]>" in str(plan.structured.value)
    made = GrammarCompiler(tokenizer, tokenizer.vocab_size, tokenizer.stop_ids)
    state = made.compile(plan.structured).state()
    text = '[TOOL_CALLS][{"name": "time", "arguments": {}}]'
    assert all(state.accept(token) for token in tokenizer.encode(text, parse_special=True)) and state.may_end
    made.close()
    assert plan_answer(answers, tokenizer, "").skip_special_tokens


@pytest.fixture
def make_special(tmp_path: Path) -> Callable[..., Tokenizer]:
    def make(*texts: str) -> Tokenizer:
        import tokenizers

        backend = tokenizers.Tokenizer.from_file(str(TINY / "tokenizer.json"))
        backend.add_special_tokens(list(texts))
        backend.save(str(tmp_path / "tokenizer.json"))
        return load_tokenizer(tmp_path)

    return make


def test_tools_that_can_t_be_used_are_refused() -> None:
    without = AnswerFormat(SYNTAXES["hermes"], None, has_tools=False)
    with pytest.raises(RequestError, match="shows none"):
        plan_answer(without, tiny(), "", tools=TOOLS)
    with pytest.raises(RequestError, match="--tool-call-parser"):
        plan_answer(AnswerFormat(None, None, has_tools=True), tiny(), "", tools=TOOLS)
    chosen = {"type": "function", "function": {"name": "wether"}}
    with pytest.raises(RequestError, match="did you mean 'weather'"):
        plan_answer(AnswerFormat(SYNTAXES["hermes"], None, True), tiny(), "", tools=TOOLS, tool_choice=chosen)
    with pytest.raises(RequestError, match="JSON object"):
        template_messages(
            [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[1]"}}]}], tiny()
        )
    none = plan_answer(without, tiny(), "", tools=TOOLS, tool_choice="none")
    assert none.tools is None and none.structured is None and template_tools(TOOLS, "none") is None


def test_a_strict_tool_s_unknown_keyword_is_refused_and_another_s_is_not() -> None:
    for strict in (True, False):
        odd = {"type": "object", "properties": {"a": {"type": "string", "not": {"const": "x"}}}, "required": ["a"]}
        tool = {"type": "function", "function": {"name": "odd", "parameters": odd, "strict": strict}}
        plan = plan_answer(
            AnswerFormat(SYNTAXES["hermes"], None, True), tiny(), "", tools=[tool], tool_choice="required"
        )
        assert plan.structured is not None
        if strict:
            with pytest.raises(RequestError, match="not"):
                validate_spec(plan.structured)
        else:
            assert validate_spec(plan.structured)
