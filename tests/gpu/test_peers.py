"""Peers beside ours on a GPU: the same work on the same random weights, in bfloat16, each peer that is installed."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from tunesmith.bench.peers.compare import compare
from tunesmith.recipe.load import recipe_from_mapping

pytestmark = pytest.mark.gpu
CONFIG = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "vocab_size": 4096,
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "eos_token_id": 2,
}


@pytest.mark.parametrize(
    ("peer", "package", "method", "checkpointing"),
    [
        ("transformers", "peft", "lora", "none"),
        ("transformers", "peft", "full", "block"),
        ("bitsandbytes", "bitsandbytes", "qlora", "none"),
        ("liger", "liger_kernel", "lora", "none"),
        ("trl", "trl", "lora", "none"),
    ],
)
def test_a_peer_does_equal_work(peer: str, package: str, method: str, checkpointing: str, tmp_path: Path) -> None:
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    (tmp_path / "shape").mkdir()
    (tmp_path / "shape" / "config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
    sections: dict[str, Any] = {
        "model": {"path": str(tmp_path / "shape"), "weights": "random", "dtype": "bfloat16", "device": "cuda"},
        "method": {"kind": method, "rank": 8, "alpha": 16},
        "data": {"format": "tokens", "max_length": 256, "validation_fraction": 0},
        "train": {
            "micro_batch_tokens": 1024,
            "learning_rate": 1e-4,
            "precision": "bfloat16",
            "master_weights": "compute",
            "checkpointing": checkpointing,
        },
        "bench": {"warmup_steps": 2, "steps": 8, "timeout_s": 280},
    }
    result = compare(recipe_from_mapping(sections), [peer], rounds=1, out=tmp_path / "out")
    from tunesmith.bench.peers.verdict import summarise

    ours, other = summarise(result.record)
    assert ours["verdict"] == "ours"
    assert other["verdict"] == "equal work"
    assert other["allocated_peak_bytes"] > 0
    assert result.record["key"]["timing"] == "continuous"
    assert {row["timing"] for row in result.record["rows"]} == {"continuous"}
    assert all(step["seconds"] > 0 for row in result.record["rows"] for step in row["steps"])
    assert all(len(row["steps"]) == 10 for row in result.record["rows"])
    assert (other["waits"] is not None) == (peer == "trl")
