"""The engine on a CUDA device: its pages and its attention give what the training forward gives there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tunesmith.checkpoint.load import load_decoder
from tunesmith.engine.llm import LLM
from tunesmith.engine.probe import probe_runner, stepwise_logits
from tunesmith.model.language_model import logits

pytestmark = pytest.mark.gpu
# Largest difference over largest logit: rounding of the dtype, a few times over.
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 5e-2}


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("family", ["qwen2", "mistral", "gpt2"])
def test_prefill_equals_decode_equals_training(
    family: str, dtype: torch.dtype, tiny_model_dir: Callable[..., Path]
) -> None:
    model = load_decoder(tiny_model_dir(family, initializer_range=0.1), device="cuda", dtype=dtype).eval()
    ids = torch.randint(0, 256, (60,), generator=torch.Generator().manual_seed(0)).tolist()
    whole = logits(model, [ids])[0].float()
    decoded = stepwise_logits(probe_runner(model, 128), ids, range(1, 61)).float()
    assert (decoded - whole).abs().max() / whole.abs().max() < TOLERANCES[dtype]


def test_sampling_on_the_device_is_reproducible(tiny_model_dir: Callable[..., Path]) -> None:
    llm = LLM(tiny_model_dir("qwen2"), device="cuda", max_running=3)
    prompts = ["one", "two, longer", "three"]
    first = llm.generate(prompts, max_tokens=20, temperature=1.0, seed=1)
    again = llm.generate(prompts, max_tokens=20, temperature=1.0, seed=1)
    assert [c.token_ids for c in first] == [c.token_ids for c in again]
    greedy = llm.generate(prompts, max_tokens=20)
    on_cpu = LLM(tiny_model_dir("qwen2"), device="cpu").generate(prompts, max_tokens=20)
    assert [c.token_ids[0] for c in greedy] == [c.token_ids[0] for c in on_cpu]
