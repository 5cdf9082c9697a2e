"""int4 products by bytes on a GPU: the reference's sums, its codes, and chains of launches that begin early."""

from __future__ import annotations

import pytest
import torch

from tunesmith.kernels import gemv
from tunesmith.kernels.add_rms_norm import add_rms_norm_, add_rms_norm_reference_
from tunesmith.kernels.int4 import Int4Weight, dequantize_int4, quantize_int4
from tunesmith.kernels.int4_bytes import MOST_TOKENS, int4_bytes_product, int4_bytes_reference, takes_bytes
from tunesmith.kernels.launch import overlapped
from tunesmith.kernels.swiglu import swiglu_reference
from tunesmith.kernels.x_bytes import (
    add_rms_norm_bytes_,
    quantize_x_bytes,
    swiglu_bytes,
    x_bytes_reference,
    x_of_bytes,
)

pytestmark = pytest.mark.gpu


def made(rows: int, width: int, group: int, symmetric: bool, scale_dtype: torch.dtype = torch.bfloat16) -> Int4Weight:
    generator = torch.Generator("cuda").manual_seed(0)
    weight = torch.randn(rows, width, device="cuda", generator=generator) * 0.05
    held = quantize_int4(weight, group, symmetric, clips=(1.0,))
    return Int4Weight(held.words, held.scales.to(scale_dtype), held.zeros, held.shape, held.dtype)


def given(tokens: int, width: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator("cuda").manual_seed(1)
    x = torch.randn(tokens, width, device="cuda", generator=generator)
    x[0, width // 2] = 400.0  # an outlier
    if tokens > 2:
        x[2] = 0.0
    return x.to(dtype)


@pytest.mark.parametrize("tokens", [1, 3, 8, 11])
@pytest.mark.parametrize("shape", [None, (1, 2), (8, 1), (16, 1)])
@pytest.mark.parametrize(("group", "symmetric"), [(128, False), (128, True), (64, False), (32, False)])
def test_the_kernel_has_the_references_sums_and_repeats_its_bits(
    tokens: int, shape: tuple[int, int] | None, group: int, symmetric: bool
) -> None:
    """Steps of a width that no number of warps divides, rows that no tile divides, an output full of NaN before."""
    from tunesmith.kernels.int4_bytes_operator import multiply

    for rows, scale_dtype in ((1003, torch.bfloat16), (1024, torch.float16)):
        held = made(rows, 11 * 256, group, symmetric, scale_dtype)
        x = x_bytes_reference(given(tokens, 11 * 256, torch.bfloat16))
        bias = torch.randn(rows, device="cuda").bfloat16() if rows == 1003 else None
        wanted = int4_bytes_reference(x, held, bias, torch.float32)
        found = []
        for _ in range(2):
            out = torch.full((tokens, rows), float("nan"), device="cuda")
            assert multiply(x, held.words, held.scales, held.zeros, bias, out, shape=shape)
            size = x_of_bytes(x, torch.float32).abs() @ dequantize_int4(held, torch.float32).abs().t() + 1
            assert float(((out - wanted).abs() / size).max()) < 2.0**-20
            found.append(out)
        assert torch.equal(*found)


@pytest.mark.parametrize("group", [128, 64, 32])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_it_is_as_near_as_the_product_that_widens_codes(group: int, dtype: torch.dtype) -> None:
    """By 2^-15.97 of a block's largest value, times what it meets, and the rounding of the result."""
    held = made(3584, 3584, group, False)
    dense = dequantize_int4(held, torch.float32).double()
    for tokens in range(1, MOST_TOKENS[group] + 1):
        x = given(tokens, 3584, dtype)
        assert takes_bytes(held, tokens, dtype)
        truth, size = x.double() @ dense.t(), x.double().abs() @ dense.abs().t()
        mine = int4_bytes_product(quantize_x_bytes(x), held, None, dtype).double()
        other = gemv.int4_product(x, held, None).double()
        largest = x.double().unflatten(1, (-1, 128)).abs().amax(-1).repeat_interleave(128, 1)
        bound = 2.0**-15.96 * largest @ dense.abs().t() + 2.0**-20 * size
        unit = 2.0**-8 if dtype == torch.bfloat16 else 2.0**-11  # half a last place over the value, at most
        assert bool(((mine - truth).abs() <= bound + 1.01 * unit * (truth.abs() + bound) + 1e-6).all())
        # Where no value stands out of its block both are off by what rounding the result costs.
        usual = [(y - truth)[1:].square().mean() for y in (mine, other)] if tokens > 1 else [torch.zeros(())] * 2
        assert float(usual[0]) <= 1.2 * float(usual[1])


@pytest.mark.parametrize("tokens", [1, 3, 8])
@pytest.mark.parametrize("width", [256, 3584, 18944])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_codes_are_the_references(tokens: int, width: int, dtype: torch.dtype) -> None:
    x = given(tokens, width, dtype)
    x[0, 5] = float("nan")
    x[-1, 200] = float("inf")
    assert torch.equal(quantize_x_bytes(x), x_bytes_reference(x))
    gate_up = torch.randn(tokens, 2 * width, device="cuda", dtype=dtype)
    wanted = x_of_bytes(x_bytes_reference(swiglu_reference(gate_up)), torch.float32)
    close = {"rtol": 2.0**-6, "atol": 2.0**-9}
    torch.testing.assert_close(x_of_bytes(swiglu_bytes(gate_up), torch.float32), wanted, **close)
    if width > 8192:
        return
    stream, delta = torch.randn(2, tokens, width, device="cuda", dtype=dtype)
    weight, other = torch.rand(width, device="cuda", dtype=dtype), stream.clone()
    found = x_of_bytes(add_rms_norm_bytes_(stream, delta, weight, 1e-6), torch.float32)
    wanted = add_rms_norm_reference_(other, delta, weight, 1e-6)
    assert torch.equal(stream, other)
    torch.testing.assert_close(found, x_of_bytes(x_bytes_reference(wanted), torch.float32), **close)


@pytest.mark.parametrize("wrong", [float("inf"), float("nan")])
def test_what_is_not_finite_is_not_made_finite(wrong: float) -> None:
    held, x = made(512, 1024, 128, False), given(4, 1024, torch.bfloat16)
    x[1, 700] = wrong
    y = int4_bytes_product(quantize_x_bytes(x), held, None, torch.bfloat16)
    assert bool(y[1].isnan().all())
    assert not bool(y[[0, 2, 3]].isnan().any())


@pytest.mark.parametrize("tokens", [1, 4, 8])
def test_launches_that_begin_early_have_the_same_bits(tokens: int) -> None:
    """A recorded chain of blocks, replayed: what is read early must be what the kernel before has written."""
    width, dtype = 2048, torch.bfloat16
    ups = [made(2 * width, width, 128, False) for _ in range(6)]
    downs = [made(width, width, 128, False) for _ in range(6)]
    first = torch.randn(tokens, width, device="cuda", dtype=dtype)
    ones = torch.ones(width, device="cuda", dtype=dtype)

    def chain() -> torch.Tensor:
        stream, y = first.clone(), first
        for up, down in zip(ups, downs, strict=True):
            mixed = int4_bytes_product(quantize_x_bytes(y), down, None, dtype)
            x = add_rms_norm_bytes_(stream, mixed, ones, 1e-6)
            h = swiglu_bytes(int4_bytes_product(x, up, None, dtype))
            y = add_rms_norm_(stream, int4_bytes_product(h, down, None, dtype), ones, 1e-6)
        return y

    with torch.inference_mode():
        truth = chain()
        with overlapped():
            chain()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                out = chain()
        for _ in range(50):
            out.zero_()
            graph.replay()
            assert torch.equal(out, truth)
