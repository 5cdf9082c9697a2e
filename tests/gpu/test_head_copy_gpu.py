"""On a GPU: quantised blocks get a copy of the head, few requests are drawn from it, and guesses change nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import nn

from tunesmith.checkpoint.inference import load_for_inference
from tunesmith.engine.batching import decode_batch, to_device
from tunesmith.engine.config import EngineConfig
from tunesmith.engine.engine import Engine
from tunesmith.engine.request import SamplingParams
from tunesmith.engine.runner import NativeRunner
from tunesmith.engine.speculate import NgramDrafter
from tunesmith.model.decoder import Decoder
from tunesmith.model.head_copy import MOST_REQUESTS, copied_logits
from tunesmith.model.int8 import Int8Linear

pytestmark = pytest.mark.gpu
SHAPE: dict[str, Any] = {
    "hidden_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.1,
    "vocab_size": 20_000,
}

MARK = 7


class Marked(nn.Module):
    """A head that always says the same token."""

    def forward(self, x_TD: torch.Tensor) -> torch.Tensor:
        logits_TV = x_TD.new_zeros(len(x_TD), SHAPE["vocab_size"])
        logits_TV[:, MARK] = 1
        return logits_TV


def _load(make: Callable[..., Path], **options: Any) -> Decoder:
    model = load_for_inference(
        make("qwen2", **SHAPE), device="cuda", **{"dtype": "bfloat16", "quantize": "fp8", **options}
    )
    return cast(Decoder, model)


@pytest.mark.parametrize("rows", [1, 2, 8, 9, 16, 33, 64, 65, 272])
def test_its_kernel_has_the_weight_that_it_stands_for(rows: int, tiny_model_dir: Callable[..., Path]) -> None:
    decoder = _load(tiny_model_dir)
    copy = cast(Int8Linear, decoder.head_copy)
    hidden_TD = torch.randn(rows, 256, device="cuda", dtype=torch.bfloat16)
    with torch.inference_mode():
        mine, weight = copied_logits(copy, hidden_TD).double(), copy.weight(torch.float32).double()
        truth = hidden_TD.double() @ weight.t()
        size = hidden_TD.double().abs() @ weight.t().abs()
    assert float(((mine - truth).abs() / size).max()) < 2.0**-8


@pytest.mark.parametrize("enforce_eager", [False, True])
def test_few_requests_take_it_recorded_or_not(enforce_eager: bool, tiny_model_dir: Callable[..., Path]) -> None:
    """A copy whose codes are all zero says nothing: logits are zero where it is taken."""
    decoder = _load(tiny_model_dir)
    cast(Int8Linear, decoder.head_copy).codes.zero_()
    config = EngineConfig(max_model_len=128, max_num_seqs=32, max_num_batched_tokens=256, enforce_eager=enforce_eager)
    runner = NativeRunner(decoder, config, num_pages=64)
    runner.warm_up()
    for pages in (*runner.cache.keys, *runner.cache.values):
        pages.zero_()  # contexts that nobody has written
    for num in (1, 3, MOST_REQUESTS, MOST_REQUESTS + 1, 32):
        host = decode_batch(num, 40)
        batch = to_device(type(host)(**{**vars(host), "is_decode": True}), runner.device)
        logits_BV = runner.step_logits(batch)
        assert bool((logits_BV == 0).all()) == (num <= MOST_REQUESTS)
    assert (runner.graphs is None) == enforce_eager
    assert runner.graphs is None or runner.graphs.stats.num_replays == 5


@pytest.mark.parametrize("num", [1, 6])
def test_guesses_change_no_greedy_answer(num: int, tiny_model_dir: Callable[..., Path]) -> None:
    """Of six requests with four guesses each a step has more rows than requests that the copy answers.

    A copy that always says the same token shows whatever is drawn from it.
    """
    decoder = _load(tiny_model_dir)
    decoder.head_copy = Marked()
    config = EngineConfig(max_model_len=256, max_num_seqs=8, max_num_batched_tokens=256)
    found = []
    for drafter in (None, NgramDrafter(4, min_ngram=1)):
        engine = Engine(NativeRunner(decoder, config, num_pages=200), config=config, drafter=drafter)
        params = SamplingParams(max_tokens=60, ignore_eos=True)
        ids = [engine.submit([5 + number, 9, 11] * 7, params) for number in range(num)]
        done: dict[int, list[int]] = {}
        while engine.has_work:
            done |= {out.request_id: out.completion.token_ids for out in engine.step() if out.completion is not None}
        found.append([done[i] for i in ids])
    assert found[0] == found[1] == [[MARK] * 60] * num
    assert drafter is not None and engine.stats().accepted_tokens > 0


def test_it_takes_the_bytes_that_are_said(tiny_model_dir: Callable[..., Path]) -> None:
    """While it is made, little beside it is held."""
    make = {"vocab_size": 200_000}
    directory = tiny_model_dir("qwen2", **{**SHAPE, **make})
    peaks, held = [], []
    for head in ("stored", "copy"):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        model: Any = load_for_inference(
            directory, device="cuda", dtype="bfloat16", quantize="fp8", head=cast(Any, head)
        )
        torch.cuda.synchronize()
        held.append(torch.cuda.memory_allocated() - before)
        peaks.append(torch.cuda.max_memory_allocated() - before)
        del model
    assert held[1] - held[0] == pytest.approx(200_000 * (256 + 4), rel=0.02)
    assert peaks[1] - held[1] < 2**28
