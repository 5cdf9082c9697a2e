"""The 8-bit AdamW kernel against its reference on a GPU, and updates in the backward pass there."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tunesmith.kernels.adam8bit import update, update_reference
from tunesmith.kernels.adam8bit_moments import BLOCK, AdamSettings, Moments
from tunesmith.recipe.schema import TrainSection
from tunesmith.train.update import Updater

pytestmark = pytest.mark.gpu


def _moments(count: int) -> Moments:
    blocks = -(-count // BLOCK)
    codes = torch.zeros(count, dtype=torch.uint8, device="cuda")
    return Moments(codes + 127, torch.zeros(blocks, device="cuda"), codes, torch.zeros(blocks, device="cuda"))


@pytest.mark.parametrize("count", [1, 200, 257, 3584 * 17 + 48, 5_000_001])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_kernel_equals_the_reference(count: int, dtype: torch.dtype) -> None:
    generator = torch.Generator("cuda").manual_seed(count)
    weight = torch.randn(count, device="cuda", generator=generator).to(dtype)
    held, divisor, go = _moments(count), torch.tensor(2.5, device="cuda"), torch.zeros((), device="cuda")
    for number in (1, 2, 3):
        grad = torch.randn(count, device="cuda", generator=generator).to(dtype)
        settings = AdamSettings(number, 1e-2, (0.9, 0.999), 1e-8, 0.1)
        mine, mine_held = weight.clone(), Moments(*(tensor.clone() for tensor in vars(held).values()))
        update(mine, grad, mine_held, settings, divisor, torch.ones_like(go))
        assert torch.equal(mine, weight)
        update(mine, grad, mine_held, settings, divisor, go)
        update_reference(weight, grad, held, settings, divisor, go)
        rtol = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype]
        torch.testing.assert_close(mine, weight, rtol=rtol, atol=1e-6)
        for name in ("mean_codes", "square_codes"):
            off = (getattr(mine_held, name).int() - getattr(held, name).int()).abs()
            assert off.max() <= 1
            assert (off > 0).float().mean() <= 1 / min(count, 1000)  # ties within rounding
        weight, held = mine, mine_held


def _loss(module: nn.Module, batch: torch.Tensor) -> tuple[torch.Tensor, int]:
    return (module(batch) - batch).square().sum(), len(batch)


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit", "sgd"])
def test_updates_in_the_backward_pass_are_the_same_bits(optimizer: str) -> None:
    outcomes = []
    for within in (False, True):
        torch.manual_seed(0)
        module = nn.Sequential(nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 128)).cuda()
        settings = TrainSection(
            optimizer=optimizer, learning_rate=1e-2, max_grad_norm=0.0, optimizer_in_backward=within
        )
        updater = Updater(module, settings, 5)
        batch = torch.randn(32, 128, device="cuda")
        queued = [updater.submit(i, [batch], _loss, denominator=32, describe=str) for i in range(5)]
        losses = [pending.read().loss for pending in queued]
        outcomes.append((losses, [parameter.detach().clone() for parameter in module.parameters()]))
    (after, expected), (inside, got) = outcomes
    assert after == inside
    assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))
