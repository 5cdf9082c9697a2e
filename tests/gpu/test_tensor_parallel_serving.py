"""A model that two GPUs share says what one says, and a process that dies is an error, not a hang."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tunesmith.checkpoint.inference import load_for_inference
from tunesmith.engine.config import EngineConfig
from tunesmith.engine.engine import Engine
from tunesmith.engine.request import SamplingParams
from tunesmith.engine.runner import NativeRunner
from tunesmith.engine.tensor_serving import SharedSource
from tunesmith.engine.tensor_shared import SharedModel, load_shared
from tunesmith.errors import ParallelError
from tunesmith.model.language_model import logits

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]
WIDE = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
}
CONFIG: dict[str, Any] = {
    "max_model_len": 256,
    "max_num_seqs": 8,
    "max_num_batched_tokens": 128,
    "step_ahead": True,
    "gpu_memory_utilization": 0.3,
}
DOCUMENTS = [[5, 6, 7, 200, 31, 9] * 5, [77, 1, 3]]


@pytest.fixture(autouse=True)
def _two_gpus(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Without NCCL's multicast over NVLink, which needs rights on the host's switches."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    if "NCCL_NVLS_ENABLE" not in os.environ:
        monkeypatch.setenv("NCCL_NVLS_ENABLE", "0")
    yield
    gc.collect()
    torch.cuda.empty_cache()


def answers(engine: Engine) -> list[list[int]]:
    params = [SamplingParams(max_tokens=30), SamplingParams(max_tokens=30, temperature=0.8, seed=1)]
    ids = [engine.submit([5, 6, 7 + n] * 8, params[n % 2]) for n in range(6)]
    done: dict[int, list[int]] = {}
    while engine.has_work:
        done.update({o.request_id: o.completion.token_ids for o in engine.step() if o.completion is not None})
    return [done[i] for i in ids]


def one_gpu(directory: Path, config: EngineConfig) -> list[list[int]]:
    """What one process says."""
    whole: Any = load_for_inference(directory, device="cuda", dtype="float32")
    return answers(Engine(NativeRunner(whole, config, 100), config=config))


def shared(directory: Path, quantize: str | None = None) -> SharedModel:
    return load_shared(SharedSource(str(directory), quantize, dtype="float32", device_type="cuda"), 2)


@pytest.mark.parametrize("enforce_eager", [True, False])
def test_two_gpus_say_what_one_says(enforce_eager: bool, tiny_model_dir: Callable[..., Path]) -> None:
    directory = tiny_model_dir("qwen3", initializer_range=0.2, **WIDE)
    config = EngineConfig(**CONFIG, enforce_eager=enforce_eager)
    expected = one_gpu(directory, config)
    model = shared(directory)
    try:
        runner = model.runner(config)
        runner.warm_up()
        engine = Engine(runner, config=config)
        assert answers(engine) == expected
        assert answers(engine) == expected
        if not enforce_eager:
            assert runner.graphs is not None and runner.graphs.refused == {}
            assert runner.graphs.stats.num_replays > 0
        engine.submit([5, 6, 7], SamplingParams(max_tokens=200))
        engine.step()
        os.kill(model.team.workers[0].process.pid, signal.SIGKILL)
        with pytest.raises(ParallelError, match="exit code -9"):
            while engine.has_work:
                engine.step()
    finally:
        model.close()


@pytest.mark.parametrize(
    ("quantize", "tolerance"), [("int8", 1e-3), ("w8a8", 1e-2), ("int4", 1e-3), ("fp8", 5e-2), ("nf4", 1e-3)]
)
def test_formats(quantize: str, tolerance: float, tiny_model_dir: Callable[..., Path]) -> None:
    """Logits of one process, and steps that are recorded with the sums, and the largest of rows, in them.

    A rounding of sums in another order may move a code of W8A8 or fp8 by one; fp8 products are rounded to bfloat16.
    """
    directory = tiny_model_dir("qwen3", initializer_range=0.1, **WIDE)
    whole: Any = load_for_inference(directory, quantize=quantize, device="cuda", dtype="float32")
    expected = torch.cat(logits(whole, DOCUMENTS)).float()
    model = shared(directory, quantize)
    try:
        got = torch.cat(model.logits(DOCUMENTS)).float()
        assert float((got - expected).abs().max() / expected.abs().max()) < tolerance
        config = EngineConfig(**CONFIG)
        runner = model.runner(config)
        assert all(len(said) == 30 for said in answers(Engine(runner, config=config)))
        assert runner.graphs is not None and runner.graphs.refused == {} and runner.graphs.stats.num_replays > 0
    finally:
        model.close()
