"""FSDP2 with shares that wait on the host, in a group of one process on one GPU: the weights of no sharding at all."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from tunesmith.parallel.data import Sharded
from tunesmith.parallel.full_shard import FullShard
from tunesmith.parallel.mesh import DIMENSIONS, Mesh, Place
from tunesmith.recipe.schema import TrainSection
from tunesmith.train.update import Updater
from tunesmith.units import MIB

pytestmark = pytest.mark.gpu
WIDTH, LAYERS, STEPS = 1024, 8, 6


@pytest.fixture
def mesh() -> Iterator[Mesh]:
    """torch's group of one process; gloo beside NCCL sums what lies on the host, as `joined` has it."""
    import torch.distributed as dist

    device = torch.device("cuda", 0)
    os.environ.setdefault("LOCAL_RANK", "0")
    dist.init_process_group("cpu:gloo,cuda:nccl", store=dist.HashStore(), rank=0, world_size=1, device_id=device)
    try:
        yield Mesh(Place(), device, dist.device_mesh.init_device_mesh("cuda", (1, 1, 1), mesh_dim_names=DIMENSIONS))
    finally:
        dist.destroy_process_group()


def _module() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS))).cuda()


def _loss(module: nn.Module, batch: Tensor) -> tuple[Tensor, int]:
    return (module(batch) - batch).square().sum(), len(batch)


def _train(updater: Updater) -> list[float]:
    losses = []
    for step in range(STEPS):
        generator = torch.Generator("cuda").manual_seed(step)
        window = [torch.randn(16, WIDTH, device="cuda", generator=generator) for _ in range(2)]
        losses.append(updater.step(step, window, _loss, denominator=32, describe=lambda _: "").loss)
    return losses


def test_it_trains_as_one_does_and_holds_little(mesh: Mesh) -> None:
    section = TrainSection(learning_rate=1e-3, schedule="constant", warmup_ratio=0.0)
    module = _module()
    expected = _train(Updater(module, section, STEPS))
    weights = [parameter.detach().cpu() for parameter in module.parameters()]
    del module
    gc.collect()  # hooks and what they hang on are a circle
    torch.cuda.empty_cache()
    others = torch.cuda.memory_allocated()  # cuBLAS' own
    offloaded = _module()
    spread = Sharded(offloaded, FullShard(mesh, "zero3", offloads=True), blocks=list(offloaded))
    updater = Updater(offloaded, section, STEPS, spread)
    assert {piece.local.device.type for piece in updater.pieces} == {"cpu"}
    before = torch.cuda.memory_allocated()
    assert before - others < 4 * MIB, "weights wait on the host"
    torch.cuda.reset_peak_memory_stats()
    assert _train(updater) == pytest.approx(expected, rel=1e-5)
    block = WIDTH * WIDTH * 4
    assert torch.cuda.max_memory_allocated() - before < LAYERS * block, "of eight blocks a few are there at a time"
    for piece, weight in zip(updater.pieces, weights, strict=True):
        torch.testing.assert_close(piece.local.detach(), weight, rtol=1e-3, atol=1e-5)
        assert {value.device.type for value in updater.optimizer.state[piece.local].values()} == {"cpu"}
