"""RMSNorm, rope and SwiGLU on a GPU: the Triton kernels against plain torch there, determinism, memory, speed."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from tunesmith.kernels.nf4 import use_kernel
from tunesmith.kernels.rms_norm import (
    rms_norm,
    rms_norm_again,
    rms_norm_backward,
    rms_norm_backward_reference,
    rms_norm_reference,
)
from tunesmith.kernels.rope import rope_, rope_reference_, rope_tables_half
from tunesmith.kernels.scale import scale_, scale_reference_
from tunesmith.kernels.swiglu import swiglu, swiglu_backward, swiglu_backward_reference, swiglu_reference

pytestmark = pytest.mark.gpu
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BENCHMARK = Path(__file__).resolve().parents[2] / "benchmarks" / "kernels.py"
# Kernels at the large shapes; what they must reach of a copy's bandwidth, well below what is meant to be seen.
LEAST_COPY_RATIO = 0.6


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, device="cuda").to(dtype)


def assert_near(mine: Tensor, truth: Tensor, units: float = 1.0) -> None:
    """Off by at most so many units in the last place of the dtype; the sums of rows have another order."""
    assert (mine.dtype, mine.shape) == (truth.dtype, truth.shape)
    limit = units * max(torch.finfo(mine.dtype).eps, 2e-6)
    torch.testing.assert_close(mine, truth, rtol=limit, atol=limit)


def nearly_all_equal(mine: Tensor, truth: Tensor) -> bool:
    return float((mine != truth).float().mean()) < 0.01


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 48), (17, 200), (3, 96), (100, 3584), (1000, 128), (9, 8192), (5, 16384)])
def test_rms_norm(shape: tuple[int, int], dtype: torch.dtype, weight_dtype: torch.dtype) -> None:
    assert use_kernel(torch.device("cuda"))
    x, weight = random(*shape, dtype=dtype), random(shape[1], dtype=weight_dtype)
    y, rstd = rms_norm(x, weight, 1e-6)
    truth, true_rstd = rms_norm_reference(x, weight, 1e-6)
    assert_near(rstd, true_rstd)
    assert_near(y, truth, 2)
    assert dtype == torch.float32 or nearly_all_equal(y, truth)
    assert torch.equal(rms_norm_again(x, weight, rstd), y)
    grad_y, add = random(*shape, dtype=dtype).flip(0), random(*shape, dtype=dtype).flip(1)
    for stream in (None, add):
        grad_x, grad_weight = rms_norm_backward(grad_y, x, weight, true_rstd, stream, True)
        true_x, true_weight = rms_norm_backward_reference(grad_y, x, weight, true_rstd, stream, True)
        assert_near(grad_x, true_x, 4)
        assert grad_weight is not None
        torch.testing.assert_close(grad_weight, true_weight, rtol=1e-4, atol=1e-3)
        assert_near(rms_norm_backward(grad_y, x, weight, true_rstd, stream, False)[0], true_x, 4)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm_of_heads_in_a_fused_projection(dtype: torch.dtype) -> None:
    heads, weight = random(77, 48, 128, dtype=dtype)[:, 8:40], random(128)
    y, rstd = rms_norm(heads, weight, 1e-6)
    assert torch.equal(y, rms_norm(heads.contiguous(), weight, 1e-6)[0])
    assert_near(y, rms_norm_reference(heads, weight, 1e-6)[0], 2)
    grad_y = random(32, 77, 128, dtype=dtype).transpose(0, 1)
    grad_x, grad_weight = rms_norm_backward(grad_y, heads, weight, rstd, None, True)
    true_x, true_weight = rms_norm_backward_reference(grad_y, heads, weight, rstd, None, True)
    assert_near(grad_x, true_x, 4)
    torch.testing.assert_close(grad_weight, true_weight, rtol=1e-4, atol=5e-3)


def test_the_weights_gradient_has_the_same_bits_every_time() -> None:
    x, grad_y, weight = random(8192, 3584, dtype=torch.bfloat16), random(8192, 3584).bfloat16(), random(3584)
    rstd = rms_norm(x, weight, 1e-6)[1]
    first = rms_norm_backward(grad_y, x, weight, rstd, None, True)[1]
    for _ in range(5):
        again = rms_norm_backward(grad_y, x, weight, rstd, None, True)[1]
        assert first is not None
        assert again is not None
        assert torch.equal(again, first)


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 2), (17, 5, 48), (300, 32, 128), (9, 36, 96), (5, 3, 80), (4, 71, 64)])
def test_rope_has_the_bits_of_the_reference(shape: tuple[int, int, int], dtype: torch.dtype, inverse: bool) -> None:
    tokens, heads, head_dim = shape
    frequencies = 1.0 / 10_000 ** (torch.arange(0, head_dim, 2, device="cuda") / head_dim)
    tables = rope_tables_half(frequencies, torch.arange(tokens, device="cuda") * 50)
    fused = random(tokens, (heads + 3) * head_dim, dtype=dtype)
    truth = fused.clone()
    rope_(fused[:, : heads * head_dim].view(shape), *tables, inverse)
    rope_reference_(truth[:, : heads * head_dim].view(shape), *tables, inverse)
    assert torch.equal(fused, truth)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 48), (17, 200), (3, 3584), (5, 18944), (2, 1)])
def test_swiglu(shape: tuple[int, int], dtype: torch.dtype) -> None:
    rows, width = shape
    for gate_up in (3 * random(rows, 2 * width, dtype=dtype), 3 * random(rows, 2 * width + 8, dtype=dtype)[:, 8:]):
        grad_h = random(rows, width, dtype=dtype)
        h = swiglu(gate_up)
        true_grad, _ = swiglu_backward_reference(grad_h, gate_up, False)
        assert_near(h, swiglu_reference(gate_up), 2)
        grad, none = swiglu_backward(grad_h, gate_up, False)
        assert none is None
        assert_near(grad, true_grad, 4)
        same, again = swiglu_backward(grad_h, gate_up, True, out=gate_up)
        assert same is gate_up
        assert torch.equal(gate_up, grad)
        assert again is not None
        assert torch.equal(again, h)


def test_offsets_beyond_32_bits() -> None:
    """2^31 values and more: a 32-bit offset would wrap and read elsewhere."""
    if torch.cuda.mem_get_info()[0] < 16e9:
        pytest.skip("needs 16 GB of free memory")
    rows, width = 2**17, 2**14 + 16
    x, weight = torch.ones(rows, width, dtype=torch.bfloat16, device="cuda"), random(width)
    x[-1] = random(width, dtype=torch.bfloat16)
    expected = rms_norm_reference(x[-1:], weight, 1e-6)[0]
    assert_near(rms_norm(x, weight, 1e-6)[0][-1:], expected, 2)
    gate_up = x[-1:].clone()
    assert torch.equal(swiglu(x)[-1:], swiglu(gate_up))
    heads = x.view(rows, width // 16, 16)
    frequencies = torch.full((8,), 0.1, device="cuda")
    tables = rope_tables_half(frequencies, torch.arange(rows, device="cuda"))
    last = heads[-1:].clone()
    rope_reference_(last, tables[0][-1:], tables[1][-1:])
    rope_(heads, *tables)
    assert torch.equal(heads[-1:], last)


@pytest.mark.filterwarnings("ignore")  # torch.compile has much to say
def test_operators_compile_without_a_break() -> None:
    def step(fused: Tensor, x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        y, rstd = rms_norm(x, weight, 1e-6)
        grad_x, grad_weight = rms_norm_backward(y, x, weight, rstd, x, True)
        assert grad_weight is not None
        turned = fused + 1
        rope_(turned[:, :64].view(-1, 4, 16), cos, sin)
        gate_up = x + 1
        grad, h = swiglu_backward(x[:, :32], gate_up, True, out=gate_up)
        assert h is not None
        return y, grad_x, grad_weight, turned, grad, h, swiglu(x)

    tables = rope_tables_half(torch.rand(8, device="cuda"), torch.arange(10, device="cuda"))
    arguments = (random(10, 96), random(10, 64), random(64), *tables)
    expected = step(*arguments)
    for mine, truth in zip(torch.compile(step, fullgraph=True)(*arguments), expected, strict=True):
        torch.testing.assert_close(mine, truth, rtol=1e-5, atol=1e-5)


def benchmark() -> ModuleType:
    """The script as a module; dataclasses look their module up by name."""
    spec = importlib.util.spec_from_file_location("kernels_benchmark", BENCHMARK)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_kernels_run_near_the_memorys_speed() -> None:
    """The shapes of Qwen2.5-7B in a step of 8,192 tokens: printed, and not far below a plain copy."""
    kernels: Any = benchmark()
    copy_rate = kernels.copy_bytes_per_s()
    slow = []
    for case in kernels.elementwise_cases():
        if case.shape["T"] == 8192 and case.dtype == torch.bfloat16:
            line = kernels.measure(case, copy_rate)
            print(line)
            if line["copy_ratio"] < LEAST_COPY_RATIO:
                slow.append(line)
    assert not slow


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_scaled_in_place_as_by_the_reference(dtype: torch.dtype) -> None:
    values = torch.randn(1000, 3585, generator=torch.Generator().manual_seed(0)).to(dtype).cuda()
    mine, factor = values.clone(), torch.tensor(1 / 3, device="cuda")
    scale_(mine, factor)
    scale_reference_(values, factor)
    assert torch.equal(mine, values)
