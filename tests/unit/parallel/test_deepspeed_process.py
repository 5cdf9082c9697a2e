"""What DeepSpeed keeps in a process does not hold up the engines that come after."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from tunesmith.errors import ParallelError
from tunesmith.parallel.mesh import joined
from tunesmith.recipe.parallel import ParallelSection
from tunesmith.recipe.schema import TrainSection
from tunesmith.train.deepspeed_update import DeepSpeedUpdater, deepspeed_config

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed: pip install deepspeed"
)
STEPS = 4


def train() -> list[float]:
    """The losses of a module under ZeRO-3: the same rows in all processes, so any number of them has the same."""
    settings = ParallelSection(strategy="zero3", engine="deepspeed")
    recipe = TrainSection(learning_rate=1e-2, schedule="constant", warmup_ratio=0.0, precision="float32")
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    rows = torch.arange(12.0).view(3, 4) / 12

    def loss(called: nn.Module, batch: Any) -> tuple[Any, int]:
        return called(batch).square().sum(), len(batch)

    with joined(settings, "cpu") as mesh:
        config = deepspeed_config(settings, recipe, module, STEPS, mesh, micro_batches=1)
        updater = DeepSpeedUpdater(module, recipe, STEPS, config, mesh)
        items = len(rows) * mesh.world_size
        losses = [updater.step(n, [rows], loss, denominator=items, describe=str).loss for n in range(STEPS)]
        updater.close()
    return losses


def refused_without_counter() -> str:
    """What `number_alike` says where it does not find DeepSpeed's counter, and only the first rank had an engine."""
    from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload
    from deepspeed.runtime.zero.partition_parameters import Init

    from tunesmith.parallel.deepspeed_process import number_alike

    kept, number = DeepSpeedZeRoOffload._register_deepspeed_module, Init.param_id
    DeepSpeedZeRoOffload._register_deepspeed_module = lambda self, module: None
    try:
        number_alike(torch.device("cpu"))  # alike: nothing to say
        Init.param_id += torch.distributed.get_rank() + 1
        with pytest.raises(ParallelError) as caught:
            number_alike(torch.device("cpu"))
    finally:
        DeepSpeedZeRoOffload._register_deepspeed_module, Init.param_id = kept, number
    return str(caught.value)


def test_processes_that_had_other_engines_before_train_together(ranks: Callable[..., list[Any]]) -> None:
    """A process that had a ZeRO-3 engine numbered its modules on from there: beside a new one, all stood still."""
    (alone,) = ranks(train, 1)
    assert alone[-1] < alone[0]
    for world_size in (2, 1, 2):
        for losses in ranks(train, world_size, timeout_s=90):
            assert losses == pytest.approx(alone, rel=1e-5)


def test_where_deepspeed_counts_elsewhere_all_are_told(ranks: Callable[..., list[Any]]) -> None:
    ranks(train, 2)  # whatever either had before, they agree from here on
    for message in ranks(refused_without_counter, 2):
        assert message.endswith("train in new processes")
