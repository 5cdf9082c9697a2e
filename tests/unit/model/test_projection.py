"""Adapters added to the weight before the product, where there are enough tokens on a CPU in float32."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tunesmith.model.layers import Linear
from tunesmith.model.lora import AdaptedLinear, AdapterOptions
from tunesmith.model.low_rank import refresh
from tunesmith.model.projection import Projection
from tunesmith.model.projections import projection_of

MANY, FEW = 64, 5
PARTS = {"gate_proj": 14, "up_proj": 14}


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def adapted(names: tuple[str, ...], bias: bool = False) -> tuple[AdaptedLinear, Projection]:
    base = Linear(12, PARTS, bias)
    base.weight.data.copy_(random(28, 12))
    if base.bias is not None:
        base.bias.data.copy_(random(28, seed=9))
    linear = AdaptedLinear(base, PARTS, {name: AdapterOptions(rank, 6.0) for rank, name in enumerate(names, 2)})
    for seed, parameter in enumerate(linear.adapters.parameters(), 20):
        parameter.data.copy_(random(*parameter.shape, seed=seed))
    projection = projection_of(linear, torch.float32)
    assert projection is not None
    assert projection.low_rank is not None
    refresh([projection.low_rank])
    return linear, projection


@pytest.mark.parametrize("num_tokens", [MANY, FEW])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("names", [tuple(PARTS), ("gate_proj",), ("up_proj",)])
def test_forward_and_gradients_are_autograds(names: tuple[str, ...], bias: bool, num_tokens: int) -> None:
    linear, projection = adapted(names, bias)
    assert projection.merges(random(num_tokens, 12)) == (num_tokens == MANY)
    x, g, residual = random(num_tokens, 12, seed=1).requires_grad_(), random(num_tokens, 28, seed=2), random(28, seed=3)
    expected = linear(x) + residual
    wanted = torch.autograd.grad(expected, [x, *projection.trained], g)
    with torch.no_grad():
        for stream in (None, residual.expand(num_tokens, 28)):
            y, low, free = projection.forward(x, stream)
            torch.testing.assert_close(y if stream is not None else y + residual, expected, rtol=1e-5, atol=1e-4)
        dx, dlow = projection.input_grad(g)
        for given in (dlow, None):
            mine = [dx, *projection.parameter_grads(g, x, (low, given, free))]
            torch.testing.assert_close(mine, list(wanted), rtol=1e-4, atol=1e-3)
    assert all(gradient.is_contiguous() for gradient in mine)


def test_the_base_is_left_as_it_was() -> None:
    linear, projection = adapted(("up_proj",))
    assert isinstance(linear.base, Linear)
    before = linear.base.weight.detach().clone()
    projection.forward(random(MANY, 12))
    projection.input_grad(random(MANY, 28))
    assert torch.equal(linear.base.weight, before)


def test_other_dtypes_keep_the_adapters_apart() -> None:
    """In bfloat16 a small adapter would vanish in the weight's rounding."""
    _, projection = adapted(tuple(PARTS))
    assert not projection.merges(random(MANY, 12).bfloat16())
    assert projection.beside(random(MANY, 5)) == (None, None)
    low = random(MANY, 5).bfloat16()
    assert projection.beside(low)[0] is low
