"""int4 products by bytes: how near the reference is, that the kernel equals it, and which products go this way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from tunesmith.kernels import int4_bytes
from tunesmith.kernels.chip import Chip, foreseeing
from tunesmith.kernels.int4 import Int4Weight, dequantize_int4, empty_int4, quantize_int4
from tunesmith.kernels.int4_bytes import int4_bytes_product, int4_bytes_reference, takes_bytes
from tunesmith.kernels.nf4 import kernels_on
from tunesmith.kernels.x_bytes import quantize_x_bytes, x_bytes_reference, x_of_bytes

KERNEL = """
import torch
from tunesmith.kernels.int4 import Int4Weight, quantize_int4
from tunesmith.kernels.int4_bytes import int4_bytes_reference
from tunesmith.kernels.int4_bytes_operator import int4_bytes_operator, multiply
from tunesmith.kernels.x_bytes import x_bytes_reference

torch.manual_seed(0)
# One step and none to come; rows that no tile divides; more tokens than a tile, than a program; steps ahead that go
# around once and several times, the last not whole.
shapes = ((1, 16, 256, None), (3, 21, 768, (2, 1)), (5, 9, 512, (1, 2)), (2, 32, 1280, (2, 2)))
cases = [(128, False, shape) for shape in shapes] + [(128, True, shapes[1]), (64, False, shapes[1])]
cases += [(64, True, shapes[3]), (32, False, shapes[2]), (32, True, shapes[0])]
for group, symmetric, (tokens, rows, width, shape) in cases:
    held = quantize_int4(torch.randn(rows, width) * 0.05, group, symmetric)
    if rows % 2:
        held = Int4Weight(held.words, held.scales.to(torch.float16), held.zeros, held.shape, held.dtype)
    x = torch.randn(tokens, width)
    x[:, 7] *= 100  # an outlier
    if tokens > 2:
        x[1], x[2, 200] = 0.0, float("nan")
    made = x_bytes_reference(x.to(torch.bfloat16))
    bias = torch.randn(rows).to(torch.bfloat16) if tokens != 2 else None
    out = torch.full((tokens, rows), -1.0)
    assert multiply(made, held.words, held.scales, held.zeros, bias, out, shape=shape)
    wanted = int4_bytes_reference(made, held, bias, torch.float32)
    size = x.abs().nan_to_num() @ (torch.ones(width, rows) * 0.2) + 1
    what = (group, symmetric, tokens, rows)
    assert torch.equal(out.isnan(), wanted.isnan()) and bool(wanted.isnan().any()) == (tokens > 2), what
    assert float(((out - wanted).abs() / size).nan_to_num().max()) < 2.0**-22, what  # sums in another order
    if tokens > 2 and bias is not None:
        assert torch.equal(out[1], bias.float()), what  # a row of zeros
for dtype in (torch.bfloat16, torch.float16):
    found = int4_bytes_operator(made, held.words, held.scales, held.zeros, bias, dtype)
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), wanted, rtol=2.0**-7, atol=1e-3)
torch.library.opcheck(int4_bytes_operator, (made, held.words, held.scales, held.zeros, None, torch.float16),
                      test_utils=("test_schema", "test_faketensor"))
"""


def given(group: int, symmetric: bool, dtype: torch.dtype) -> tuple[torch.Tensor, Int4Weight, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    weight = quantize_int4(torch.randn(50, 1024, generator=generator) * 0.05, group, symmetric)
    x = torch.randn(8, 1024, generator=generator)
    x[1] *= 1e-3
    x[:, 700] *= 300
    x[3] = 0.0
    return x.to(dtype), weight, torch.randn(50, generator=generator)


@pytest.mark.parametrize("group", [128, 64, 32])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_it_is_off_by_what_x_loses_in_its_blocks(group: int, symmetric: bool, dtype: torch.dtype) -> None:
    """2^-15.97 of a block's largest value times the weights it meets, and the last bits of sums in float32."""
    x, weight, bias = given(group, symmetric, dtype)
    dense = dequantize_int4(weight, torch.float32).double()
    found = int4_bytes_reference(x_bytes_reference(x), weight, bias, torch.float32).double()
    largest = x.double().unflatten(1, (-1, 128)).abs().amax(-1).repeat_interleave(128, 1)
    size = x.double().abs() @ dense.abs().t() + bias.double().abs()
    bound = 2.0**-15.96 * largest @ dense.abs().t() + 2.0**-22 * size
    error = (found - x.double() @ dense.t() - bias.double()).abs()
    assert bool((error <= bound).all())
    # Without outliers that is far less than rounding the result to 16 bits costs.
    usual = torch.randn(8, 1024, generator=torch.Generator().manual_seed(1)).to(dtype)
    exact = usual.double() @ dense.t()
    error = int4_bytes_reference(x_bytes_reference(usual), weight, None, torch.float32).double() - exact
    rounded = exact.to(dtype).double() - exact
    assert float(error.square().mean()) < 0.05 * float(rounded.square().mean())


def test_without_kernels_the_product_is_the_reference() -> None:
    x, weight, bias = given(64, False, torch.bfloat16)
    made = quantize_x_bytes(x)
    found = int4_bytes_product(made, weight, bias, torch.bfloat16)
    assert torch.equal(found, int4_bytes_reference(made, weight, bias, torch.bfloat16))
    by_values = x_of_bytes(made, torch.float32) @ dequantize_int4(weight, torch.float32).t() + bias
    torch.testing.assert_close(found.float(), by_values, rtol=2.0**-7, atol=1e-3)


@pytest.mark.parametrize("wrong", [float("inf"), float("nan")])
def test_what_is_not_finite_is_not_made_finite(wrong: float) -> None:
    x, weight, _ = given(128, False, torch.bfloat16)
    x[2, 900] = wrong
    found = int4_bytes_reference(x_bytes_reference(x), weight, None, torch.bfloat16)
    assert bool(found[2].isnan().all())
    assert not bool(found[[0, 1, 3, 4, 5, 6, 7]].isnan().any())


def test_the_kernel_equals_the_reference_under_tritons_interpreter(check_interpreted: Callable[[str], None]) -> None:
    pytest.importorskip("triton")
    check_interpreted(KERNEL)


@pytest.mark.parametrize(
    ("tokens", "width", "group", "dtype", "wanted"),
    [
        (1, 3584, 128, torch.bfloat16, True),
        (8, 18944, 128, torch.float16, True),
        (9, 3584, 128, torch.bfloat16, False),
        (4, 3584, 64, torch.bfloat16, True),
        (5, 3584, 64, torch.bfloat16, False),
        (4, 3584, 32, torch.bfloat16, True),
        (1, 896, 128, torch.bfloat16, False),
        (1, 3584, 128, torch.float32, False),
        (0, 3584, 128, torch.bfloat16, False),
    ],
)
def test_what_is_taken(tokens: int, width: int, group: int, dtype: torch.dtype, wanted: bool) -> None:
    pytest.importorskip("triton")
    weight = empty_int4((64, width), torch.bfloat16, group, False, device="meta")
    assert not takes_bytes(weight, tokens, dtype)  # no kernels there
    with kernels_on("meta"), foreseeing(Chip((9, 0), 132)):
        assert takes_bytes(weight, tokens, dtype) is wanted
        assert not takes_bytes(replace(weight, order=torch.empty(width, device="meta")), tokens, dtype)
    with kernels_on("meta"), foreseeing(Chip((7, 5), 40)):
        assert not takes_bytes(weight, tokens, dtype)


def test_it_can_be_turned_off(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(int4_bytes, "MOST_TOKENS", {})
    weight = empty_int4((64, 3584), torch.bfloat16, 128, False, device="meta")
    with kernels_on("meta"), foreseeing(Chip((9, 0), 132)):
        assert not takes_bytes(weight, 1, torch.bfloat16)
