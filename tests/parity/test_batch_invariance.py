"""Batch-invariant mode under random company: greedy answers and their log-probabilities keep every bit.

A request's neighbours come and go, sample, follow grammars, share its prefix or are aborted; prompts are cut anywhere,
pages run out. In float32 and bfloat16, and with int8, int4 and NF4 weights.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tunesmith.checkpoint.inference import load_for_inference
from tunesmith.engine.config import EngineConfig
from tunesmith.engine.engine import Engine
from tunesmith.engine.grammar_compile import GrammarCompiler, RequestGrammars
from tunesmith.engine.request import Completion, SamplingParams, StructuredSpec
from tunesmith.engine.runner import NativeRunner
from tunesmith.model.decoder import Decoder
from tunesmith.text.tokenizer import Tokenizer, load_tokenizer

GREEDY = SamplingParams(max_tokens=10, ignore_eos=True, logprobs=2)
WIDE = EngineConfig(max_model_len=128, max_num_seqs=16, max_num_batched_tokens=256, batch_invariant=True)
SHARED = [7 + n % 90 for n in range(40)]


@pytest.fixture(scope="module")
def folder(tiny_model_dir: Callable[..., Path]) -> Path:
    return tiny_model_dir("qwen2", hidden_size=64, initializer_range=0.3)


def load(folder: Path, form: str) -> Decoder:
    dtype = torch.bfloat16 if form == "bfloat16" else torch.float32
    quantize = None if form in ("float32", "bfloat16") else form
    model = load_for_inference(folder, quantize=quantize, dtype=dtype, device="cpu")
    assert isinstance(model, Decoder)
    return model


def make_engine(model: Decoder, tokenizer: Tokenizer, config: EngineConfig, num_pages: int | None = None) -> Engine:
    runner = NativeRunner(model, config, num_pages=num_pages or 200)
    grammars = RequestGrammars(GrammarCompiler(tokenizer, runner.vocab_size, tokenizer.stop_ids, max_threads=1))
    return Engine(runner, config=config, stop_ids=tokenizer.stop_ids, grammars=grammars)


def watched_prompts(rng: random.Random) -> list[list[int]]:
    """Six prompts, half of them with a common beginning."""
    own = [[rng.randrange(3, 250) for _ in range(rng.randrange(1, 60))] for _ in range(6)]
    return [SHARED + ids[:20] if n % 2 else ids for n, ids in enumerate(own)]


def said(completion: Completion) -> Any:
    """Tokens, and log-probabilities as they are, to the last bit."""
    return completion.token_ids, completion.logprobs


def alone(engine: Engine, prompts: list[list[int]]) -> list[Any]:
    found = []
    for ids in prompts:
        number = engine.submit(ids, GREEDY)
        done = {output.request_id: output.completion for output in drain(engine) if output.completion}
        found.append(said(done[number]))
    return found


def drain(engine: Engine) -> list[Any]:
    outputs = []
    while engine.has_work:
        outputs += engine.step()
    return outputs


def neighbour(rng: random.Random) -> tuple[list[int], SamplingParams]:
    ids = (SHARED if rng.random() < 0.3 else []) + [rng.randrange(3, 250) for _ in range(rng.randrange(1, 70))]
    params = SamplingParams(
        max_tokens=rng.randrange(1, 16), temperature=rng.choice([0.0, 1.0]), seed=1, ignore_eos=True
    )
    if rng.random() < 0.2:
        params = replace(params, structured=StructuredSpec("regex", "[ab]{1,9}"))
    return ids[:100], params


def in_company(engine: Engine, prompts: list[list[int]], rng: random.Random) -> list[Any]:
    """The watched prompts at random moments, among others that come, go and are aborted."""
    waiting, watched = list(enumerate(prompts)), {}
    rng.shuffle(waiting)
    others: list[int] = []
    done: dict[int, Completion] = {}
    while waiting or engine.has_work:
        for _ in range(rng.randrange(3)):
            others.append(engine.submit(*neighbour(rng)) if len(done) < len(prompts) and len(others) < 14 else -1)
        if waiting and rng.random() < 0.6:
            index, ids = waiting.pop()
            watched[engine.submit(ids, GREEDY, priority=rng.randrange(2))] = index
        if others and rng.random() < 0.15:
            engine.abort(rng.choice(others))
        done |= {o.request_id: o.completion for o in engine.step() if o.completion and o.request_id in watched}
    found: list[Any] = [None] * len(prompts)
    for number, index in watched.items():
        found[index] = said(done[number])
    return found


def check(folder: Path, form: str, seeds: range) -> int:
    """Compare over random schedules; how often pages ran out."""
    tokenizer, model = load_tokenizer(folder), load(folder, form)
    preempted = 0
    for seed in seeds:
        rng = random.Random(f"{form} {seed}")
        prompts = watched_prompts(rng)
        expected = alone(make_engine(model, tokenizer, WIDE), prompts)
        config = replace(
            WIDE, max_num_seqs=rng.choice([3, 8, 16]), max_num_batched_tokens=rng.choice([16, 37, 256]),
            enable_prefix_cache=rng.random() < 0.8, step_ahead=rng.random() < 0.5,
        )  # fmt: skip
        engine = make_engine(model, tokenizer, config, num_pages=rng.choice([9, 14, 200]))
        assert in_company(engine, prompts, rng) == expected, (form, seed)
        preempted += engine.stats().num_preempted
    return preempted


@pytest.mark.parametrize(("form", "seed"), [("float32", 1), ("int4", 2)])
def test_greedy_answers_keep_every_bit_in_random_company(folder: Path, form: str, seed: int) -> None:
    """In these schedules pages run out."""
    assert check(folder, form, range(seed, seed + 1)) > 0


@pytest.mark.long
@pytest.mark.parametrize("form", ["float32", "bfloat16", "int8", "int4", "w8a8", "nf4"])
def test_greedy_answers_keep_every_bit_over_many_schedules(folder: Path, form: str) -> None:
    assert check(folder, form, range(3, 30)) > 0
