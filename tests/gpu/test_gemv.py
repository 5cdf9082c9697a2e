"""Products of few tokens on a GPU equal the product with the dequantised weight, in every format."""

from __future__ import annotations

import pytest
import torch

from tunesmith.kernels import gemv
from tunesmith.kernels.add_rms_norm import add_rms_norm_
from tunesmith.kernels.fp8 import (
    dequantize_fp8_weight,
    product_reference,
    quantize_fp8_weight,
    quantize_rows_fp8,
)
from tunesmith.kernels.fp8_split_triton import num_parts
from tunesmith.kernels.int4 import dequantize_int4, quantize_int4
from tunesmith.kernels.int8 import dequantize_int8, int8_integer_product, quantize_int8
from tunesmith.kernels.launch import num_processors, overlapped
from tunesmith.kernels.nf4 import dequantize_nf4, quantize_nf4
from tunesmith.kernels.swiglu import swiglu

pytestmark = pytest.mark.gpu


def check(mine: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, unit: float) -> None:
    truth = x.double() @ weight.double().t() + (0 if bias is None else bias.double())
    size = x.double().abs() @ weight.double().abs().t() + (0 if bias is None else bias.double().abs())
    assert mine.dtype == x.dtype
    assert float(((mine.double() - truth).abs() / size).max()) < unit


@pytest.mark.parametrize("tokens", [1, 2, 3, 8, 16, 17, 33, 64, 100])
@pytest.mark.parametrize(("rows", "width"), [(1000, 896), (257, 4864), (96, 192)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_format_equals_its_dequantised_product(tokens: int, rows: int, width: int, dtype: torch.dtype) -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    weight = torch.randn(rows, width, device="cuda", generator=generator) * 0.05
    x = torch.randn(tokens, width, device="cuda", generator=generator).to(dtype)
    bias = torch.randn(rows, device="cuda", generator=generator).to(dtype)
    # Weights are rounded to the input's dtype where they are multiplied in it.
    unit = 2.0**-8 if dtype == torch.bfloat16 else 2.0**-10
    int8, fp8 = quantize_int8(weight), quantize_fp8_weight(weight)
    dense8 = dequantize_int8(int8.codes, int8.scale, torch.float32)
    for b in (None, bias):
        check(gemv.float_product(x, weight.to(dtype), b), x, weight.to(dtype), b, unit)
        check(gemv.int8_product(x, int8.codes, int8.scale, b), x, dense8, b, 2 * unit)
        check(gemv.fp8_weight_product(x, fp8.codes, fp8.scale, b), x, dequantize_fp8_weight(fp8, x.dtype), b, unit)
        for group, symmetric in ((128, False), (128, True), (64, False), (32, True)):
            int4 = quantize_int4(weight, group, symmetric)
            check(gemv.int4_product(x, int4, b), x, dequantize_int4(int4, torch.float32), b, 2 * unit)
        if width % 64 == 0:
            for double in (False, True):
                nf4 = [quantize_nf4(part.to(dtype), double) for part in weight.split((rows // 2, rows - rows // 2))]
                check(gemv.nf4_product(x, nf4, b), x, dequantize_nf4(nf4, torch.float32), b, 2 * unit)


@pytest.mark.parametrize("tokens", [1, 16, 17, 40])
def test_int8_times_int8_is_exact_in_its_sums(tokens: int) -> None:
    int8 = quantize_int8(torch.randn(512, 896, device="cuda"))
    x = torch.randn(tokens, 896, device="cuda", dtype=torch.bfloat16)
    on_cpu = int8_integer_product(x.cpu(), int8.codes.cpu(), int8.scale.cpu(), None)
    mine = int8_integer_product(x, int8.codes, int8.scale, None)
    assert torch.allclose(mine.cpu().float(), on_cpu.float(), rtol=2**-7, atol=1e-3)


def test_products_can_be_recorded() -> None:
    int4 = quantize_int4(torch.randn(512, 896, device="cuda"))
    x = torch.randn(1, 896, device="cuda", dtype=torch.bfloat16)
    truth = gemv.int4_product(x, int4, None)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = gemv.int4_product(x, int4, None)
    out.zero_()
    graph.replay()
    assert torch.equal(out, truth)


@pytest.mark.parametrize("tokens", [1, 8, 9, 16, 31, 64])
@pytest.mark.parametrize("shape", [(8, 16, 2), (16, 2, 1), (16, 16, 1), (16, 4, 4), (32, 4, 1), (32, 2, 2)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fragments_are_right_in_every_tile_and_repeat_their_bits(
    tokens: int, shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    """Steps of a width that no number of warps divides, rows that no tile divides, an output full of NaN before."""
    from tunesmith.kernels.gemv_quads_triton import quads

    generator = torch.Generator("cuda").manual_seed(1)
    rows, width, unit = 1003, 11 * 256, 2.0**-8 if dtype == torch.bfloat16 else 2.0**-10
    weight = torch.randn(rows, width, device="cuda", generator=generator) * 0.05
    x = torch.randn(tokens, width, device="cuda", generator=generator).to(dtype)
    bias = torch.randn(rows, device="cuda", generator=generator).to(dtype)
    int8, fp8, int4 = quantize_int8(weight), quantize_fp8_weight(weight), quantize_int4(weight, 64)
    cases = [
        (0, weight.to(dtype), None, None, 1, weight.to(dtype)),
        (1, int8.codes, int8.scale, None, 1, dequantize_int8(int8.codes, int8.scale, torch.float32)),
        (2, fp8.codes.view(torch.int8), fp8.scale, None, 1, dequantize_fp8_weight(fp8, torch.float32)),
        (3, int4.words, int4.scales, int4.zeros, 2, dequantize_int4(int4, torch.float32)),
    ]
    for format_id, codes, scales, zeros, per_block, dense in cases:
        found = []
        for _ in range(2):
            out = torch.full((tokens, rows), float("nan"), device="cuda", dtype=dtype)
            assert quads(format_id, x, codes, scales, zeros, bias, out, per_block=per_block, shape=shape)
            check(out, x, dense, bias, unit)
            found.append(out)
        assert torch.equal(*found)


@pytest.mark.parametrize("tokens", [17, 64, 100, 128, 225, 256])
def test_fp8_products_in_parts_are_those_of_torch(tokens: int) -> None:
    width = 8192
    x = torch.randn(tokens, width, device="cuda", dtype=torch.bfloat16)
    fp8 = quantize_fp8_weight(torch.randn(3584, width, device="cuda") * 0.05)
    bias = torch.randn(3584, device="cuda", dtype=torch.bfloat16)
    codes = quantize_rows_fp8(x)
    parts = num_parts(tokens, 3584, width, num_processors(x.device))
    assert parts > 1
    for b in (None, bias):
        mine = gemv.fp8_few_product(*codes, fp8.codes, fp8.scale, b, x.dtype)
        truth = product_reference(*codes, fp8.codes, fp8.scale, b, torch.float32)
        # Hopper keeps some 14 bits of a sum inside its products.
        assert float((mine.float() - truth).abs().max() / truth.abs().max()) < 2.0**-7
        assert torch.equal(mine, gemv.fp8_few_product(*codes, fp8.codes, fp8.scale, b, x.dtype))


@pytest.mark.parametrize("tokens", [1, 3, 16, 40])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gates_in_the_launch_of_their_product_have_the_same_bits(tokens: int, dtype: torch.dtype) -> None:
    from tunesmith.kernels.gemv_operators import float_operator, swiglu_few_operator

    dense = torch.randn(2 * 1500, 1536, device="cuda") * 0.05
    int4, int8, fp8 = (
        quantize_int4(dense.to(dtype), 128, clips=(1.0,)),
        quantize_int8(dense),
        quantize_fp8_weight(dense),
    )
    x = torch.randn(tokens, 1536, device="cuda", dtype=dtype)
    bias = torch.randn(3000, device="cuda", dtype=dtype)
    cases = [
        (0, 16, (dense.to(dtype), None, None), lambda b: float_operator(x, dense.to(dtype), b)),
        (1, 32, (int8.codes, int8.scale, None), lambda b: gemv.int8_product(x, int8.codes, int8.scale, b)),
        (2, 32, (fp8.codes, fp8.scale, None), lambda b: gemv.fp8_weight_product(x, fp8.codes, fp8.scale, b)),
        (3, 64, (int4.words, int4.scales, int4.zeros), lambda b: gemv.int4_product(x, int4, b)),
    ]
    for format_id, most, held, product in cases:
        for b in (None, bias) if tokens <= most else ():
            mine = swiglu_few_operator(format_id, x, *held, b)
            assert torch.equal(mine, swiglu(product(b))), (format_id, b is None)


@pytest.mark.parametrize("tokens", [1, 8])
def test_a_norm_and_a_product_that_begin_early_have_the_same_bits(tokens: int) -> None:
    """A recorded chain of blocks, replayed: what is read early must be what the kernel before has written."""
    generator = torch.Generator("cuda").manual_seed(2)
    width = 2048
    weights = [torch.randn(width, width, device="cuda", generator=generator).bfloat16() * 0.02 for _ in range(8)]
    int4 = [quantize_int4(weight, 128, clips=(1.0,)) for weight in weights]
    first = torch.randn(tokens, width, device="cuda", generator=generator).bfloat16()
    ones = torch.ones(width, device="cuda", dtype=torch.bfloat16)

    def chain() -> torch.Tensor:
        stream, y = first.clone(), first
        for weight, held in zip(weights, int4, strict=True):
            y = add_rms_norm_(stream, gemv.float_product(y, weight, None), ones, 1e-6)
            y = add_rms_norm_(stream, gemv.int4_product(y, held, None), ones, 1e-6)
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
