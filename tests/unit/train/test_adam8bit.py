"""8-bit AdamW: its path against float32 AdamW."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tunesmith.kernels.adam8bit_moments import BLOCK
from tunesmith.train.adam8bit import SMALLEST_QUANTISED, AdamW8bit

SETTINGS = {"lr": 0.05, "betas": (0.9, 0.99), "eps": 1e-8}


def _descend(make: type, weight: torch.Tensor, steps: int = 150, **more: object) -> torch.Tensor:
    """Minimise a badly scaled quadratic, sum(c * (w - 1)^2) with c from 0.01 to 10, plus noise in the gradient."""
    parameter = nn.Parameter(weight.clone())
    optimizer = make([parameter], weight_decay=0.01, **SETTINGS, **more)
    scale = torch.logspace(-2, 1, weight.numel()).view_as(weight)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        noise = torch.randn(weight.shape, generator=generator)
        parameter.grad = 2 * scale * (parameter.detach() - 1) + 0.01 * noise
        optimizer.step()
    return parameter.detach()


def test_small_tensors_follow_float32_adamw_exactly() -> None:
    weight = torch.randn(SMALLEST_QUANTISED - 1, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(_descend(AdamW8bit, weight), _descend(torch.optim.AdamW, weight), rtol=1e-4, atol=1e-5)


def test_large_tensors_come_near_float32_adamw() -> None:
    weight = torch.randn(96, 64, generator=torch.Generator().manual_seed(1))
    ours, exact = _descend(AdamW8bit, weight), _descend(torch.optim.AdamW, weight)
    assert (ours - exact).norm() / exact.norm() < 0.03
    assert (ours - 1).square().mean() < 1.3 * (exact - 1).square().mean()


def test_as_near_to_float32_as_bitsandbytes() -> None:
    optim = pytest.importorskip("bitsandbytes.optim")
    weight = torch.randn(96, 64, generator=torch.Generator().manual_seed(1))
    try:
        theirs = _descend(optim.AdamW8bit, weight)
    except (RuntimeError, NotImplementedError, AttributeError) as error:
        pytest.skip(f"bitsandbytes' 8-bit optimiser does not run on this CPU: {error}")
    exact = _descend(torch.optim.AdamW, weight)
    ours = _descend(AdamW8bit, weight)
    assert (ours - exact).norm() < 1.25 * (theirs - exact).norm()


def test_slices_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(100, 100, generator=torch.Generator().manual_seed(2))
    whole = _descend(AdamW8bit, weight, steps=5)
    monkeypatch.setattr("tunesmith.kernels.adam8bit.SLICE", 4 * BLOCK)
    assert torch.equal(_descend(AdamW8bit, weight, steps=5), whole)


def test_states_take_two_bytes_and_a_bit() -> None:
    parameter = nn.Parameter(torch.randn(128, 128))
    optimizer = AdamW8bit([parameter], weight_decay=0.0, **SETTINGS)
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    held = sum(v.numel() * v.element_size() for v in optimizer.state[parameter].values() if isinstance(v, torch.Tensor))
    assert held == 2 * (parameter.numel() + 4 * parameter.numel() // BLOCK)


def test_bfloat16_weights_are_updated() -> None:
    parameter = nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16))
    optimizer = AdamW8bit([parameter], weight_decay=0.0, **SETTINGS)
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    torch.testing.assert_close(parameter.detach(), torch.full_like(parameter, 0.95))


def test_beside_a_large_gradient_a_small_one_makes_no_huge_step() -> None:
    """Second moments far below their block's largest were rounded to zero; where the gradient then was zero, as rare
    tokens' is, the update was the first moment divided by eps: thousands of learning rates."""
    parameter = nn.Parameter(torch.zeros(8192))
    optimizer = AdamW8bit([parameter], lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    generator = torch.Generator().manual_seed(1)
    scale = torch.full((8192,), 1e-4)
    scale[::BLOCK] = 1.0
    for step in range(60):
        parameter.grad = torch.randn(8192, generator=generator) * scale
        if step % 10 == 9:
            parameter.grad[1::2] = 0
        before = parameter.detach().clone()
        optimizer.step()
        assert float((parameter.detach() - before).abs().max()) < 5e-3
