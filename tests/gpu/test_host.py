"""The host never waits for a GPU within a step, times are the device's, and a bad step stops the ones after it."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tunesmith.errors import NonFiniteError
from tunesmith.recipe.load import recipe_from_mapping
from tunesmith.recipe.schema import TrainSection
from tunesmith.train.module_session import ModuleSession
from tunesmith.train.session import Session, build_session

pytestmark = pytest.mark.gpu
Guard = Callable[[], AbstractContextManager[None]]
CONFIG = {
    "model_type": "qwen2",
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
}


def _session(folder: Path, kind: str, **train: Any) -> Session:
    (folder / "config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
    recipe = {
        "model": {"path": str(folder), "weights": "random", "device": "cuda"},
        "data": {"format": "tokens", "max_length": 128, "max_rows": 8},
        "method": {"kind": kind},
        "train": {"max_steps": 20, "micro_batch_tokens": 512, "learning_rate": 3e-3, **train},
    }
    return build_session(recipe_from_mapping(recipe))


@pytest.mark.parametrize("kind", ["full", "lora", "qlora"])
@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit", "sgd"])
@pytest.mark.parametrize("checkpointing", ["none", "block", "selective"])
def test_queueing_a_step_never_waits(
    tmp_path: Path, kind: str, optimizer: str, checkpointing: str, no_waiting: Guard
) -> None:
    session = _session(tmp_path, kind, optimizer=optimizer, checkpointing=checkpointing, accumulation=2)
    for _ in range(3):
        session.step()
    with no_waiting():
        queued = [session.submit() for _ in range(3)]
    steps = [pending.read() for pending in queued]
    session.close()
    assert not queued[0].is_ready
    assert [step.step for step in steps] == [4, 5, 6]
    assert all(math.isfinite(step.loss) and step.duration_s > 0 for step in steps)


class _Slow(nn.Module):
    """One weight, and products that keep the device busy."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8192, device="cuda"))

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        busy = torch.ones(4096, 4096, device="cuda")
        for _ in range(20):
            busy = busy @ busy * 1e-6
        return self.weight.square().sum() * batch.sum() + busy[0, 0].clamp(max=0.0)


def _loss(module: nn.Module, batch: torch.Tensor) -> tuple[torch.Tensor, int]:
    return module(batch.to("cuda", non_blocking=True)), batch.numel()


def _plain(batches: list[torch.Tensor], optimizer: str) -> ModuleSession[torch.Tensor]:
    settings = TrainSection(optimizer=optimizer, learning_rate=1e-3, max_steps=20)
    return ModuleSession(_Slow(), lambda epoch: batches, _loss, settings, [])


def test_durations_add_up_to_the_time_that_passed() -> None:
    session = _plain([torch.ones(4).pin_memory() for _ in range(20)], "adamw")
    session.submit().read()
    torch.cuda.synchronize()
    session.clock.interrupt()
    began = time.perf_counter()
    queued = [session.submit() for _ in range(10)]
    total_s = sum(pending.read().duration_s for pending in queued)
    passed_s = time.perf_counter() - began
    session.close()
    assert total_s == pytest.approx(passed_s, rel=0.1, abs=0.005)


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit", "sgd"])
def test_steps_queued_after_a_bad_one_change_nothing(optimizer: str) -> None:
    values = [1.0, 1.0, math.nan, 1.0, 1.0]
    session = _plain([torch.full((4,), value).pin_memory() for value in values], optimizer)
    for _ in range(2):
        session.submit().read()
    before = [parameter.detach().clone() for parameter in session.module.parameters()]
    states = session.updater.optimizer.state.values()
    held = [value.clone() for state in states for value in state.values() if isinstance(value, torch.Tensor)]
    queued = [session.submit() for _ in range(3)]
    with pytest.raises(NonFiniteError, match="step 3: the loss is nan; nothing was updated"):
        queued[0].read()
    with pytest.raises(NonFiniteError, match="an earlier step was not finite"):
        queued[1].read()
    session.close()
    now = [value for state in states for value in state.values() if isinstance(value, torch.Tensor)]
    for after, then in zip([*session.module.parameters(), *now], [*before, *held], strict=True):
        assert torch.equal(after, then)
