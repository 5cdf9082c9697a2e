"""A step's split from a real device's trace, and a scaling run on real GPUs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tunesmith.bench.scale import scale
from tunesmith.bench.step_split import trace_split
from tunesmith.recipe.load import recipe_from_mapping

pytestmark = pytest.mark.gpu
CYCLES = 20_000_000  # about 10 ms


def test_a_pause_between_kernels_is_idle() -> None:
    """Two kernels of equal length, and the host asleep for several times that between them."""
    device = torch.device("cuda")

    def work() -> None:
        import time

        torch.cuda._sleep(CYCLES)
        torch.cuda.synchronize()
        time.sleep(0.1)
        torch.cuda._sleep(CYCLES)

    work()
    split = trace_split(work, device)
    assert split is not None
    assert split.exposed_ratio == split.communication_ratio == 0.0
    assert 0.1 < split.traced_s < 1.0
    assert split.idle_ratio * split.traced_s == pytest.approx(0.1, rel=0.2)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("strategy", ["zero3", "ddp"])
def test_one_and_two_gpus(tiny_model_dir: Callable[..., Path], tmp_path: Path, strategy: str) -> None:
    recipe = recipe_from_mapping(
        {
            "model": {"path": str(tiny_model_dir("qwen2", hidden_size=512, intermediate_size=1536)), "device": "cuda"},
            "method": {"kind": "full"},
            "data": {"format": "tokens", "max_length": 512, "max_rows": 256, "validation_fraction": 0},
            "train": {"micro_batch_tokens": 2048, "precision": "bfloat16"},
            "parallel": {"strategy": strategy},
            "bench": {"warmup_steps": 2, "steps": 4},
            "output": str(tmp_path),
        }
    )
    result = scale(recipe, gpus=[1, 2], mode="both")
    assert [(cell["status"], cell["reason"]) for cell in result.cells] == [("ok", None)] * 4
    for cell in result.cells:
        found = cell["summary"]
        assert abs(found["states"]["difference_percent"]) < 5
        assert sum(found["parts"].values()) == pytest.approx(found["step_s"])
        assert all(part >= 0 for part in found["parts"].values())
        assert found["parts"]["optimizer_s"] > 0
        assert (found["parts"]["exposed_s"] > 0) == (cell["gpus"] == 2)
        assert (found["link"] is not None) == (cell["gpus"] == 2)
        assert cell["ranks"][0]["memory"]["allocated_at_rest_bytes"] > 0
