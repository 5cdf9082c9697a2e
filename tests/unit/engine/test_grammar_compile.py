"""Grammars over real vocabularies: what a mask allows always leads to a valid answer, and to nothing else."""

from __future__ import annotations

import json
import random
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import tunesmith
from tunesmith.engine.grammar_compile import GrammarCompiler, MatcherState, RequestGrammars, fill_masks
from tunesmith.engine.grammar_library import GrammarLimits
from tunesmith.engine.grammar_text import after_thoughts, validate_spec
from tunesmith.engine.request import StructuredSpec
from tunesmith.engine.structured import MAX_DEPTH, draft_masks
from tunesmith.errors import RequestError
from tunesmith.text.tokenizer import load_tokenizer

TINY = Path(tunesmith.__file__).parent / "models" / "tiny"


@pytest.fixture(scope="module")
def compiler() -> Iterator[GrammarCompiler]:
    """Over builtin:tiny's vocabulary; its model has as many logits."""
    tokenizer = load_tokenizer(TINY)
    made = GrammarCompiler(tokenizer, tokenizer.vocab_size, tokenizer.stop_ids)
    yield made
    made.close()


def row_of(compiler: GrammarCompiler, state: MatcherState) -> np.ndarray:
    """The mask as bools over the vocabulary."""
    row = np.zeros(compiler.num_mask_words, dtype=np.int32)
    state.mask_into(row)
    return np.unpackbits(row.view(np.uint8), bitorder="little")[: compiler.vocab_size].astype(bool)


def walk(compiler: GrammarCompiler, spec: StructuredSpec, seed: int, max_tokens: int = 400) -> tuple[str, bool]:
    """The text of a random walk through what the masks allow, and whether it came to its end."""
    rng, ids = random.Random(seed), []
    state = compiler.compile(spec).state()
    for _ in range(max_tokens):
        allowed = np.flatnonzero(row_of(compiler, state))
        assert len(allowed), "a dead end"
        token = int(rng.choice(allowed))
        assert state.accept(token)
        if token in compiler.stop_ids:
            assert state.is_finished
            break
        ids.append(token)
        if state.is_finished:
            break
    return compiler.tokenizer.decode(ids), state.is_finished


TEXTS = st.sampled_from(["a", "", "你好", "😀", "naïve", 'q"u\\o\n', "</script>", "é" * 3])
LEAVES = st.one_of(
    st.builds(lambda n: {"type": "string", "maxLength": n}, st.integers(0, 8)),
    st.builds(
        lambda v: {"enum": v}, st.lists(st.one_of(TEXTS, st.integers(-5, 5), st.none()), min_size=1, unique=True)
    ),
    st.builds(lambda v: {"const": v}, TEXTS),
    st.builds(
        lambda a, b: {"type": "integer", "minimum": a, "maximum": a + b}, st.integers(-900, 900), st.integers(0, 99)
    ),
    st.sampled_from([{"type": "boolean"}, {"type": "null"}, {"type": "string", "format": "date"}]),
    st.sampled_from([{"type": "string", "pattern": "^[一-龥]{1,3}$"}, {"type": "string", "pattern": "^(ab|c){2}\\d$"}]),
)


def _object(parts: dict[str, Any], required: set[str]) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": parts,
        "required": sorted(required & set(parts)),
        "additionalProperties": False,
    }


def _nested(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    names = st.sampled_from(["id", "名", "a b", "😀"])
    return st.one_of(
        st.builds(_object, st.dictionaries(names, inner, max_size=3), st.sets(names, max_size=3)),
        st.builds(
            lambda item, low, more: {"type": "array", "items": item, "minItems": low, "maxItems": low + more},
            inner, st.integers(0, 2), st.integers(0, 2),
        ),
        st.builds(lambda options: {"anyOf": options}, st.lists(inner, min_size=1, max_size=3)),
    )  # fmt: skip


SCHEMAS = st.recursive(LEAVES, _nested, max_leaves=5)


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(SCHEMAS, st.integers(0, 2**30))
def test_whatever_a_schema_s_masks_allow_validates(compiler: GrammarCompiler, schema: Any, seed: int) -> None:
    text, ended = walk(compiler, StructuredSpec("json_schema", json.dumps(schema)), seed)
    assert ended
    jsonschema.validate(json.loads(text), schema, format_checker=jsonschema.FormatChecker())


@pytest.mark.parametrize(
    "pattern", [r"[a-c]{2,5}\d", r"(是|否)(，[一-龥]{1,4})?。", r"^\w{1,6}@ex/am\.org$", "😀{1,3}|x", r"a.c"]
)
def test_an_expression_matches_the_whole_answer(compiler: GrammarCompiler, pattern: str) -> None:
    for seed in range(8):
        text, ended = walk(compiler, StructuredSpec("regex", pattern), seed)
        assert ended and re.fullmatch(pattern, text)


def test_a_choice_gives_exactly_one_of_the_choices(compiler: GrammarCompiler) -> None:
    choices = ("yes", "yes or no", "no", 'q"u\\o\n\te', "你好", "😀", "a/b", "<|im_end|>", "\x07")
    seen = set()
    for seed in range(60):
        text, ended = walk(compiler, StructuredSpec("choice", choices), seed)
        assert ended and text in choices
        seen.add(text)
    assert len(seen) >= 6


def test_an_object_is_json_and_never_endless_blanks(compiler: GrammarCompiler) -> None:
    tokenizer = compiler.tokenizer

    def ended(text: str) -> bool:
        state = compiler.compile(StructuredSpec("json_object")).state()
        taken = all(state.accept(token) for token in tokenizer.encode(text))
        return taken and state.is_finished and state.may_end

    assert ended('{"a": [1, {"深": "\\n😀"}],"b":null}')
    assert not any(map(ended, ('{"a":  1}', '{"a" : 1}', '{ "a": 1}', '{"a": 1,\n "b": 2}', '{"a": 1 }')))


@pytest.mark.parametrize(
    "grammar",
    [
        'start: "fn " NAME "(" NUM ("," NUM)* ")"\nNAME: /[a-z]{1,3}/\nNUM: /[0-9]/',
        'root ::= "fn " [a-z] "(" [0-9] ")"',
    ],
    ids=["lark", "gbnf"],
)
def test_a_grammar_in_either_notation(compiler: GrammarCompiler, grammar: str) -> None:
    for seed in range(5):
        text, ended = walk(compiler, StructuredSpec("grammar", grammar), seed)
        assert ended and re.fullmatch(r"fn [a-z]{1,3}\([0-9](,[0-9])*\)", text)


def test_stop_tokens_come_only_where_the_answer_may_end(compiler: GrammarCompiler) -> None:
    state = compiler.compile(StructuredSpec("regex", "ab?")).state()
    stops = list(compiler.stop_ids)
    assert len(stops) == 2 and not row_of(compiler, state)[stops].any()
    assert not state.accept(stops[0]) and not state.is_finished
    assert state.accept(compiler.tokenizer.encode("a")[0])
    assert row_of(compiler, state)[stops].all() and state.may_end and not state.is_finished
    assert state.accept(stops[1]) and state.is_finished
    assert np.flatnonzero(row_of(compiler, state)).tolist() == stops
    assert not state.accept(stops[0])


def test_tokens_that_no_grammar_allows_and_ids_beyond_the_tokenizer(compiler: GrammarCompiler) -> None:
    """A model's embedding may be longer than its tokenizer; control tokens are not text."""
    tokenizer = compiler.tokenizer
    wide = GrammarCompiler(tokenizer, tokenizer.vocab_size + 70, tokenizer.stop_ids)
    state = wide.compile(StructuredSpec("regex", "(?s:.)*")).state()
    row = row_of(wide, state)
    assert row.sum() > 3900 and not row[tokenizer.vocab_size :].any()
    assert set(np.flatnonzero(row)) & {t for t in range(tokenizer.vocab_size) if tokenizer.is_special(t)} == set(
        wide.stop_ids
    )
    wide.close()


@settings(max_examples=15, deadline=None, derandomize=True)
@given(st.integers(0, 2**30), st.integers(1, 12))
def test_a_rollback_is_as_if_nothing_had_happened(compiler: GrammarCompiler, seed: int, depth: int) -> None:
    rng = random.Random(seed)
    state = compiler.compile(StructuredSpec("regex", "(ab?|你好|😀){1,9}")).state()

    def go_on() -> bool:
        return not state.is_finished and state.accept(int(rng.choice(np.flatnonzero(row_of(compiler, state)))))

    for _ in range(rng.randrange(4)):
        go_on()
    before = row_of(compiler, state), state.is_finished, state.may_end
    state.rollback(sum(go_on() for _ in range(depth)))
    after = row_of(compiler, state), state.is_finished, state.may_end
    assert (before[0] == after[0]).all() and before[1:] == after[1:]


def test_rows_of_a_draft_say_what_may_follow_each_of_its_tokens(compiler: GrammarCompiler) -> None:
    state = compiler.compile(StructuredSpec("choice", ("abc abd",))).state()
    draft = [*compiler.tokenizer.encode("abc abd"), compiler.stop_ids[0]]
    rows = np.zeros((len(draft) + 1, compiler.num_mask_words), dtype=np.int32)
    assert draft_masks(state, draft, rows) == len(draft)
    wrong = [draft[0], *compiler.tokenizer.encode("zz")]
    assert draft_masks(state, wrong, rows) == 1
    for token in draft:
        expected = np.zeros(compiler.num_mask_words, dtype=np.int32)
        state.mask_into(expected)
        assert state.accept(token)
    assert state.is_finished
    assert compiler.compile(StructuredSpec("choice", ("abc",))).state().forced() == compiler.tokenizer.encode("abc")


def test_many_rows_are_filled_as_one_by_one_and_fail_alone(compiler: GrammarCompiler) -> None:
    class Broken:
        is_finished = False

        def mask_into(self, bitmask_row: np.ndarray) -> None:
            raise RequestError("broken")

        def accept(self, token: int) -> bool:
            return False

    specs = [StructuredSpec("regex", f"[a-{c}]+") for c in "bcdefg"] + [StructuredSpec("json_object")]
    states = [compiler.compile(spec).state() for spec in specs]
    states[1].accept(compiler.tokenizer.encode("a")[0])
    states[2].accept(compiler.tokenizer.encode("a")[0])
    assert states[2].accept(compiler.stop_ids[0])
    masks = np.zeros((len(states) + 2, compiler.num_mask_words), dtype=np.int32)
    rows = [(number + 1, state) for number, state in enumerate(states)]
    failed = fill_masks([*rows, (0, Broken())], masks)
    assert [(row, str(error)) for row, error in failed] == [(0, "broken")] and (masks[0] == -1).all()
    for row, state in rows:
        alone = np.zeros(compiler.num_mask_words, dtype=np.int32)
        state.mask_into(alone)
        assert (masks[row] == alone).all()
    assert not masks[-1].any()


def test_an_answer_follows_a_thought(compiler: GrammarCompiler) -> None:
    def takes(spec: StructuredSpec, text: str) -> bool:
        state = compiler.compile(spec).state()
        return all(state.accept(token) for token in compiler.tokenizer.encode(text)) and state.may_end

    for spec in (StructuredSpec("choice", ("yes", "no")), StructuredSpec("regex", "yes|no")):
        opened = after_thoughts(spec, '"<think>"', '"</think>"', is_open=True)
        free = after_thoughts(spec, '"<think>"', '"</think>"', is_open=False)
        assert takes(opened, '\n{ "no" 😀</think>\n\nyes') and takes(opened, "</think>no")
        assert not takes(opened, "yes") and not takes(opened, "hm</think>maybe")
        assert takes(free, "yes") and takes(free, "<think>\nno</think>\n\nyes")
        assert not takes(free, "no</think>yes") and not takes(free, "<think>yes")
    nested = StructuredSpec("json_schema", '{"type": "object", "maxProperties": 0}')
    assert takes(after_thoughts(nested, '"<think>"', '"</think>"', is_open=True), "hm</think>{}")
    mark = next(t for t in range(9) if compiler.tokenizer.is_special(t) and t not in compiler.stop_ids)
    control = f"<[{mark}]>"
    special = after_thoughts(StructuredSpec("choice", ("yes",)), control, control, is_open=True)
    state = compiler.compile(special).state()
    ids = [*compiler.tokenizer.encode("yes"), mark, *compiler.tokenizer.encode("yes")]
    assert all(state.accept(token) for token in ids) and state.may_end


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (StructuredSpec("json_schema", "{"), "no JSON"),
        (StructuredSpec("json_schema", "[1]"), "is an object, got list"),
        (StructuredSpec("json_schema", '{"a":' * 70 + "1" + "}" * 70), f"deeper than {MAX_DEPTH}"),
        (StructuredSpec("json_schema", "[" * 100_000), "deeper than"),
        (StructuredSpec("json_schema", '{"type": "text"}'), "JSON schema can't be used"),
        (StructuredSpec("json_schema", '{"$ref": "http://127.0.0.1/x"}'), "not present"),
        (StructuredSpec("json_schema", '{"type": "string", "contentEncoding": "x", "not": {}}'), "not"),
        (StructuredSpec("regex", "("), "regex can't be used"),
        (StructuredSpec("regex", r"(a)\1"), "regex can't be used"),
        (StructuredSpec("regex", ""), "is empty"),
        (StructuredSpec("regex", "(" * 50_000), "regex can't be used"),
        (StructuredSpec("regex", "a" * 300_000), "at most 262144"),
        (StructuredSpec("choice", ()), "one or more texts"),
        (StructuredSpec("choice", ("a", "")), "not empty"),
        (StructuredSpec("choice", tuple(map(str, range(5000)))), "at most 4096"),
        (StructuredSpec("json_schema", '{"minimum": NaN}'), "JSON schema can't be used: ValueError"),
        (StructuredSpec("json_schema", " false"), "Unsatisfiable"),
        (StructuredSpec("grammar", "start: other"), "grammar can't be used"),
        (StructuredSpec("grammar", '{"grammars": 3}'), "grammar can't be used"),
        (StructuredSpec("grammar", 'root ::= ("a"'), "grammar"),
    ],
)  # fmt: skip
def test_what_can_t_be_compiled_is_refused_with_the_reason(
    compiler: GrammarCompiler, spec: StructuredSpec, message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        compiler.compile(spec)
    with pytest.raises(RequestError, match=message):
        validate_spec(spec)


def test_a_grammar_that_no_text_fits_is_refused(compiler: GrammarCompiler) -> None:
    with pytest.raises(RequestError, match="no text fits"):
        compiler.compile(StructuredSpec("grammar", "start: a\na: a"))
    assert compiler.compile(StructuredSpec("json_schema", "true")).state()
    for spec in (StructuredSpec("json_schema", '{"a": NaN}'), StructuredSpec("grammar", '{"a": 1}')):
        with pytest.raises(RequestError, match="can't be used"):
            after_thoughts(spec, '"<think>"', '"</think>"', is_open=True)


def test_what_takes_for_ever_to_read_is_given_up_and_the_next_one_is_not(compiler: GrammarCompiler) -> None:
    """The library meets sixty repeated patterns with a search that its own limits don't end."""
    limits = GrammarLimits(read_s=0.3)
    small = GrammarCompiler(compiler.tokenizer, compiler.vocab_size, compiler.stop_ids, limits=limits)
    parts = [{"properties": {"p": {"pattern": f"a{{{n}}}"}}} for n in range(60)]
    with pytest.raises(RequestError, match=r"can't be read within 0\.3 s"):
        small.compile(StructuredSpec("json_schema", json.dumps({"type": "object", "allOf": parts})))
    assert small.compile(StructuredSpec("regex", "a")).state().forced()
    child = small._guard._child
    assert child is not None and child.poll() is None
    small.close()
    assert child.poll() is not None


def test_an_expression_that_blows_up_fails_alone_and_soon(compiler: GrammarCompiler) -> None:
    """((a{100}){100}){100} asks for a million states; the limits end it, and the compiler still works."""
    small = GrammarCompiler(
        compiler.tokenizer, compiler.vocab_size, compiler.stop_ids, limits=GrammarLimits(max_states=2000)
    )
    with pytest.raises(RequestError, match="regex can't be used"):
        small.compile(StructuredSpec("regex", "((a{100}){100}){100}"))
    assert small.compile(StructuredSpec("regex", "a")).state().forced()
    small.close()


def test_a_grammar_that_gets_too_complex_on_the_way_is_an_error_of_its_request(compiler: GrammarCompiler) -> None:
    limits = GrammarLimits(max_states=60)
    small = GrammarCompiler(compiler.tokenizer, compiler.vocab_size, compiler.stop_ids, limits=limits)
    state = small.compile(StructuredSpec("regex", "a?b?[^a]{3}(c|.a){20,900}x")).state()
    with pytest.raises(RequestError, match="too complex"):
        for _ in range(200):
            allowed = np.flatnonzero(row_of(small, state))
            state.accept(int(allowed[-1]))
    small.close()


def test_the_same_grammar_is_compiled_once_and_the_cache_is_bounded(compiler: GrammarCompiler) -> None:
    limits = GrammarLimits(cache_entries=3)
    small = GrammarCompiler(compiler.tokenizer, compiler.vocab_size, compiler.stop_ids, limits=limits)
    specs = [StructuredSpec("regex", f"a{{{n}}}") for n in range(1, 6)]
    first = [small.compile(spec) for spec in specs]
    assert small.compile(specs[-1]) is first[-1]
    assert small.compile(specs[0]) is not first[0]
    assert len(small._cache) == 3
    small.close()


def test_a_request_waits_for_its_grammar_without_blocking_and_not_for_ever(compiler: GrammarCompiler) -> None:
    limits = GrammarLimits(compile_s=0.5)
    slow = GrammarCompiler(compiler.tokenizer, compiler.vocab_size, compiler.stop_ids, limits=limits, max_threads=1)
    release = threading.Event()
    slow._tokens()
    slow._guard.check("")
    slow._tokens()
    slow._pool.submit(release.wait)
    grammars = RequestGrammars(slow)
    grammars.submit(7, StructuredSpec("regex", "ab"))
    assert grammars.ready(7) is None
    with pytest.raises(RequestError, match=r"not compiled within 0\.5 s"):
        while grammars.ready(7) is None:
            pass
    grammars.forget(7)
    release.set()
    grammars.submit(8, StructuredSpec("regex", "cd"))
    state = None
    while state is None:
        state = grammars.ready(8)
    assert state.forced()
    slow.close()


def test_a_sentencepiece_vocabulary_with_byte_tokens(data_dir: Path) -> None:
    tokenizer = load_tokenizer(data_dir / "tokenizer_mistral")
    made = GrammarCompiler(tokenizer, tokenizer.vocab_size, tokenizer.stop_ids)
    schema = {"type": "object", "properties": {"名": {"enum": ["你好", "🦜", "a b"]}}, "required": ["名"]}
    schema["additionalProperties"] = False
    for seed in range(3):
        text, ended = walk(made, StructuredSpec("json_schema", json.dumps(schema)), seed)
        assert ended
        jsonschema.validate(json.loads(text), schema)
    made.close()
