"""Rope in place: against the eager layer, its own inverse and autograd, and the kernel against the reference."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from tunesmith.kernels.rope import rope_, rope_tables_half
from tunesmith.model.layers import apply_rope, rope_tables

INVERSE_8 = 1.0 / (10_000.0 ** (torch.arange(0, 16, 2) / 16))


def random(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize("rows", [1, 3, 17])
def test_equals_the_eager_rotation(rows: int) -> None:
    positions = torch.arange(rows) * 37
    x = random((rows, 5, 16))
    expected = apply_rope(x, *rope_tables(INVERSE_8, positions, torch.float32))
    rope_(x, *rope_tables_half(INVERSE_8, positions))
    torch.testing.assert_close(x, expected, rtol=1e-6, atol=1e-6)


def test_tables_are_float32_halves() -> None:
    cos, sin = rope_tables_half(INVERSE_8, torch.tensor([0, 5]))
    full_cos, full_sin = rope_tables(INVERSE_8, torch.tensor([0, 5]), torch.float32)
    assert torch.equal(cos, full_cos[:, 0, :8])
    assert torch.equal(sin, full_sin[:, 0, :8])
    assert cos.is_contiguous()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounds_once(dtype: torch.dtype) -> None:
    """The float32 rotation, rounded: the eager path, which rounds tables and products, is further off."""
    positions = torch.arange(50)
    x = random((50, 4, 16), dtype)
    exact = x.double()
    cos, sin = rope_tables_half(INVERSE_8, positions)
    rope_(exact, cos.double(), sin.double())
    eager = apply_rope(x, *rope_tables(INVERSE_8, positions, dtype))
    rope_(x, *rope_tables_half(INVERSE_8, positions))
    assert (x.double() - exact).abs().max() < (eager.double() - exact).abs().max()
    torch.testing.assert_close(x, exact.to(dtype), rtol=torch.finfo(dtype).eps, atol=0)


def test_inverse_is_the_gradient_and_rotates_back() -> None:
    positions = torch.arange(7)
    tables = rope_tables_half(INVERSE_8, positions)
    x, grad = random((7, 3, 16)).requires_grad_(), random((7, 3, 16)).flip(0)
    apply_rope(x, *rope_tables(INVERSE_8, positions, torch.float32)).backward(grad)
    rope_(grad, *tables, inverse=True)
    torch.testing.assert_close(grad, x.grad, rtol=1e-6, atol=1e-6)
    turned = x.detach().clone()
    rope_(turned, *tables)
    rope_(turned, *tables, inverse=True)
    torch.testing.assert_close(turned, x.detach(), rtol=1e-5, atol=1e-6)


def test_only_the_heads_of_the_view_are_rotated() -> None:
    """Queries and keys of a fused projection are rotated in place; the values beside them stay as they were."""
    qkv = random((5, 8 * 16))
    before = qkv.clone()
    tables = rope_tables_half(INVERSE_8, torch.arange(5))
    rope_(qkv[:, : 6 * 16].view(5, 6, 16), *tables)
    expected = before[:, : 6 * 16].clone().view(5, 6, 16)
    rope_(expected, *tables)
    assert torch.equal(qkv[:, : 6 * 16], expected.view(5, -1))
    assert torch.equal(qkv[:, 6 * 16 :], before[:, 6 * 16 :])
    assert not torch.equal(qkv[1:, : 6 * 16], before[1:, : 6 * 16])


@pytest.mark.parametrize("columns", [8, 64, 128])
@pytest.mark.parametrize("heads", [1, 2, 5, 8, 28, 32, 36, 40, 48, 72])
def test_programs_leave_few_places_idle(heads: int, columns: int) -> None:
    pytest.importorskip("triton")
    from tunesmith.kernels.rope_triton import heads_of_a_program

    chosen = heads_of_a_program(heads, columns)
    assert chosen & (chosen - 1) == 0
    assert chosen * columns <= 2048
    assert heads / (-(-heads // chosen) * chosen) >= 0.75


KERNEL = """
import torch
from tunesmith.kernels.rope import rope_reference_, rope_tables_half
from tunesmith.kernels.rope_triton import rope_operator

generator = torch.Generator().manual_seed(0)
def random(*shape): return torch.randn(shape, generator=generator)
# The interpreter cuts bfloat16 off where a GPU rounds it.
tolerance = {torch.float32: 1e-6, torch.float16: 2**-9, torch.bfloat16: 2**-6}
for dtype, limit in tolerance.items():
    for tokens, heads, head_dim in [(1, 1, 2), (3, 5, 48), (17, 32, 128), (2, 36, 96), (5, 3, 80)]:
        inverse = 1.0 / 10_000 ** (torch.arange(0, head_dim, 2) / head_dim)
        tables = rope_tables_half(inverse, torch.arange(tokens) * 100)
        for back in (False, True):
            fused = random(tokens, (heads + 2) * head_dim).to(dtype)
            truth = fused.clone()
            rope_reference_(truth[:, : heads * head_dim].view(tokens, heads, head_dim), *tables, back)
            rope_operator(fused[:, : heads * head_dim].view(tokens, heads, head_dim), *tables, back)
            torch.testing.assert_close(fused, truth, rtol=limit, atol=limit)
            assert torch.equal(fused[:, heads * head_dim :], truth[:, heads * head_dim :])
x, tables = random(4, 3, 16), (random(4, 8), random(4, 8))
strided = random(16, 3, 4).permute(2, 1, 0)
truth = strided.clone()
rope_reference_(truth, *tables)
rope_operator(strided, *tables, False)
torch.testing.assert_close(strided, truth, rtol=1e-6, atol=1e-6)
rope_operator(x[:0], tables[0][:0], tables[1][:0], False)
torch.library.opcheck(rope_operator, (x, *tables, False), test_utils=("test_schema", "test_faketensor"))
"""


def test_kernel_equals_the_reference_under_tritons_interpreter(check_interpreted: Callable[[str], None]) -> None:
    check_interpreted(KERNEL)
