"""Which head a step's tokens are drawn from, where the decoder has a copy of it: by requests, not by rows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tunesmith.checkpoint.load import load_decoder
from tunesmith.engine.config import EngineConfig
from tunesmith.engine.engine import Engine
from tunesmith.engine.interfaces import Drafter
from tunesmith.engine.request import Completion, SamplingParams
from tunesmith.engine.runner import NativeRunner
from tunesmith.engine.speculate import NgramDrafter
from tunesmith.model.decoder import Decoder
from tunesmith.model.head_copy import MOST_REQUESTS

CONFIG: dict[str, Any] = {"max_model_len": 64, "max_num_seqs": MOST_REQUESTS + 1, "max_num_batched_tokens": 512}
MARK = 7


class Marked(nn.Module):
    """A head that always says the same token: whatever is drawn from it shows it."""

    def forward(self, x_TD: torch.Tensor) -> torch.Tensor:
        return nn.functional.one_hot(torch.full((len(x_TD),), MARK), 272).to(x_TD.dtype)


class Other(nn.Module):
    """A head of weights of its own, in plain torch: the same for a row whatever is beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.randn(272, 32, generator=torch.Generator().manual_seed(3))

    def forward(self, x_TD: torch.Tensor) -> torch.Tensor:
        return x_TD @ self.weight.t()


@pytest.fixture
def decoder(tiny_model_dir: Callable[..., Path]) -> Decoder:
    return load_decoder(tiny_model_dir("qwen2", initializer_range=0.2), device="cpu", dtype=torch.float32).eval()


def answers(
    decoder: Decoder,
    num: int,
    params: SamplingParams,
    *,
    drafter: Drafter | None = None,
    owns_model: bool = True,
    **config: Any,
) -> list[Completion]:
    """Of so many requests that begin and end together, where nothing is guessed."""
    made = EngineConfig(**{**CONFIG, **config})
    engine = Engine(NativeRunner(decoder, made, 200, owns_model=owns_model), config=made, drafter=drafter)
    ids = [engine.submit([*range(3, 9), number] * 2, params) for number in range(num)]
    done: dict[int, Completion] = {}
    while engine.has_work:
        done |= {out.request_id: out.completion for out in engine.step() if out.completion is not None}
    return [done[i] for i in ids]


GREEDY = SamplingParams(max_tokens=12, ignore_eos=True)


@pytest.mark.parametrize("num", [1, MOST_REQUESTS])
def test_few_requests_draw_from_the_copy(num: int, decoder: Decoder) -> None:
    decoder.head_copy = Marked()
    assert [done.token_ids for done in answers(decoder, num, GREEDY)] == [[MARK] * 12] * num


def test_more_draw_from_the_head_as_it_is_stored(decoder: Decoder) -> None:
    before = [done.token_ids for done in answers(decoder, MOST_REQUESTS + 1, GREEDY)]
    decoder.head_copy = Marked()
    assert [done.token_ids for done in answers(decoder, MOST_REQUESTS + 1, GREEDY)] == before


def test_prompts_are_scored_by_the_head_as_it_is_stored(decoder: Decoder) -> None:
    """Also where the answer's own tokens are the copy's."""
    params = SamplingParams(max_tokens=3, ignore_eos=True, prompt_logprobs=2, logprobs=1)
    (before,) = answers(decoder, 1, params)
    decoder.head_copy = Marked()
    (after,) = answers(decoder, 1, params)
    assert after.prompt_logprobs == before.prompt_logprobs
    assert after.token_ids == [MARK] * 3 != before.token_ids


@pytest.mark.parametrize("options", [{"batch_invariant": True}, {"owns_model": False}])
def test_all_rows_have_one_head(options: dict[str, Any], decoder: Decoder) -> None:
    """In batch-invariant mode, and of a model that was loaded elsewhere, whose weights may have changed since."""
    before = [done.token_ids for done in answers(decoder, 2, GREEDY, **options)]
    decoder.head_copy = Marked()
    assert [done.token_ids for done in answers(decoder, 2, GREEDY, **options)] == before


def test_guesses_are_verified_by_the_head_of_a_plain_step(decoder: Decoder) -> None:
    """Of 12 requests such a step has up to 60 rows: more than requests that a step of the copy may have."""
    stored = [done.token_ids for done in answers(decoder, 12, GREEDY)]
    decoder.head_copy = Other()
    plain = [done.token_ids for done in answers(decoder, 12, GREEDY)]
    guessed = [done.token_ids for done in answers(decoder, 12, GREEDY, drafter=NgramDrafter(4, min_ngram=1))]
    assert guessed == plain != stored


def test_what_pages_leave_room_for_has_both_heads(decoder: Decoder) -> None:
    seen: list[int] = []

    class Seen(Marked):
        def forward(self, x_TD: torch.Tensor) -> torch.Tensor:
            seen.append(len(x_TD))
            return super().forward(x_TD)

    decoder.head_copy = Seen()
    NativeRunner(decoder, EngineConfig(**CONFIG), 20).worst_pass()
    assert seen == [1, MOST_REQUESTS]
