"""Speculation gives the answers of an engine without it, in fewer steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tunesmith.checkpoint.load import load_decoder
from tunesmith.engine import guesses
from tunesmith.engine.config import EngineConfig
from tunesmith.engine.draft import DraftModel
from tunesmith.engine.engine import Engine
from tunesmith.engine.interfaces import Drafter, Grammars
from tunesmith.engine.llm import LLM
from tunesmith.engine.request import SamplingParams, StructuredSpec
from tunesmith.engine.runner import NativeRunner
from tunesmith.engine.speculate import NgramDrafter, Pace, Speculation
from tunesmith.errors import RequestError
from tunesmith.model.decoder import Decoder

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gpt2", "mixtral", "qwen3_moe")
SPREAD = 0.2
CONFIG = EngineConfig(max_model_len=128, max_num_seqs=4, max_num_batched_tokens=64, debug_pages=True)


@dataclass
class Asked:
    """What a drafter sees of a sequence."""

    request_id: int
    all_ids: list[int]


def prompt(length: int, seed: int = 0) -> list[int]:
    return torch.randint(0, 256, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def load(directory: Path) -> Decoder:
    return load_decoder(directory, device="cpu", dtype=torch.float32).eval()


def runner_of(model: Decoder, num_pages: int = 40) -> NativeRunner:
    return NativeRunner(model, CONFIG, num_pages)


def generate(
    model: Decoder,
    drafter: Drafter | None,
    params: Sequence[SamplingParams],
    prompts: Sequence[list[int]],
    num_pages: int = 40,
    grammars: Grammars | None = None,
) -> tuple[list[list[int]], Engine]:
    engine = Engine(runner_of(model, num_pages), config=CONFIG, drafter=drafter, grammars=grammars)
    ids = [engine.submit(p, own) for p, own in zip(prompts, params, strict=True)]
    done: dict[int, list[int]] = {}
    told: dict[int, list[int]] = {i: [] for i in ids}
    while engine.has_work:
        for output in engine.step():
            told[output.request_id] += output.token_ids
            if output.completion is not None:
                done[output.request_id] = output.completion.token_ids
    assert told == done
    assert engine.runner.pages.num_used == 0
    return [done[i] for i in ids], engine


def draft_of(model: Decoder, **options: Any) -> DraftModel:
    return DraftModel(runner_of(model, options.pop("num_pages", 40)), 4, model.config.vocab_size, **options)


PROMPTS = [prompt(37), [7, 8, 9] * 9, prompt(3, 1), prompt(20, 2)]
GREEDY = [SamplingParams(max_tokens=20)] * 4
SAMPLED = [
    SamplingParams(max_tokens=20, temperature=0.8, seed=5),
    SamplingParams(max_tokens=20, temperature=1.5, top_k=9, top_p=0.9, seed=6, min_tokens=4),
    SamplingParams(max_tokens=20),
    SamplingParams(max_tokens=20, temperature=0.5, seed=7, presence_penalty=1.0),
]


def _cases() -> list[Any]:
    """Every family with one method, the rest among the long tests."""
    first = {("qwen2", "ngram"), ("gpt2", "ngram"), ("mixtral", "ngram")} | {
        (family, "draft") for family in FAMILIES[:4]
    }
    pairs = [(family, method) for family in FAMILIES for method in ("ngram", "draft")]
    return [pytest.param(*pair, marks=() if pair in first else pytest.mark.long) for pair in pairs]


@pytest.mark.parametrize(("family", "method"), _cases())
def test_answers_are_those_without_it(family: str, method: str, tiny_model_dir: Callable[..., Path]) -> None:
    """Greedy and sampled, several requests at once, drafts that are right and drafts that are wrong."""
    model = load(tiny_model_dir(family, initializer_range=SPREAD))
    small = load(tiny_model_dir("llama", initializer_range=SPREAD))
    for params in (GREEDY, SAMPLED) if family == "qwen2" else (SAMPLED,):
        expected, plain = generate(model, None, params, PROMPTS)
        drafter = NgramDrafter(4, min_ngram=1) if method == "ngram" else draft_of(small)
        mine, engine = generate(model, drafter, params, PROMPTS)
        assert mine == expected
        stats = engine.stats()
        assert 0 <= stats.accepted_tokens <= stats.drafted_tokens
        assert stats.drafted_tokens > 0
        assert stats.generation_tokens == plain.stats().generation_tokens


@pytest.mark.parametrize("computes_last", [False, True])
@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_a_draft_model_that_is_the_model_is_always_right(
    params: list[SamplingParams], computes_last: bool, tiny_model_dir: Callable[..., Path]
) -> None:
    """Four guesses of four are right, five tokens a step: the draft's cache is what it ought to be, also where the
    noise of sampling decides."""
    model = load(tiny_model_dir("qwen2", initializer_range=SPREAD))
    expected, _ = generate(model, None, params[:3], PROMPTS[:3])
    drafter = draft_of(load(tiny_model_dir("qwen2", initializer_range=SPREAD)), computes_last=computes_last)
    mine, engine = generate(model, drafter, params[:3], PROMPTS[:3])
    assert mine == expected
    stats = engine.stats()
    assert stats.accepted_tokens == stats.drafted_tokens
    assert stats.steps <= 3 + 20 // 5 + 1
    assert drafter.runner.pages.num_used == 0


COUNTED = [
    SamplingParams(max_tokens=16, presence_penalty=0.7),
    SamplingParams(max_tokens=16, frequency_penalty=0.4, repetition_penalty=1.2, temperature=0.8, seed=3),
    SamplingParams(max_tokens=16, repetition_penalty=0.8, logit_bias={5: 2.0}),
    SamplingParams(max_tokens=16, temperature=0.8, seed=5),
]


@pytest.mark.parametrize("most", [64, 5])
def test_rows_behind_guesses_count_them_as_seen(
    most: int, tiny_model_dir: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Requests with penalties were not guessed for. A draft model that is the model is right all the time, so what each
    row of both has counted must be the same; where counts are short, fewer are guessed for."""
    monkeypatch.setattr(guesses, "MOST_COUNTED", most)
    directory = tiny_model_dir("qwen2", initializer_range=SPREAD)
    model = load(directory)
    expected, _ = generate(model, None, COUNTED, PROMPTS)
    for drafter in (draft_of(load(directory)), NgramDrafter(4, min_ngram=1)):
        mine, engine = generate(model, drafter, COUNTED, PROMPTS, 40 if most == 64 else 12)
        assert mine == expected
        stats = engine.stats()
        assert stats.drafted_tokens > 0
        if isinstance(drafter, DraftModel):
            assert stats.accepted_tokens == stats.drafted_tokens
            assert most == 5 or stats.steps <= 4 + 16 // 5 + 1
    assert len(engine.runner.sampling.state.counts.answers_NV) <= (8 if most == 5 else 16)  # type: ignore[attr-defined]


class Threes:
    """A grammar of so many tokens: a token's remainder by 3 is that of its place."""

    def __init__(self, length: int) -> None:
        self.length, self.place = length, 0

    @property
    def is_finished(self) -> bool:
        return self.place >= self.length

    def mask_into(self, bitmask_row: np.ndarray) -> None:
        bits = np.arange(bitmask_row.size * 32) % 3 == self.place % 3
        bitmask_row[:] = np.packbits(bits, bitorder="little").view(np.int32)

    def accept(self, token: int) -> bool:
        is_right = token % 3 == self.place % 3
        self.place += is_right
        return is_right

    def rollback(self, num_tokens: int) -> None:
        self.place -= num_tokens


class AllThrees:
    """Ready at once."""

    def submit(self, request_id: int, spec: StructuredSpec) -> None:
        pass

    def ready(self, request_id: int) -> Threes:
        return Threes(11)

    def forget(self, request_id: int) -> None:
        pass


def test_a_grammar_goes_on_by_guesses(tiny_model_dir: Callable[..., Path]) -> None:
    """Requests with a grammar were not guessed for. The smaller model knows no grammar: it guesses what may not be."""
    directory = tiny_model_dir("qwen2", initializer_range=SPREAD)
    model, spec = load(directory), StructuredSpec("regex", "threes")
    params = [SamplingParams(max_tokens=20, structured=spec), SamplingParams(max_tokens=20)]
    params.append(SamplingParams(max_tokens=20, structured=spec, temperature=1.0, seed=2, presence_penalty=0.5))
    expected, _ = generate(model, None, params, PROMPTS[:3], grammars=AllThrees())
    assert [len(answer) for answer in expected] == [11, 20, 11]
    texts = [[*text, *answer] for text, answer in zip(PROMPTS, expected, strict=False)]
    for drafter in (draft_of(load(directory)), Knowing(texts)):
        mine, engine = generate(model, drafter, params, PROMPTS[:3], grammars=AllThrees())
        assert mine == expected
        assert engine.stats().drafted_tokens > engine.stats().accepted_tokens > 0
    assert engine.stats().steps < 14


class Knowing:
    """Knows what will be said; every third guess is another token, allowed or not."""

    max_drafts = 3

    def __init__(self, texts: list[list[int]]) -> None:
        self.texts = texts

    def propose(self, sequences: Sequence[Any]) -> list[list[int]]:
        found = []
        for sequence in sequences:
            (text,) = (t for t in self.texts if t[: len(sequence.all_ids)] == sequence.all_ids)
            first = len(sequence.all_ids)
            found.append([(text[i] + (i % 6 == 0) + 3 * (i % 6 == 3)) % 250 for i in range(first, len(text))][:3])
        return found

    def forget(self, request_id: int) -> None:
        pass


def test_repetitive_text_takes_fewer_steps(tiny_model_dir: Callable[..., Path]) -> None:
    """A model that repeats itself: what it says is guessed by lookup."""
    model = load(tiny_model_dir("qwen2", initializer_range=SPREAD))
    params = [SamplingParams(max_tokens=80, logit_bias={5: 50.0, 6: 50.0, 7: 50.0})]
    expected, plain = generate(model, None, params, [prompt(6, 3)])
    mine, engine = generate(model, NgramDrafter(4), params, [prompt(6, 3)])
    assert mine == expected
    assert plain.stats().steps == 80
    assert engine.stats().steps < 40


@pytest.mark.parametrize("num_pages", [9, 12])
def test_pages_run_out_while_drafting(num_pages: int, tiny_model_dir: Callable[..., Path]) -> None:
    """Preempted requests come back with their tokens, and their drafts are guessed anew."""
    model = load(tiny_model_dir("qwen2", initializer_range=SPREAD))
    small = load(tiny_model_dir("llama", initializer_range=SPREAD))
    expected, _ = generate(model, None, SAMPLED, PROMPTS)
    for drafter in (NgramDrafter(4, 1), draft_of(small), draft_of(small, num_pages=5), draft_of(small, max_tokens=16)):
        mine, engine = generate(model, drafter, SAMPLED, PROMPTS, num_pages)
        assert mine == expected
        assert engine.stats().num_preempted > 0 or num_pages == 12


def test_an_answer_may_end_inside_its_guesses(tiny_model_dir: Callable[..., Path]) -> None:
    model = load(tiny_model_dir("qwen2", initializer_range=SPREAD))
    (whole,), _ = generate(model, None, GREEDY[:1], PROMPTS[:1])
    for place in range(2, 9):
        params = [SamplingParams(max_tokens=20, stop_token_ids=(whole[place],))]
        same = load(tiny_model_dir("qwen2", initializer_range=SPREAD))
        (mine,), _ = generate(model, draft_of(same), params, PROMPTS[:1])
        assert mine == whole[: whole.index(whole[place]) + 1]


def test_lookup_guesses_what_followed_last() -> None:
    drafter = NgramDrafter(4)
    asked = Asked(1, [1, 2, 3, 4, 5, 9, 1, 2, 3, 6, 7, 8, 1, 2, 3])
    assert drafter.propose([asked]) == [[6, 7, 8, 1]]
    asked.all_ids += [6, 7, 8, 2]  # three of four were right, and what came instead has not been there after 8
    assert drafter.propose([asked]) == [[]]
    asked.all_ids += [3, 4]
    assert drafter.propose([asked]) == [[5, 9, 1, 2]]
    # A run goes on into itself.
    assert NgramDrafter(5, min_ngram=1).propose([Asked(2, [4, 5, 6, 5, 6])]) == [[5, 6, 5, 6, 5]]
    assert NgramDrafter(4).propose([Asked(3, [1, 2, 3, 4]), Asked(4, [1])]) == [[], []]
    drafter.forget(1)
    drafter.forget(17)
    assert drafter.propose([Asked(1, [5, 6])]) == [[]]


def test_wrong_guesses_make_them_fewer_and_right_ones_more() -> None:
    pace, ids = Pace(4), [1, 2]
    assert pace.look(ids) == 4
    for expected in (2, 1, 1):
        pace.note(ids, [9] * pace.now)
        ids = [*ids, 5]
        assert pace.look(ids) == expected
    for expected in (2, 4, 4):
        guessed = [7] * pace.now
        pace.note(ids, guessed)
        ids = [*ids, *guessed, 5]
        assert pace.look(ids) == expected
    pace.note(ids, [7, 7, 7, 7])
    assert pace.look([*ids, 7, 5]) == 4


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "needs a method"),
        ({"method": "magic"}, "method must be one of ngram, draft, got 'magic'"),
        ({"method": "ngram", "num_token": 3}, "has no 'num_token', did you mean 'num_tokens'"),
        ({"method": "ngram", "num_tokens": 0}, "num_tokens must be between 1 and 16"),
        ({"method": "draft"}, "model must be given with method 'draft'"),
        ({"method": "ngram", "model": "x"}, "model must be given with method 'draft'"),
        ({"method": "ngram", "min_ngram": 9}, "min_ngram must be between 1 and max_ngram"),
    ],
)
def test_what_is_asked_for_is_checked(given: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        Speculation.of(given)


def test_settings_are_read() -> None:
    assert Speculation.of(None) is None
    assert Speculation.of({"method": "ngram", "num_tokens": 3}) == Speculation("ngram", 3)
    assert Speculation.of(Speculation("draft", model="x")) == Speculation("draft", model="x")


def test_a_draft_model_of_another_vocabulary_is_refused(tiny_model_dir: Callable[..., Path]) -> None:
    with pytest.raises(RequestError, match="builtin:tiny has another vocabulary"):
        LLM(tiny_model_dir("qwen2"), device="cpu", speculative={"method": "draft", "model": "builtin:tiny"})
