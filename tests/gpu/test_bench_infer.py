"""`bench infer` on a GPU: every weight format of ours is measured, and takes fewer bytes than bf16 where it should."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tunesmith.bench.infer.compare import InferBench, bench_infer
from tunesmith.bench.infer.workload import InferWorkload

CONFIG = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "vocab_size": 8192,
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "bos_token_id": None,
    "eos_token_id": 2,
}


@pytest.mark.gpu
@pytest.mark.timeout(900)
def test_every_format(tmp_path: Path) -> None:
    model = tmp_path / "shape"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
    workload = InferWorkload(
        kinds=("latency", "throughput", "prefill"),
        latency_tokens=(32, 32),
        requests=24,
        lengths=(16, 64),
        prefill=(4, 256),
        samples=1,
    )
    bench = InferBench(
        model=str(model),
        formats=("bf16", "fp8", "int8", "int4", "nf4"),
        weights="random",
        device="cuda",
        workload=workload,
        threads=4,
        options={"gpu_memory_utilization": 0.2},
    )
    result = bench_infer(bench, run_dir=tmp_path / "run")
    rows = {row["format"]: row for row in result.rows}
    assert {name: row["reason"] for name, row in rows.items() if row["status"] != "ok"} == {}
    assert all(row["short"] == 0 and row["measures"]["latency"]["tpot_s"]["median"] > 0 for row in rows.values())
    sizes = {name: row["weights_bytes"] for name, row in rows.items()}
    assert sizes["int4"] < sizes["int8"] < sizes["bf16"]
    assert rows["bf16"]["device_peak_bytes"] >= sizes["bf16"]
