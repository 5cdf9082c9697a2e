"""Batch-invariant mode on a GPU: every bit is kept in a batch, from the cache, in pieces, after preemption."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tunesmith.checkpoint.inference import load_for_inference
from tunesmith.engine.config import EngineConfig
from tunesmith.engine.engine import Engine
from tunesmith.engine.request import SamplingParams
from tunesmith.engine.runner import NativeRunner
from tunesmith.model.decoder import Decoder

pytestmark = pytest.mark.gpu
GREEDY = SamplingParams(max_tokens=24, ignore_eos=True, logprobs=2)
CONFIG = EngineConfig(max_model_len=1024, max_num_seqs=32, max_num_batched_tokens=2048, batch_invariant=True)


def ask(engine: Engine, prompts: list[list[int]]) -> list[Any]:
    ids = [engine.submit(prompt, GREEDY) for prompt in prompts]
    done: dict[int, Any] = {}
    while engine.has_work:
        done |= {o.request_id: (o.completion.token_ids, o.completion.logprobs) for o in engine.step() if o.completion}
    return [done[number] for number in ids]


def assert_same(found: list[Any], expected: list[Any], how: str) -> None:
    """Tokens first: where they are right, and log-probabilities are not, the last step alone is to blame."""
    for place, ((tokens, logprobs), (tokens_alone, logprobs_alone)) in enumerate(zip(found, expected, strict=True)):
        assert tokens == tokens_alone, f"{how}: tokens of prompt {place}"
        assert logprobs == logprobs_alone, f"{how}: log-probabilities of prompt {place}"


@pytest.mark.parametrize("form", ["bfloat16", "int8", "int4", "fp8"])
def test_greedy_answers_keep_every_bit(tiny_model_dir: Callable[..., Path], form: str) -> None:
    folder = tiny_model_dir(
        "qwen2", hidden_size=512, intermediate_size=1024, num_attention_heads=8, num_key_value_heads=2,
        max_position_embeddings=1024, initializer_range=0.1,
    )  # fmt: skip
    quantize = None if form == "bfloat16" else form
    model = load_for_inference(folder, quantize=quantize, dtype=torch.bfloat16, device="cuda")
    assert isinstance(model, Decoder)
    generator = torch.Generator().manual_seed(0)
    lengths = [1, 5, 17, 64, 130, 300, 511, 700]
    shared = torch.randint(3, 250, (200,), generator=generator).tolist()
    prompts = [torch.randint(3, 250, (n,), generator=generator).tolist() for n in lengths]
    prompts += [shared + prompt[:50] for prompt in prompts]

    def engine(num_pages: int = 2048, **changes: Any) -> Engine:
        config = replace(CONFIG, **changes)
        return Engine(NativeRunner(model, config, num_pages=num_pages), config=config)

    first = engine(max_num_seqs=1)
    alone = [ask(first, [prompt])[0] for prompt in prompts]
    together = engine()
    assert_same(ask(together, prompts), alone, "together")
    assert_same(ask(together, prompts), alone, "prefixes from the cache")
    assert together.stats().prefix_hits_tokens > 0
    assert_same(ask(engine(max_num_batched_tokens=96, step_ahead=True), prompts), alone, "in pieces, a step ahead")
    tight = engine(num_pages=80)
    assert_same(ask(tight, prompts), alone, "with few pages")
    assert tight.stats().num_preempted > 0
