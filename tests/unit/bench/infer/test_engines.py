"""Runners that can be asked here: ours, transformers', and the reader of checkpoints for GGUF."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tunesmith.bench.infer.checkpoint import write_random
from tunesmith.bench.infer.ours import Ours
from tunesmith.bench.infer.peers import vllm
from tunesmith.bench.infer.peers.gguf_file import tensors
from tunesmith.bench.infer.peers.transformers import Transformers
from tunesmith.bench.infer.protocol import NotApplicableError


def _job(model: Path, **changes: Any) -> dict[str, Any]:
    job = {
        "model": str(model),
        "weights": "checkpoint",
        "format": "float32",
        "device": "cpu",
        "threads": 1,
        "options": {},
    }
    return {**job, "temperature": 0.6, "max_model_len": 64, **changes}


@pytest.mark.parametrize("engine", [Ours, Transformers])
@pytest.mark.parametrize("weights", ["checkpoint", "random"])
def test_as_many_tokens_as_asked_for(engine: Any, weights: str, tiny_model_dir: Callable[..., Path]) -> None:
    made = engine(_job(tiny_model_dir("qwen2"), weights=weights))
    assert made.generate([[5, 6, 7], [8] * 9, [4]], [4, 7, 1]) == [4, 7, 1]
    assert made.facts()["weights_bytes"] > 50_000


def test_formats_of_vllm() -> None:
    job = _job(Path("x"), device="cuda", format="fp8", options={"enforce_eager": True})
    assert vllm.arguments(job)["quantization"] == "fp8"
    assert vllm.arguments(job)["enforce_eager"] is True
    random = vllm.arguments({**job, "format": "int4", "weights": "random"})
    assert random["load_format"] == "dummy" and random["hf_overrides"]["quantization_config"]["bits"] == 4
    with pytest.raises(NotApplicableError, match="int4"):
        vllm.arguments({**job, "format": "int4"})


def test_a_checkpoint_is_read_without_torch(tmp_path: Path) -> None:
    written = {"a": torch.randn(3, 4).to(torch.bfloat16), "b": torch.randn(5), "c": torch.randn(2, 2).to(torch.float16)}
    save_file(written, tmp_path / "model.safetensors")
    read = dict(tensors(tmp_path))
    for name, tensor in written.items():
        assert torch.equal(torch.from_numpy(read[name]), tensor.float())


@pytest.mark.timeout(120)
def test_random_weights_are_written_once(tiny_model_dir: Callable[..., Path], tmp_path: Path) -> None:
    target = write_random(tiny_model_dir("qwen3"), tmp_path / "weights", "bfloat16")
    loaded = load_file(next(target.glob("*.safetensors")))
    assert loaded["model.embed_tokens.weight"].dtype == torch.bfloat16
    assert (target / "config.json").is_file() and (target / "tokenizer.json").is_file()
