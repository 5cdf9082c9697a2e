"""The engine against transformers' generate, and against the decoder's own training forward."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tunesmith.checkpoint.load import load_decoder
from tunesmith.engine.config import EngineConfig
from tunesmith.engine.engine import Engine
from tunesmith.engine.pages import pages_of
from tunesmith.engine.probe import probe_runner, stepwise_logits
from tunesmith.engine.request import SamplingParams
from tunesmith.engine.runner import NativeRunner
from tunesmith.model.decoder import Decoder
from tunesmith.model.language_model import logits as training_logits

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gpt2", "mixtral", "qwen3_moe")
# Random weights of std 0.02 give nearly flat logits; a larger spread makes greedy choices clear of rounding.
SPREAD = 0.2
# Float32: the same sums in another order.
TOLERANCE = 1e-5
CONFIG = EngineConfig(max_model_len=512, max_num_seqs=8, max_num_batched_tokens=512, debug_pages=True)


def prompt(length: int, seed: int = 0) -> list[int]:
    return torch.randint(0, 256, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def load(directory: Path) -> Decoder:
    return load_decoder(directory, device="cpu", dtype=torch.float32).eval()


def make_engine(model: Decoder, num_pages: int | None = None, **changes: Any) -> Engine:
    config = replace(CONFIG, **changes)
    pages = config.max_num_seqs * pages_of(config.max_model_len) if num_pages is None else num_pages
    return Engine(NativeRunner(model, config, pages), config=config)


def generate(engine: Engine, prompts: list[list[int]], max_tokens: int) -> list[list[int]]:
    ids = [engine.submit(p, SamplingParams(max_tokens=max_tokens, ignore_eos=True)) for p in prompts]
    done = {}
    while engine.has_work:
        done.update({o.request_id: o.completion.token_ids for o in engine.step() if o.completion})
    engine.scheduler.check()
    assert engine.runner.pages.num_used == 0
    return [done[i] for i in ids]


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_equals_transformers(family: str, tiny_model_dir: Callable[..., Path]) -> None:
    """60 tokens: past the sliding window of mistral (16) and over several pages."""
    from transformers import AutoModelForCausalLM

    directory = tiny_model_dir(family, initializer_range=SPREAD)
    theirs = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    theirs.generation_config.eos_token_id = None
    ids = prompt(37)
    expected = theirs.generate(
        torch.tensor([ids]), attention_mask=torch.ones(1, 37), max_new_tokens=60, do_sample=False, pad_token_id=256
    )
    assert generate(make_engine(load(directory)), [ids], 60) == [expected[0, 37:].tolist()]


@pytest.mark.parametrize(
    ("family", "is_invariant"), [*((f, False) for f in FAMILIES), ("mistral", True), ("gpt2", True), ("mixtral", True)]
)
def test_prefill_equals_decode_equals_training(
    family: str, is_invariant: bool, tiny_model_dir: Callable[..., Path]
) -> None:
    model = load(tiny_model_dir(family, initializer_range=SPREAD))
    ids = prompt(70)
    whole = training_logits(model, [ids])[0]
    scale = whole.abs().max()
    runner = probe_runner(model, 512, batch_invariant=is_invariant)
    decoded = stepwise_logits(runner, ids, range(1, 71))
    assert (decoded - whole).abs().max() / scale < TOLERANCE
    prefilled = stepwise_logits(runner, ids, [70])
    assert (prefilled[0] - whole[-1]).abs().max() / scale < TOLERANCE
    pieces = stepwise_logits(runner, ids, [5, 21, 22, 58, 70])
    assert (pieces - whole[[4, 20, 21, 57, 69]]).abs().max() / scale < TOLERANCE
    if is_invariant:
        assert torch.equal(prefilled[0], decoded[-1])
        assert torch.equal(pieces, decoded[[4, 20, 21, 57, 69]])


@pytest.mark.parametrize("family", ["mistral", "qwen2"])
def test_a_long_prompt_in_chunks_gives_the_same(family: str, tiny_model_dir: Callable[..., Path]) -> None:
    model = load(tiny_model_dir(family, initializer_range=SPREAD))
    whole = generate(make_engine(model), [prompt(100)], 20)
    assert generate(make_engine(model, max_num_batched_tokens=33), [prompt(100)], 20) == whole


@pytest.mark.parametrize("family", ["mistral", "qwen2", "mixtral"])
def test_requests_that_share_steps_say_what_they_say_alone(family: str, tiny_model_dir: Callable[..., Path]) -> None:
    """Requests of different lengths grow side by side, come and go; prompts share steps with decoding."""
    model = load(tiny_model_dir(family, initializer_range=SPREAD))
    prompts = [prompt(n, seed=n) for n in (3, 20, 41, 17, 64)]
    alone = generate(make_engine(model, max_num_seqs=1), prompts, 40)
    together = generate(make_engine(model, max_num_seqs=3, max_num_batched_tokens=24), prompts, 40)
    assert together == alone


@pytest.mark.parametrize("family", ["mistral", "qwen2"])
def test_what_preempts_and_what_is_cached_changes_no_token(family: str, tiny_model_dir: Callable[..., Path]) -> None:
    """Eleven pages for four requests of up to seven: some are thrown out and computed anew."""
    model = load(tiny_model_dir(family, initializer_range=SPREAD))
    shared = prompt(35)
    prompts = [shared + prompt(n, seed=n) for n in (3, 20, 9)] + [prompt(50, seed=5)]
    alone = generate(make_engine(model, enable_prefix_cache=False), prompts, 40)
    tight = make_engine(model, num_pages=11, max_model_len=128, max_num_batched_tokens=40)
    assert generate(tight, prompts, 40) == alone
    assert tight.stats().num_preempted > 0
    roomy = make_engine(model)
    assert generate(roomy, prompts, 40) == alone
    assert generate(roomy, prompts, 40) == alone
    assert roomy.stats().prefix_hits_tokens > 4 * 32


@pytest.mark.parametrize("family", ["mistral", "qwen3_moe"])
def test_batch_invariant_answers_are_the_same_bits(family: str, tiny_model_dir: Callable[..., Path]) -> None:
    """The log-probabilities of greedy answers: alone, among others, from the cache, in pieces, after a preemption."""
    model = load(tiny_model_dir(family, initializer_range=SPREAD))
    prompts = [prompt(n, seed=n) for n in (37, 5, 64, 18)]
    params = SamplingParams(max_tokens=12, ignore_eos=True, logprobs=3)

    def ask(engine: Engine, asked: list[list[int]]) -> list[Any]:
        ids = [engine.submit(p, params) for p in asked]
        done: dict[int, Any] = {}
        while engine.has_work:
            done |= {o.request_id: o.completion for o in engine.step() if o.completion}
        return [(done[i].token_ids, done[i].logprobs) for i in ids]

    first = make_engine(model, batch_invariant=True)
    alone = [ask(first, [p])[0] for p in prompts]
    assert ask(first, prompts) == alone, "among others, with prefixes from the cache"
    assert first.stats().prefix_hits_tokens > 0
    pieces = make_engine(model, batch_invariant=True, max_num_batched_tokens=13, max_num_seqs=4)
    assert ask(pieces, prompts) == alone
    tight = make_engine(model, num_pages=8, max_model_len=128, batch_invariant=True)
    assert ask(tight, prompts) == alone and tight.stats().num_preempted > 0


@pytest.mark.parametrize("seed", range(2))
def test_mixed_traffic_says_what_each_says_alone(seed: int, tiny_model_dir: Callable[..., Path]) -> None:
    """Greedy, sampled and penalised, with priorities, shared beginnings, preemptions and, for one, steps ahead."""
    model = load(tiny_model_dir("qwen2", initializer_range=SPREAD))
    choice = random.Random(seed)
    engine = make_engine(
        model, num_pages=8, max_model_len=128, max_num_seqs=5, max_num_batched_tokens=24, step_ahead=seed == 1
    )
    asked: dict[int, tuple[list[int], SamplingParams]] = {}
    done: dict[int, list[int]] = {}
    while len(asked) < 10 or engine.has_work:
        if choice.random() < 0.4 and len(asked) < 10:
            ids = [*range(choice.choice([0, 20, 40])), *(choice.randrange(250) for _ in range(choice.randint(1, 20)))]
            params = SamplingParams(
                max_tokens=choice.randint(10, 36),
                temperature=choice.choice([0, 0.9]),
                seed=choice.randrange(1000),
                top_k=choice.choice([0, 20]),
                presence_penalty=choice.choice([0, 0, 0.7]),
                logprobs=choice.choice([None, 1]),
                ignore_eos=True,
            )
            asked[engine.submit(ids, params, priority=choice.randrange(3))] = ids, params
        done |= {o.request_id: o.completion.token_ids for o in engine.step() if o.completion}
    assert engine.stats().num_preempted > 0 and engine.stats().prefix_hits_tokens > 0
    single = make_engine(model, max_num_seqs=1, enable_prefix_cache=False)
    for request, (ids, params) in asked.items():
        alone = single.submit(ids, params)
        said: list[int] = []
        while single.has_work:
            said += [token for output in single.step() for token in output.token_ids]
        assert said == done[request], (alone, params)


def test_stories260k_tells_its_published_story(data_dir: Path) -> None:
    """The model's card shows its greedy text: 256 tokens from the beginning-of-text token alone."""
    from tunesmith.engine.llm import LLM

    folder = data_dir / "weights_stories260K"
    card = (folder / "published_card.md").read_text(encoding="utf-8")
    published = card.split("-t 0.0\n")[1].split("\n```")[0]
    llm = LLM(folder / "hf", device="cpu")
    assert llm.tokenizer is not None and llm.tokenizer.bos_id is not None
    (completion,) = llm.generate([[llm.tokenizer.bos_id]], max_tokens=256)
    assert completion.text.strip() == published.strip()
    for start in ("Once upon a time", "Once upon a time, there was a"):  # the second goes on with a space
        (from_text,) = llm.generate(start, max_tokens=20)
        assert published.startswith(start + from_text.text)
