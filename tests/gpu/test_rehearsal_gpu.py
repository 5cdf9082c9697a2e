"""On a GPU: what was rehearsed at the start is there when prompts come, so no step takes memory of the machine anew."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tunesmith.checkpoint.inference import load_for_inference
from tunesmith.engine.engine import Engine
from tunesmith.engine.loading import make_config, make_runner
from tunesmith.engine.request import SamplingParams

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
ROOT = Path(__file__).parents[2]


def test_steps_of_prompts_pin_no_memory_and_take_none_of_the_device() -> None:
    """Three of eighteen such steps stood still for as long as the device had work, in `sample`."""
    model: Any = load_for_inference(
        ROOT / "recipes/configs/qwen3-0.6b", dtype="bfloat16", device="cuda", weights="random"
    )
    config = make_config(model, max_model_len=2048)
    engine = Engine(make_runner(model, config), config=config)
    lengths = [100 + 37 * turn % 925 for turn in range(64)]
    for number, length in enumerate(lengths):
        params = SamplingParams(max_tokens=4, temperature=0.6, ignore_eos=True)
        engine.submit([number + 1, *range(2, length)], params)
    torch.cuda.synchronize()
    pinned = torch.cuda.host_memory_stats()["num_host_alloc"]
    taken = torch.cuda.memory_stats()["num_device_alloc"]
    while engine.has_work:
        engine.step()
    assert torch.cuda.host_memory_stats()["num_host_alloc"] == pinned
    # Blocks of 2 MiB for small tensors are not counted ahead.
    assert torch.cuda.memory_stats()["num_device_alloc"] - taken <= 4
