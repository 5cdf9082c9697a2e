"""The sandbox: what chat templates may do, and what hostile ones may not."""

from __future__ import annotations

import time
from datetime import datetime

import pytest

from tunesmith.errors import DataError, TokenizerError
from tunesmith.text.template import check_template, has_generation_blocks, render_template

MESSAGES = [{"role": "user", "content": "你好"}, {"role": "assistant", "content": "b"}]


def text_of(source: str, **variables: object) -> str:
    return render_template(source, MESSAGES, variables).text


def test_blocks_are_trimmed_as_templates_expect() -> None:
    source = "{% for m in messages %}\n  {% if true %}\n{{ m.content }}\n  {% endif %}\n{% endfor %}\n"
    assert text_of(source) == "你好\nb\n"


def test_json_keeps_chinese_and_signs() -> None:
    assert text_of("{{ {'a': '<你>'} | tojson }}") == '{"a": "<你>"}'
    assert text_of("{{ [1, 2] | tojson(indent=2) }}") == "[\n  1,\n  2\n]"


def test_clock_is_the_one_given() -> None:
    rendered = render_template("{{ strftime_now('%d %b %Y') }}", [], {}, datetime(2024, 7, 26))
    assert rendered.text == "26 Jul 2024"


def test_loop_controls_and_macros() -> None:
    assert text_of("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}") == "01"
    assert text_of("{% macro f(x) %}[{{ x }}]{% endmacro %}{{ f(1) ~ f('a') }}") == "[1][a]"


def test_a_loop_with_a_filter_is_what_jinja_makes_of_it() -> None:
    source = "{% for i in range(9) if i is odd %}{{ loop.index }}:{{ i }}/{{ loop.length }} {% else %}none{% endfor %}"
    assert text_of(source) == "1:1/4 2:3/4 3:5/4 4:7/4 "
    assert text_of(source.replace("i is odd", "i > 9")) == "none"


def test_filters_that_are_metered_do_what_jinja_s_do() -> None:
    assert text_of("{{ 'a\nb\n\nc' | indent(2) }}") == "a\n  b\n\n  c"
    assert text_of("{{ 'a\nb' | indent(2, true) }}") == "  a\n  b"
    assert text_of("{{ messages | join('|', attribute='role') }}") == "user|assistant"
    assert text_of("{{ ['a', 1] | join }}{{ 'aXbX' | replace('X', '-') }}{{ 'aXbX'.replace('X', '') }}") == "a1a-b-ab"


def test_generation_blocks_give_spans() -> None:
    source = "{% for m in messages %}<{% generation %}{{ m.content }}{% endgeneration %}>{% endfor %}"
    rendered = render_template(source, MESSAGES, {})
    assert rendered.text == "<你好><b>"
    assert [rendered.text[a:b] for a, b in rendered.spans] == ["你好", "b"]
    assert has_generation_blocks(source)
    assert not has_generation_blocks("{{ messages }}")


def test_template_that_refuses_is_a_data_error() -> None:
    with pytest.raises(DataError, match="refuses this conversation: roles"):
        text_of("{{ raise_exception('roles') }}")


def test_broken_template_names_the_line() -> None:
    with pytest.raises(TokenizerError, match="line 2"):
        check_template("a\n{% if %}")


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        # A loop whose filter lets nothing through never ticked.
        "{% for i in range(99) %}{% for j in range(99999) if j < 0 %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ 'a' * 1000000000 }}",
        "{{ 10 ** 10 ** 10 }}",
        "{{ '%1000000000d' % 1 }}",
        "{{ '{:1000000000}'.format(1) }}",
        "{{ 'a'.ljust(1000000000) }}",
        "{{ ('a' * 100000).replace('a', 'b' * 100000) }}",
        "{{ ('a' * 100000) | replace('a', 'b' * 100000) }}",
        "{{ ('a' * 100000).join('b' * 100000) }}",
        "{{ range(100000) | join('b' * 100000) }}",
        "{% set ns = namespace(x='ab') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
        "{% set ns = namespace(x='ab') %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
        "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x }}",
        "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}"
        "{{ ns.x | tojson }}",
        "{% for i in range(1000) %}{{ 'a' * 1000000 }}{% endfor %}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ range(10000000000) }}",
    ],
)
def test_hostile_template_is_stopped_soon(source: str) -> None:
    start_s = time.monotonic()
    with pytest.raises(TokenizerError, match="stopped"):
        text_of(source)
    assert time.monotonic() - start_s < 10
