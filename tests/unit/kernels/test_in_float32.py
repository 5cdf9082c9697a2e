"""What is computed in float32 on a CPU, in place by torch and by our own C++, against the references."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tunesmith.kernels import cpu_train
from tunesmith.kernels.cross_entropy import IGNORED, cross_entropy_and_grad_, cross_entropy_and_grad_reference_
from tunesmith.kernels.in_float32 import in_float32_on_cpu
from tunesmith.kernels.rms_norm import (
    rms_norm,
    rms_norm_again,
    rms_norm_backward,
    rms_norm_backward_reference,
    rms_norm_reference,
)
from tunesmith.kernels.rope import rope_, rope_reference_, rope_tables_half
from tunesmith.kernels.swiglu import swiglu, swiglu_backward, swiglu_backward_reference, swiglu_reference
from tunesmith.kernels.swiglu_low_rank import (
    swiglu_low_rank,
    swiglu_low_rank_backward,
    swiglu_low_rank_backward_reference,
    swiglu_low_rank_reference,
)

Pair = tuple[Tensor | None, Tensor | None]
# Sums of a few products in another order.
CLOSE: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}
SHAPES = [(1, 48), (3, 200), (17, 96), (2, 3584)]


@pytest.fixture(params=["torch", "compiled"], autouse=True)
def compiled(request: pytest.FixtureRequest) -> bool:
    """Whether the operations are our own C++."""
    if request.param == "compiled":
        request.getfixturevalue("cpu_operations")
    return bool(request.param == "compiled")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_only_float32_on_a_cpu(compiled: bool) -> None:
    assert cpu_train.takes(torch.zeros(2)) == compiled
    x = torch.zeros(2)
    assert in_float32_on_cpu(x, None)
    assert not in_float32_on_cpu(x, x.bfloat16())
    assert not in_float32_on_cpu(x, x.to("meta"))


@pytest.mark.parametrize(("rows", "width"), SHAPES)
@pytest.mark.parametrize("over_the_input", [True, False])
def test_swiglu(rows: int, width: int, over_the_input: bool) -> None:
    gate_up, grad_h = random(rows, 2 * width), random(rows, width, seed=1)
    torch.testing.assert_close(swiglu(gate_up), swiglu_reference(gate_up), **CLOSE)
    expected, _ = swiglu_backward_reference(grad_h, gate_up, False)
    forward, before, grad_before = swiglu(gate_up), gate_up.clone(), grad_h.clone()
    grad, h = swiglu_backward(grad_h, gate_up, True, gate_up if over_the_input else None)
    torch.testing.assert_close(grad, expected, **CLOSE)
    assert h is not None
    assert torch.equal(h, forward)
    assert torch.equal(grad_h, grad_before)
    assert (grad is gate_up) if over_the_input else torch.equal(gate_up, before)


@pytest.mark.parametrize("adapted", ["both", "first", "second"])
@pytest.mark.parametrize("over_the_input", [True, False])
def test_swiglu_with_adapters(adapted: str, over_the_input: bool) -> None:
    gate_up, grad_h = random(17, 96), random(17, 48, seed=1)
    low: Pair = (random(17, 5, seed=2), random(96, 5, seed=3)) if adapted != "second" else (None, None)
    dlow: Pair = (random(17, 3, seed=4), random(3, 48, seed=5)) if adapted != "first" else (None, None)
    torch.testing.assert_close(swiglu_low_rank(gate_up, *low), swiglu_low_rank_reference(gate_up, *low), **CLOSE)
    expected = swiglu_low_rank_backward_reference(grad_h, gate_up, *low, *dlow, True)
    before = gate_up.clone()
    mine = swiglu_low_rank_backward(grad_h, gate_up, *low, *dlow, True, gate_up if over_the_input else None)
    torch.testing.assert_close(mine, expected, **CLOSE)
    assert (mine[0] is gate_up) if over_the_input else torch.equal(gate_up, before)


@pytest.mark.parametrize("shape", [(1, 48), (17, 200), (5, 3, 16)])
@pytest.mark.parametrize("with_stream", [True, False])
def test_rms_norm(shape: tuple[int, ...], with_stream: bool, compiled: bool) -> None:
    x, weight, grad_y = random(*shape), random(shape[-1], seed=1), random(*shape, seed=2)
    add = random(*shape, seed=3) if with_stream else None
    y, rstd = rms_norm(x, weight, 1e-6)
    expected = rms_norm_reference(x, weight, 1e-6)[0]
    torch.testing.assert_close(y, expected, rtol=1e-6 if compiled else 0, atol=0)
    assert torch.equal(rms_norm_again(x, weight, rstd), y)
    given = grad_y.clone()
    mine = rms_norm_backward(grad_y, x, weight, rstd, add, True)
    torch.testing.assert_close(mine, rms_norm_backward_reference(grad_y, x, weight, rstd, add, True), **CLOSE)
    assert torch.equal(grad_y, given)


@pytest.mark.parametrize("inverse", [True, False])
def test_rope_of_the_first_heads_of_a_wider_tensor(inverse: bool) -> None:
    tables = rope_tables_half(torch.tensor([1.0, 0.1, 0.01]), torch.arange(7))
    mine = random(7, 5, 6)
    expected = mine.clone()
    rope_(mine[:, :3], *tables, inverse=inverse)
    rope_reference_(expected[:, :3], *tables, inverse=inverse)
    torch.testing.assert_close(mine, expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(mine[:, 3:], expected[:, 3:])


@pytest.mark.parametrize("scale", [1.0, 0.25, torch.tensor(0.25), torch.tensor([0.25])])
def test_cross_entropy_with_ignored_and_impossible_targets(scale: Tensor | float) -> None:
    logits, targets = random(9, 208)[:, :200] * 30, torch.tensor([0, 199, IGNORED, 7, 200, -1, 3, 4, IGNORED])
    expected_logits = logits.clone()
    expected = cross_entropy_and_grad_reference_(expected_logits, targets, scale)
    losses = cross_entropy_and_grad_(logits, targets, scale)
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-5, equal_nan=True)
    torch.testing.assert_close(logits, expected_logits, rtol=1e-5, atol=1e-6)
    assert losses[2] == losses[8] == 0
    assert not logits[2].any()
