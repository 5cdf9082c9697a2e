"""NF4 on a GPU: the Triton kernel against the reference, bitsandbytes on the same device, memory and speed."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tunesmith.kernels.codebooks import midpoints, nf4_values
from tunesmith.kernels.nf4 import (
    NF4Weight,
    dequantize_nf4,
    dequantize_reference,
    empty_nf4,
    plain_scales,
    quantize_nf4,
    use_kernel,
)
from tunesmith.model.layers import Linear
from tunesmith.model.lora import AdaptedLinear, AdapterOptions
from tunesmith.model.quant import NF4Linear, quantised

pytestmark = pytest.mark.gpu
SHAPES = [(128, 256), (300, 192), (3, 5), (1, 1), (77, 130), (513, 64), (1000, 3584)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def weight(shape: tuple[int, int], dtype: torch.dtype, kind: str = "normal") -> torch.Tensor:
    made = torch.randn(shape, generator=torch.Generator().manual_seed(shape[0] * 8191 + shape[1]))
    if kind == "holes":
        made.view(-1)[: min(200, made.numel())] = 0
    if kind == "tiny":
        made *= 1e-30  # zero in float16
    if kind == "ties":
        values = nf4_values(torch.device("cpu"))
        grid = torch.cat([values, midpoints(values)])
        made = grid[(made * 1e4).long().abs() % len(grid)]
    return made.to(dtype).cuda()


def assert_equal(left: NF4Weight, right: NF4Weight, fields: tuple[str, ...]) -> None:
    for field in fields:
        a, b = getattr(left, field), getattr(right, field)
        assert a is b is None or torch.equal(a.cpu(), b.cpu()), (left.shape, field)


@pytest.mark.parametrize("out", DTYPES)
@pytest.mark.parametrize("source", DTYPES)
@pytest.mark.parametrize("double", [False, True])
def test_kernel_equals_the_reference_bit_for_bit(source: torch.dtype, out: torch.dtype, double: bool) -> None:
    assert use_kernel(torch.device("cuda"))
    for shape in SHAPES:
        quantised_weight = quantize_nf4(weight(shape, source, "holes"), double)
        assert torch.equal(dequantize_nf4(quantised_weight, out), dequantize_reference(quantised_weight, out)), shape


@pytest.mark.parametrize("source", DTYPES)
def test_first_level_is_nearly_that_of_the_cpu(source: torch.dtype) -> None:
    """All scales, and all codes but those of a few weights that lie between two."""
    for shape in [*SHAPES, (4096, 4096)]:
        there = weight(shape, source)
        left, right = quantize_nf4(there, False), quantize_nf4(there.cpu(), False)
        different = int((left.codes.cpu() != right.codes).sum())
        assert different <= 1e-6 * there.numel(), (shape, different)
        assert torch.equal(left.scales.cpu(), right.scales), shape


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("kind", ["normal", "holes", "tiny", "ties"])
@pytest.mark.parametrize("source", DTYPES)
def test_bits_are_those_of_bitsandbytes(source: torch.dtype, kind: str, double: bool) -> None:
    theirs: Any = pytest.importorskip("bitsandbytes.functional")
    for shape in [*SHAPES, (4096, 4096)]:
        made = weight(shape, source, kind)
        codes, state = theirs.quantize_4bit(made, quant_type="nf4", compress_statistics=double)
        before = made.clone()
        mine = quantize_nf4(made, double)
        assert torch.equal(made, before)  # what is quantised stays as it was
        assert torch.equal(mine.scales, state.absmax), (shape, "scales", (mine.scales != state.absmax).sum())
        if mine.scale_scales is not None and mine.offset is not None:
            assert torch.equal(mine.scale_scales, state.state2.absmax), shape
            assert torch.equal(mine.offset, state.offset), shape
        assert torch.equal(mine.codes.view(-1), codes.view(-1)), (
            shape,
            int((mine.codes.view(-1) != codes.view(-1)).sum()),
        )
        expected = theirs.dequantize_4bit(codes, state)
        assert torch.equal(dequantize_nf4(mine), expected.view(shape)), shape
        if double:
            scales = theirs.dequantize_blockwise(state.absmax, state.state2) + state.offset
            assert torch.equal(plain_scales(mine), scales), shape


def test_quantising_a_large_weight_is_lean_and_quick() -> None:
    """The head of Qwen2.5-7B: no more than a quarter of the weight's own bytes besides the result, in half a second."""
    made = torch.randn(152064, 3584, device="cuda", dtype=torch.bfloat16)
    quantize_nf4(made[:128], True)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    result = quantize_nf4(made, True)
    end.record()
    torch.cuda.synchronize()
    extra = torch.cuda.max_memory_allocated() - before - result.num_bytes
    print(f"quantise: {start.elapsed_time(end):.1f} ms, {extra / 1e6:.0f} MB besides the result")
    assert extra < made.nbytes / 4
    assert start.elapsed_time(end) < 500


def test_dequantising_runs_near_the_memorys_speed() -> None:
    """18944 x 3584 (the MLP of Qwen2.5-7B) to bfloat16: printed, and not slower than a fifth of a plain copy."""
    quantised_weight = quantize_nf4(torch.randn(18944, 3584, device="cuda", dtype=torch.bfloat16), True)
    out = dequantize_nf4(quantised_weight)
    copy = torch.empty_like(out)
    times = {
        "dequantise": _time_ms(lambda: dequantize_nf4(quantised_weight)),
        "copy": _time_ms(lambda: copy.copy_(out)),
    }
    moved = quantised_weight.num_bytes + out.nbytes
    print(f"{times}, {moved / times['dequantise'] / 1e6:.0f} GB/s")
    assert times["dequantise"] < 5 * times["copy"]


def _time_ms(run: Any, repeats: int = 20) -> float:
    for _ in range(3):
        run()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(repeats):
        run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / repeats


@pytest.mark.filterwarnings("ignore")  # torch.compile has much to say
@pytest.mark.parametrize("compiled", [False, True])
def test_linear_trains_on_the_device(compiled: bool) -> None:
    torch.manual_seed(0)
    dense = Linear(256, {"q_proj": 256, "k_proj": 64, "v_proj": 64}, True)
    torch.nn.init.normal_(dense.weight)
    nf4 = quantised(dense.cuda(), True)
    assert isinstance(nf4, NF4Linear)
    options = dict.fromkeys(nf4.parts, AdapterOptions(8, 16))
    linear = AdaptedLinear(nf4, nf4.parts, options)
    for part in nf4.parts:
        linear.adapter(part).reset(part, 0)
        torch.nn.init.normal_(linear.adapter(part).B)
    x = torch.randn(64, 256, device="cuda", requires_grad=True)
    run = torch.compile(linear) if compiled else linear
    out = run(x)
    merged = torch.cat([linear.merged_part(part) for part in linear.parts])
    expected = torch.nn.functional.linear(x, merged, linear.bias)
    assert torch.allclose(out, expected, rtol=1e-2, atol=1e-1)
    out.sum().backward()
    assert x.grad is not None
    assert torch.allclose(x.grad, merged.sum(0).expand_as(x), rtol=1e-2, atol=1e-1)


def test_moving_to_the_device_keeps_the_bits() -> None:
    here = quantize_nf4(torch.randn(64, 128), True)
    frame = empty_nf4((64, 128), torch.float32, True, "cuda")
    assert frame.codes.is_cuda
    linear = NF4Linear(128, {"x": 64}, False)
    linear.load_quantised("x", here)
    linear.to("cuda", torch.bfloat16)
    assert_equal(linear.part_nf4("x"), here, ("codes", "scales", "scale_scales", "offset"))
    assert torch.equal(linear.part_weight("x").cpu(), dequantize_reference(here))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_weights_on_another_than_the_current_gpu() -> None:
    """The kernels were launched on the current GPU, also for weights that lie on another."""
    dense = weight((128, 256), torch.bfloat16)
    here, there = quantize_nf4(dense), quantize_nf4(dense.to("cuda:1"))
    assert torch.equal(here.codes.cpu(), there.codes.cpu())
    assert torch.equal(dequantize_nf4(here).cpu(), dequantize_nf4(there).cpu())
