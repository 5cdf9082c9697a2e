"""Sampling equals transformers' processors in what it allows, and the asked distribution in what it draws."""

from __future__ import annotations

import pytest
import torch
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from tunesmith.engine.request import SamplingParams
from tunesmith.engine.sampling import Sampler, candidates, choose_tokens, penalise_seen as penalise
from tunesmith.errors import RequestError

VOCAB = 50


def make_logits(seed: int = 0) -> torch.Tensor:
    return torch.randn(VOCAB, generator=torch.Generator().manual_seed(seed)) * 3


def probabilities(logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """Over the whole vocabulary, normalised."""
    allowed, tokens = candidates(logits, params)
    full = torch.zeros(VOCAB)
    full[torch.arange(VOCAB) if tokens is None else tokens] = allowed
    return full / full.sum()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.7},
        {"temperature": 1.0, "top_k": 5},
        {"temperature": 1.3, "top_p": 0.8},
        {"temperature": 1.0, "min_p": 0.1},
        {"temperature": 0.9, "top_k": 20, "top_p": 0.7},
        {"temperature": 0.9, "top_k": 20, "top_p": 0.9, "min_p": 0.05},
        {"temperature": 1.0, "top_p": 1e-6},
    ],
)
def test_distribution_equals_transformers(options: dict, seed: int) -> None:
    params = SamplingParams(**options)
    warpers = LogitsProcessorList([TemperatureLogitsWarper(params.temperature)])
    if params.top_k:
        warpers.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        warpers.append(TopPLogitsWarper(params.top_p))
    if params.min_p:
        warpers.append(MinPLogitsWarper(params.min_p))
    logits = make_logits(seed)
    expected = warpers(torch.zeros(1, 1, dtype=torch.int64), logits[None].clone())[0].softmax(-1)
    torch.testing.assert_close(probabilities(logits, params), expected, atol=1e-6, rtol=1e-5)


def test_repetition_penalty_equals_transformers() -> None:
    logits, seen = make_logits(), [3, 7, 11, 40]
    expected = RepetitionPenaltyLogitsProcessor(1.5)(torch.tensor([seen]), logits[None].clone())[0]
    torch.testing.assert_close(penalise(logits, seen, 1.5), expected)


def test_a_penalised_greedy_sampler_moves_on() -> None:
    logits = torch.tensor([1.0, 0.9, 0.0])
    sampler = Sampler(SamplingParams(repetition_penalty=2.0), [])
    assert [sampler.choose(logits) for _ in range(2)] == [0, 1]


def test_draws_follow_the_distribution() -> None:
    logits = make_logits()
    sampler = Sampler(SamplingParams(temperature=1.0, top_k=4, seed=1), [])
    counts = torch.zeros(VOCAB)
    for _ in range(4000):
        counts[sampler.choose(logits)] += 1
    expected = probabilities(logits, sampler.params)
    assert (counts[expected == 0] == 0).all()
    assert (counts / 4000 - expected).abs().max() < 0.03


def test_seeds_reproduce_and_differ() -> None:
    def draw(seed: int | None) -> list[int]:
        sampler = Sampler(SamplingParams(temperature=2.0, seed=seed), [])
        return [sampler.choose(make_logits(i)) for i in range(40)]

    assert draw(5) == draw(5)
    assert draw(5) != draw(6)
    assert draw(None) != draw(None)


def test_rows_are_chosen_each_by_its_own_sampler() -> None:
    logits = torch.stack([make_logits(0), make_logits(1)])
    greedy, drawn = Sampler(SamplingParams(), []), Sampler(SamplingParams(temperature=1.0, seed=3), [])
    alone = Sampler(SamplingParams(temperature=1.0, seed=3), []).choose(logits[1])
    assert choose_tokens(logits, [greedy, drawn]) == [int(logits[0].argmax()), alone]
    assert choose_tokens(logits, [greedy, greedy]) == logits.argmax(-1).tolist()


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0}, {"repetition_penalty": 1.2}])
def test_nan_logits_are_refused(options: dict) -> None:
    logits = make_logits()
    logits[4] = float("nan")
    with pytest.raises(RequestError, match="NaN"):
        choose_tokens(logits[None], [Sampler(SamplingParams(**options), [1])])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tokens": 0}, "max_tokens must be at least 1, got 0"),
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"min_p": 1.5}, "min_p"),
        ({"top_k": -1}, "top_k"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"stop": ("",)}, "stop"),
    ],
)
def test_impossible_options_are_named(options: dict, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        SamplingParams(**options)


def test_one_stop_text_may_be_given_bare() -> None:
    assert SamplingParams(stop="end").stop == ("end",)  # type: ignore[arg-type]
