"""The loss head on a GPU: its kernel against the reference, every dtype, waits, memory and speed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F

from tunesmith.kernels.cross_entropy import (
    IGNORED,
    cross_entropy,
    cross_entropy_and_grad_,
    cross_entropy_and_grad_reference_,
    cross_entropy_reference,
)
from tunesmith.kernels.linear_cross_entropy import linear_cross_entropy_sum
from tunesmith.kernels.nf4 import use_kernel

pytestmark = pytest.mark.gpu
SHAPES = [(1, 1), (3, 48), (17, 200), (5, 3584), (7, 50257), (3, 151936), (2, 262144)]
# One unit in the last place: the order of the sum may move a value over the edge between two.
ONE_UNIT = {torch.float32: 3e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}


def _logits(rows: int, vocab_size: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator("cuda").manual_seed(rows * 1009 + vocab_size)
    logits = torch.randn(rows, vocab_size, generator=generator, device="cuda") * 4
    return logits.to(dtype), torch.randint(0, vocab_size, (rows,), generator=generator, device="cuda")


@contextmanager
def _without_waits() -> Iterator[None]:
    """Any wait of the host for the device is an error."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", list(ONE_UNIT))
@pytest.mark.parametrize(("rows", "vocab_size"), SHAPES)
def test_kernel_equals_the_reference(rows: int, vocab_size: int, dtype: torch.dtype) -> None:
    assert use_kernel(torch.device("cuda"))
    logits, targets = _logits(rows, vocab_size, dtype)
    if rows > 2:
        targets[0], targets[1], logits[2, : vocab_size // 2] = IGNORED, vocab_size - 1, -torch.inf
    torch.testing.assert_close(
        cross_entropy(logits, targets), cross_entropy_reference(logits, targets), rtol=2e-6, atol=4e-6
    )
    mine, truth = logits.clone(), logits.clone()
    losses = cross_entropy_and_grad_(mine, targets, torch.tensor([3.0], device="cuda"))
    expected = cross_entropy_and_grad_reference_(truth, targets, 3.0)
    torch.testing.assert_close(losses, expected, rtol=2e-6, atol=4e-6)
    torch.testing.assert_close(mine, truth, rtol=ONE_UNIT[dtype], atol=2e-6 if dtype == torch.float32 else 2e-7)


def test_many_rows_in_a_row_give_the_same_losses() -> None:
    """A warp that read the target's logit after another had written the gradient there would show here."""
    logits, targets = _logits(4096, 32064, torch.bfloat16)
    targets[:2048] = torch.arange(2048, device="cuda") * 8  # all over the first tile
    expected = cross_entropy(logits, targets)
    for _ in range(5):
        assert torch.equal(cross_entropy_and_grad_(logits.clone(), targets), expected)


def test_impossible_targets_and_broken_logits_give_nan() -> None:
    logits, targets = _logits(4, 1000, torch.bfloat16)
    targets[0], targets[1] = 1000, -1
    logits[2, 7] = torch.nan
    assert cross_entropy_and_grad_(logits, targets).isnan().tolist() == [True, True, True, False]


def test_offsets_beyond_two_to_the_31() -> None:
    rows, vocab_size = 16400, 131072
    if torch.cuda.mem_get_info()[0] < 6e9:
        pytest.skip("needs 6 GB of free GPU memory")
    logits = torch.zeros(rows, vocab_size, dtype=torch.bfloat16, device="cuda")
    last, targets = _logits(1, vocab_size, torch.bfloat16)
    logits[-1:] = last
    losses = cross_entropy_and_grad_(logits, targets.expand(rows))
    expected = cross_entropy_and_grad_(last, targets)
    assert torch.equal(losses[-1:], expected)
    assert torch.equal(logits[-1:], last)


def _inputs(dtype: torch.dtype, held: torch.dtype, vocab_size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    hidden = torch.randn(700, 256, device="cuda").to(dtype).requires_grad_()
    weight = (torch.randn(vocab_size, 256, device="cuda") / 16).to(held).requires_grad_()
    return hidden, weight, torch.randint(0, vocab_size, (700,), device="cuda")


def _error(mine: torch.Tensor | None, truth: torch.Tensor | None) -> float:
    assert mine is not None
    assert truth is not None
    return float((mine.double() - truth).norm() / truth.norm())


@pytest.mark.parametrize("vocab_size", [1003, 32000])
@pytest.mark.parametrize(
    ("dtype", "held", "limit"),
    [
        (torch.float32, torch.float32, 1e-5),
        (torch.bfloat16, torch.bfloat16, 6e-3),
        (torch.bfloat16, torch.float32, 4e-3),
        (torch.float16, torch.float32, 1e-3),
        (torch.float16, torch.float16, 1e-3),
    ],
)
def test_gradients_are_those_of_float64(dtype: torch.dtype, held: torch.dtype, limit: float, vocab_size: int) -> None:
    """Three chunks over two thirds of the rows, in an odd vocabulary too; the host never waits."""
    hidden, weight, targets = _inputs(dtype, held, vocab_size)
    index = torch.arange(700, device="cuda")[torch.arange(700, device="cuda") % 3 > 0]
    chosen = targets[index]
    with _without_waits():
        loss = linear_cross_entropy_sum(hidden, weight, chosen, 200, index)
        (loss * 1.003).backward()
    wide = hidden.detach().double().requires_grad_(), weight.detach().to(dtype).double().requires_grad_()
    expected = F.cross_entropy(F.linear(wide[0][index], wide[1]), chosen, reduction="sum")
    (expected * 1.003).backward()
    assert abs(float(loss.detach() - expected.detach())) < max(limit, 1e-5) * float(expected.detach())
    assert hidden.grad is not None
    assert weight.grad is not None
    assert (hidden.grad.dtype, weight.grad.dtype) == (dtype, held)
    assert _error(hidden.grad, wide[0].grad) < limit
    assert _error(weight.grad, wide[1].grad) < limit


def test_no_more_logits_than_a_chunk_are_held() -> None:
    tokens, width, vocab_size, chunk = 4096, 512, 65536, 512
    hidden = torch.randn(tokens, width, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(vocab_size, width, device="cuda", dtype=torch.bfloat16)
    targets = torch.randint(0, vocab_size, (tokens,), device="cuda")
    linear_cross_entropy_sum(hidden, weight, targets, chunk).backward()
    hidden.grad = None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    linear_cross_entropy_sum(hidden, weight, targets, chunk).backward()
    extra = torch.cuda.max_memory_allocated() - before
    assert extra < chunk * vocab_size * 2 + hidden.nbytes + 2**20


def test_kernel_runs_near_the_memorys_speed() -> None:
    """2048 x 131072 in bfloat16: printed, and at most three times as long as a copy, which moves as much."""
    logits, targets = _logits(2048, 131072, torch.bfloat16)
    copy = torch.empty_like(logits)
    times = {
        "kernel": _time_ms(lambda: cross_entropy_and_grad_(logits, targets)),
        "copy": _time_ms(lambda: copy.copy_(logits)),
    }
    print(f"{times}, {2 * logits.nbytes / times['kernel'] / 1e6:.0f} GB/s")
    assert times["kernel"] < 3 * times["copy"]


def _time_ms(run: Callable[[], object], repeats: int = 20) -> float:
    for _ in range(3):
        run()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(repeats):
        run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / repeats
