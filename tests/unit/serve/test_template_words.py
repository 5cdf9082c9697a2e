"""What a template would drop in silence is refused by name: switches, tools, calls, names, thoughts, whole messages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from serve_fakes import MODEL, Served, error_of, in_server, served, tokenizer

from tunesmith.serve.template_words import TemplateWords, dropped_message, template_variables

ASK = {"role": "user", "content": "Hi"}
CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
CALLED = {"role": "assistant", "content": None, "tool_calls": [CALL]}
FIELDS = [("assistant", "tool_calls"), ("tool", "content"), ("assistant", "reasoning_content"), ("user", "name")]
RESULT = {"role": "tool", "content": "42", "tool_call_id": "c"}
TOOLS = [{"type": "function", "function": {"name": "f"}}]


def words(template: str) -> TemplateWords:
    return TemplateWords(tokenizer().with_chat_template(template), {})


def test_variables_are_what_is_taken_from_outside() -> None:
    text = "{% for m in messages %}{% generation %}{{ m.role }}{% endgeneration %}{% set x = 1 %}{{ x }}{% endfor %}"
    assert template_variables(text + "{{ y }}") == {"messages", "y"}
    assert template_variables("{% if z is not defined %}{% set z = none %}{% endif %}{{ z }}") == {"z"}
    assert template_variables("{% broken") == frozenset()


def test_templates_are_asked_what_they_show_of_a_message(data_dir: Path) -> None:
    shown = {}
    for file in sorted((data_dir / "chat_templates").glob("*.jinja")):
        found = words(file.read_text(encoding="utf-8"))
        fields = [
            ("assistant", "tool_calls"),
            ("tool", "content"),
            ("assistant", "reasoning_content"),
            ("user", "name"),
        ]
        shown[file.stem] = tuple(found.shows(*field) for field in fields)
    assert shown["Qwen-Qwen3-0.6B"] == (True, True, True, False)
    assert shown["Qwen-Qwen2.5-7B-Instruct"] == shown["meta-llama-Llama-3.2-3B-Instruct"] == (True, True, False, False)
    assert shown["mistralai-Mistral-Nemo-Instruct-2407"][:2] == (True, True)
    assert shown["microsoft-Phi-3.5-mini-instruct"] == (False, False, False, False)


def test_a_message_that_is_not_in_the_text_is_found() -> None:
    messages = [{"role": "system", "content": "Be  kind.\nAlways."}, ASK, {"role": "user", "content": " \n"}]
    assert dropped_message(messages, "[Hi] Be  kind.") is None
    assert dropped_message(messages, "Be  kind.") == 1 and dropped_message(messages, "Hi") == 0
    assert dropped_message([{"role": "assistant", "content": "gone"}], "") is None


REFUSED: list[tuple[str, dict[str, Any]]] = [
    ("tools", {"tools": TOOLS}),
    ("messages[1].tool_calls", {"messages": [ASK, CALLED, RESULT]}),
    ("messages[0].name", {"messages": [{**ASK, "name": "bob"}]}),
    ("messages[0].name", {"messages": [{"role": "developer", "content": "x", "name": "bob"}, ASK]}),
    ("messages[0].reasoning", {"messages": [{"role": "assistant", "content": "x", "reasoning": "hm"}, ASK]}),
    *(
        ("chat_template_kwargs", {"chat_template_kwargs": {name: 1}})
        for name in ("messages", "add_generation_prompt", "role", "content", "message", "now", "strftime_now")
    ),
]


@in_server()
async def test_what_the_built_in_template_can_t_show_is_refused_wherever_it_is_given(one: Served) -> None:
    """`messages` among the switches of /tokenize was an internal error; calls and names were dropped in silence."""
    for route in ("/v1/chat/completions", "/tokenize"):
        for param, body in REFUSED:
            assert error_of(await one.post(route, **{"messages": [ASK], **body}), 400)["param"] == param, (route, body)
    assert (await one.chat(tools=TOOLS, tool_choice="none")).status_code == 200
    result = {**RESULT, "name": "f"}
    assert error_of(await one.post("/tokenize", messages=[ASK, result]), 400)["param"] == "messages[1].name"


def test_what_a_template_shows_is_taken(data_dir: Path) -> None:
    import asyncio

    async def main() -> None:
        template = data_dir / "chat_templates" / "Qwen-Qwen3-0.6B.jinja"
        async with served(chat_template=str(template)) as one:
            turns = [ASK, {**CALLED, "reasoning_content": "hm"}, {**RESULT, "name": "f"}]
            answer = await one.post(
                "/tokenize", messages=turns, tools=TOOLS, chat_template_kwargs={"enable_thinking": False}
            )
            assert answer.status_code == 200, answer.text
            wrong = [ASK, CALLED, {**RESULT, "name": "g"}]
            assert error_of(await one.post("/tokenize", messages=wrong), 400)["param"] == "messages[2].name"

    asyncio.run(main())


def test_a_message_that_the_template_leaves_out_is_refused(tmp_path: Path) -> None:
    """Some templates keep the last system message only: with `instructions` and another one, the first was gone."""
    import asyncio

    template = tmp_path / "last.jinja"
    template.write_text(
        "{% set ns = namespace(system='') %}{% for m in messages %}{% if m.role == 'system' %}"
        "{% set ns.system = m.content %}{% endif %}{% endfor %}{{ ns.system }}"
        "{% for m in messages %}{% if m.role != 'system' %}{{ m.content }}{% endif %}{% endfor %}"
    )

    async def main() -> None:
        async with served(chat_template=str(template)) as one:
            turns = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
            assert (await one.post("/v1/responses", input=turns)).status_code == 200
            error = error_of(await one.post("/v1/responses", input=turns, instructions="Be brief."), 400)
            assert error["param"] == "input" and "system's message 0" in error["message"]

    asyncio.run(main())


def test_the_model_s_own_directory_is_what_is_tried() -> None:
    assert words(tokenizer().chat_template or "").variables == {"messages", "add_generation_prompt"}
    assert MODEL.is_dir()


@pytest.mark.parametrize("role", ["system", "user", "assistant"])
def test_names_are_taken_where_they_are_shown(role: str) -> None:
    shows = words("{% for m in messages %}{{ m.name }}: {{ m.content }}{% endfor %}").shows
    assert shows(role, "name") and not words("{% for m in messages %}{{ m.content }}{% endfor %}").shows(role, "name")
