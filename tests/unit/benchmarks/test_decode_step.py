"""The bench of decoding steps: its bytes, and all of it on a tiny model on a CPU."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from tunesmith.checkpoint.load import load_decoder
from tunesmith.engine.config import EngineConfig
from tunesmith.engine.runner import NativeRunner

ROOT = Path(__file__).parents[3]
Make = Callable[..., Path]


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    spec = importlib.util.spec_from_file_location("decode_step", ROOT / "benchmarks" / "decode_step.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_a_batch_has_pages_of_its_own_for_each_request(bench: ModuleType) -> None:
    host = bench.host_batch(3, 33)
    assert host.tables.shape == (3, 3)
    assert len(np.unique(host.tables)) == 9
    assert host.slots.tolist() == [32, 32 + 48, 32 + 96]
    assert host.is_decode


@pytest.mark.parametrize("tied", [True, False])
def test_a_step_reads_weights_once_and_every_context(bench: ModuleType, tiny_model_dir: Make, tied: bool) -> None:
    decoder = load_decoder(tiny_model_dir("qwen2", tie_word_embeddings=tied))
    runner = NativeRunner(decoder, EngineConfig(max_model_len=64, max_num_seqs=2), num_pages=8)
    config = decoder.config
    token = 4 * 2 * config.num_key_value_heads * config.head_dim * config.num_hidden_layers
    held = sum(p.nbytes for p in decoder.parameters()) - (0 if tied else decoder.embedding.weight.nbytes)
    assert bench.step_bytes(runner, 2, 30) == held + 2 * 30 * token


def test_every_batch_and_mode_is_a_line(
    bench: ModuleType, tiny_model_dir: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--batch", "1", "3", "--context", "20", "--steps", "6", "--device", "cpu", "--bandwidth", "10"]
    bench.main([str(tiny_model_dir("llama")), *words, "--operators", "4"])
    start, *lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert start["graphs"] is None and start["refused"] == []
    assert [(line["batch"], line.get("mode", "operators")) for line in lines] == [
        (batch, mode) for batch in (1, 3) for mode in ("eager", "ahead", "operators")
    ]
    for line in lines:
        if "mode" in line:
            floor_ms = 1000 * line["moved_bytes"] / 10e9
            assert line["floor_ratio"] == pytest.approx(floor_ms / line["ms"], rel=0.01, abs=1e-4)
            assert 0 < line["ms"] <= line["worst_ms"]
        else:
            assert len(line["operators"]) == 4
            assert all(one["us"] > 0 for one in line["operators"])
    assert 0 < lines[1]["host_ms"] <= lines[1]["worst_ms"]
