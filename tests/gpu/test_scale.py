"""A step's split from a real device's trace, and a scaling run on real GPUs."""

from __future__ import annotations

import json
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


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_an_nf4_base_is_shared_from_the_moment_it_is_loaded(
    tiny_model_dir: Callable[..., Path], tmp_path: Path
) -> None:
    """Twelve blocks of 67 million values, 38 MB each in NF4 (35 with scales quantised too, as DDP holds them). With DDP
    each process holds all; with zero3 its half and one block, and both what is outside and what quantising takes."""
    shape = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 12, "vocab_size": 8192}
    model = tiny_model_dir("llama", hidden_size=64, num_attention_heads=4)
    config = {**json.loads((model / "config.json").read_text()), **shape, "num_attention_heads": 16}
    (tmp_path / "shape").mkdir()
    (tmp_path / "shape" / "config.json").write_text(json.dumps({**config, "num_key_value_heads": 16, "head_dim": 128}))
    found = {}
    for strategy in ("ddp", "zero3"):
        recipe = recipe_from_mapping(
            {
                "model": {"path": str(tmp_path / "shape"), "device": "cuda", "weights": "random"},
                "method": {"kind": "qlora", "rank": 8},
                "data": {"format": "tokens", "max_length": 512, "max_rows": 256, "validation_fraction": 0},
                "train": {"micro_batch_tokens": 1024, "precision": "bfloat16", "checkpointing": "block"},
                "parallel": {"strategy": strategy},
                "bench": {"warmup_steps": 2, "steps": 4},
                "output": str(tmp_path / strategy),
            }
        )
        (cell,) = scale(recipe, gpus=[2], mode="weak").cells
        assert (cell["status"], cell["reason"]) == ("ok", None)
        found[strategy] = cell["summary"]
    assert found["zero3"]["losses"] == pytest.approx(found["ddp"]["losses"], rel=2e-3)
    assert abs(found["zero3"]["states"]["difference_percent"]) < 5
    saved = found["ddp"]["memory"]["loading_peak_bytes"] - found["zero3"]["memory"]["loading_peak_bytes"]
    assert saved > 0.8 * (12 * 35e6 - 11 * 38e6 / 2 - 38e6)
