"""A model that two GPUs share says what one says, and a process that dies is an error, not a hang."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tunesmith.checkpoint.load import load_decoder
from tunesmith.engine.config import EngineConfig
from tunesmith.engine.engine import Engine
from tunesmith.engine.request import SamplingParams
from tunesmith.engine.runner import NativeRunner
from tunesmith.engine.tensor_serving import SharedSource
from tunesmith.engine.tensor_shared import load_shared
from tunesmith.errors import ParallelError

pytestmark = pytest.mark.gpu
WIDE = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 16}


def answers(engine: Engine) -> list[list[int]]:
    params = [SamplingParams(max_tokens=30), SamplingParams(max_tokens=30, temperature=0.8, seed=1)]
    ids = [engine.submit([5, 6, 7 + n] * 8, params[n % 2]) for n in range(6)]
    done: dict[int, list[int]] = {}
    while engine.has_work:
        done.update({o.request_id: o.completion.token_ids for o in engine.step() if o.completion is not None})
    return [done[i] for i in ids]


@pytest.mark.parametrize("enforce_eager", [True, False])
def test_two_gpus_say_what_one_says(enforce_eager: bool, tiny_model_dir: Callable[..., Path]) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    directory = tiny_model_dir("qwen3", initializer_range=0.2, **WIDE)
    config = EngineConfig(
        max_model_len=256,
        max_num_seqs=8,
        max_num_batched_tokens=128,
        step_ahead=True,
        gpu_memory_utilization=0.3,
        enforce_eager=enforce_eager,
    )
    one = load_decoder(directory, device="cuda", dtype=torch.float32).eval()
    expected = answers(Engine(NativeRunner(one, config, 100), config=config))
    model = load_shared(SharedSource(str(directory), dtype="float32", device_type="cuda"), 2)
    try:
        runner = model.runner(config)
        runner.warm_up()
        engine = Engine(runner, config=config)
        assert answers(engine) == expected
        assert answers(engine) == expected
        assert enforce_eager or (runner.graphs is not None and runner.graphs.stats.num_replays > 0)
        engine.submit([5, 6, 7], SamplingParams(max_tokens=200))
        engine.step()
        os.kill(model.team.workers[0].process.pid, signal.SIGKILL)
        with pytest.raises(ParallelError, match="exit code -9"):
            while engine.has_work:
                engine.step()
    finally:
        model.close()
