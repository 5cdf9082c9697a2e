"""SwiGLU with the adapters' sums on a GPU: against torch, bits, memory, speed."""

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
from tunesmith.kernels.swiglu_low_rank import (
    swiglu_low_rank,
    swiglu_low_rank_backward,
    swiglu_low_rank_backward_reference,
    swiglu_low_rank_reference,
)
from tunesmith.kernels.swiglu_low_rank_grads import swiglu_low_rank_grads

pytestmark = pytest.mark.gpu
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# rows, width, rank of gate and up, rank of down
SHAPES = [(1, 48, 32, 16), (17, 200, 7, 1), (300, 3584, 32, 16), (129, 18944, 64, 130), (5, 96, 256, 3)]
BENCHMARK = Path(__file__).resolve().parents[2] / "benchmarks" / "kernels.py"
# What a kernel must reach of a copy's bandwidth, well below what is meant to be seen.
LEAST_COPY_RATIO = 0.5


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(sum(shape) + seed)
    return torch.randn(shape, generator=generator, device="cuda").to(dtype)


def inputs(rows: int, width: int, rank: int, other: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """grad_h, gate_up, low, up, dlow, down; the sums are of the size of what they are added to."""
    low, up = random(rows, rank, dtype=dtype), (random(2 * width, rank) / rank**0.5).to(dtype)
    dlow, down = random(rows, other, dtype=dtype, seed=1), (random(other, width) / other**0.5).to(dtype)
    return random(rows, width, dtype=dtype), random(rows, 2 * width, dtype=dtype), low, up, dlow, down


def assert_near(mine: Tensor, truth: Tensor, units: float) -> None:
    """Off by at most so many units in the last place of the dtype; the sums have another order."""
    assert (mine.dtype, mine.shape) == (truth.dtype, truth.shape)
    limit = units * max(torch.finfo(mine.dtype).eps, 4e-6)
    torch.testing.assert_close(mine, truth, rtol=limit, atol=limit)


def differing(mine: Tensor, truth: Tensor) -> int:
    """How many bytes differ."""
    assert (mine.dtype, mine.shape) == (truth.dtype, truth.shape)
    return int((mine.view(torch.uint8) != truth.view(torch.uint8)).sum())


@pytest.fixture(autouse=True)
def exact_products() -> Any:
    """The reference's float32 products are float32's."""
    held = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = held


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_swiglu_with_the_adapters_sums(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    assert use_kernel(torch.device("cuda"))
    grad_h, gate_up, low, up, dlow, down = inputs(*shape, dtype)
    h = swiglu_low_rank(gate_up, low, up)
    assert_near(h, swiglu_low_rank_reference(gate_up, low, up), 4)
    for factors in [(low, up, dlow, down), (low, up, None, None), (None, None, dlow, down)]:
        truth, _ = swiglu_low_rank_backward_reference(grad_h, gate_up, *factors, False)
        held = gate_up.clone()
        grad, none = swiglu_low_rank_backward(grad_h, held, *factors, False)
        assert none is None
        assert torch.equal(held, gate_up)
        assert_near(grad, truth, 8)
        out, again = swiglu_low_rank_backward(grad_h, held, *factors, True, out=held)
        assert out is held
        assert torch.equal(held, grad)
        assert again is not None
        if factors[0] is not None:
            assert torch.equal(again, h)


def test_nothing_wide_is_allocated() -> None:
    grad_h, gate_up, low, up, dlow, down = inputs(2048, 4096, 32, 16, torch.bfloat16)
    swiglu_low_rank_backward(grad_h, gate_up, low, up, dlow, down, False, out=gate_up)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    swiglu_low_rank_backward(grad_h, gate_up, low, up, dlow, down, False, out=gate_up)
    assert torch.cuda.max_memory_allocated() - before < 2**20


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 48, 32, 16), (17, 200, 7, 1), (300, 3584, 32, 16), (2500, 18944, 64, 33)])
def test_swiglu_with_the_adapters_gradients(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    """Against float64 sums over what the plain kernel makes; the same bits at every run."""
    grad_h, gate_up, low, up, dlow, down = inputs(*shape, dtype)
    factors = (low, up, dlow, down)
    truth, h = swiglu_low_rank_backward(grad_h, gate_up, *factors, True)
    assert h is not None
    exact = truth.double().t() @ low.double(), dlow.double().t() @ h.double()
    runs = []
    for _ in range(2):
        held = gate_up.clone()
        sums = swiglu_low_rank_grads(grad_h, held, *factors)
        assert_near(held, truth, 2)
        for mine, theirs in zip(sums, exact, strict=True):
            assert mine.dtype == torch.float32
            assert (mine - theirs).norm() < 1e-4 * theirs.norm() + 1e-6
        runs.append((held, *sums))
    assert [differing(*pair) for pair in zip(*runs, strict=True)] == [0, 0, 0]


@pytest.mark.filterwarnings("ignore")  # torch.compile has much to say
def test_operators_compile_without_a_break() -> None:
    def step(
        grad_h: Tensor, gate_up: Tensor, low: Tensor, up: Tensor, dlow: Tensor, down: Tensor
    ) -> tuple[Tensor, ...]:
        held = gate_up + 1
        grad, h = swiglu_low_rank_backward(grad_h, held, low, up, dlow, down, True, out=held)
        assert h is not None
        return grad, h, swiglu_low_rank(gate_up, low, up)

    arguments = inputs(10, 96, 4, 2, torch.float32)
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
    for case in kernels.low_rank_cases():
        if case.shape["T"] == 8192:
            line = kernels.measure(case, copy_rate)
            print(line)
            if line["copy_ratio"] < LEAST_COPY_RATIO:
                slow.append(line)
    assert not slow
