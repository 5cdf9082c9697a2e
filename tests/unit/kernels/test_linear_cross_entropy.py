"""The head and its loss in one pass: against whole logits, in every dtype, with what is and is not computed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from tunesmith.kernels import cpu_train
from tunesmith.kernels import linear_cross_entropy as module
from tunesmith.kernels.cross_entropy import IGNORED, cross_entropy_and_grad_reference_
from tunesmith.kernels.linear_cross_entropy import linear_cross_entropy_sum

T, D, V = 37, 8, 23


def _inputs(
    dtype: torch.dtype = torch.float32, shape: tuple[int, int, int] = (T, D, V), spread: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """hidden_TD and weight_VD that ask for gradients, and targets_T."""
    generator = torch.Generator().manual_seed(3)
    rows, width, words = shape
    hidden = torch.randn(rows, width, generator=generator).to(dtype).requires_grad_()
    weight = (torch.randn(words, width, generator=generator) * spread).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(0, words, (rows,), generator=generator)


def _truth(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, factor: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Loss and gradients from the same values in float64."""
    wide = hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    loss = F.cross_entropy(F.linear(*wide), targets, reduction="sum", ignore_index=IGNORED)
    (loss * factor).backward()
    assert wide[0].grad is not None
    assert wide[1].grad is not None
    return loss.detach(), wide[0].grad, wide[1].grad


def _error(mine: torch.Tensor, truth: torch.Tensor) -> float:
    return float((mine.double() - truth).norm() / truth.norm())


@pytest.mark.parametrize("chunk_tokens", [1, 4, 7, T, 1000])
def test_loss_and_gradients_are_those_of_whole_logits(chunk_tokens: int) -> None:
    hidden, weight, targets = _inputs()
    targets[::5] = IGNORED
    loss = linear_cross_entropy_sum(hidden, weight, targets, chunk_tokens)
    (loss * 0.37).backward()
    truth = _truth(hidden, weight, targets, 0.37)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(float(truth[0]), rel=1e-6)
    assert _error(hidden.grad, truth[1]) < 1e-6
    assert _error(weight.grad, truth[2]) < 1e-6


@pytest.mark.parametrize("trained", ["hidden", "weight"])
def test_only_the_gradients_that_are_wanted_are_made(trained: str) -> None:
    hidden, weight, targets = _inputs()
    (weight if trained == "hidden" else hidden).requires_grad_(False)
    with _Products() as products:
        linear_cross_entropy_sum(hidden, weight, targets, 10).backward()
    assert (hidden.grad is not None) == (trained == "hidden")
    assert (weight.grad is not None) == (trained == "weight")
    assert products.count == 2 * 4  # the logits and one gradient of four chunks
    truth = _truth(hidden, weight, targets, 1.0)
    mine = hidden.grad if trained == "hidden" else weight.grad
    assert _error(mine, truth[1] if trained == "hidden" else truth[2]) < 1e-6


class _Products(TorchDispatchMode):
    """Counts matrix products, and the most logits of one."""

    def __init__(self) -> None:
        super().__init__()
        self.count = self.most_logits = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
            self.count += 1
            if out.shape[1] == V:
                self.most_logits = max(self.most_logits, out.shape[0])
        return out


def test_the_head_is_applied_once_and_to_no_more_than_a_chunk() -> None:
    hidden, weight, targets = _inputs()
    with _Products() as products:
        linear_cross_entropy_sum(hidden, weight, targets, 10).backward()
    assert products.count == 3 * 4
    assert products.most_logits == 10


@pytest.mark.parametrize("inference", [False, True])
def test_without_gradients_only_the_losses_are_computed(inference: bool) -> None:
    hidden, weight, targets = _inputs()
    with _Products() as products, torch.inference_mode() if inference else torch.no_grad():
        loss = linear_cross_entropy_sum(hidden, weight, targets, 10)
    assert not loss.requires_grad
    assert products.count == 4
    assert loss.item() == pytest.approx(float(_truth(hidden, weight, targets, 1.0)[0]), rel=1e-6)
    frozen = linear_cross_entropy_sum(hidden.detach(), weight.detach(), targets, 10)
    assert torch.equal(frozen, loss.clone())


def test_rows_without_a_target_get_a_zero_gradient() -> None:
    hidden, weight, targets = _inputs()
    index = torch.arange(1, T, 3)
    linear_cross_entropy_sum(hidden, weight, targets[index], 5, index).backward()
    elsewhere = torch.ones(T, dtype=torch.bool).index_fill(0, index, False)
    truth = _truth(hidden, weight, targets.masked_fill(elsewhere, IGNORED), 1.0)
    assert _error(hidden.grad, truth[1]) < 1e-6
    assert _error(weight.grad, truth[2]) < 1e-6
    assert not hidden.grad[elsewhere].any()


def test_no_target_at_all_is_a_zero_loss_with_a_zero_gradient() -> None:
    hidden, weight, targets = _inputs()
    none = torch.empty(0, dtype=torch.int64)
    loss = linear_cross_entropy_sum(hidden, weight, targets[none], 5, none)
    loss.backward()
    assert loss.item() == 0
    assert not hidden.grad.any()
    assert not weight.grad.any()


@pytest.mark.parametrize("held", [torch.bfloat16, torch.float32])
def test_bfloat16_errs_no_more_than_autograd_over_whole_logits(held: torch.dtype) -> None:
    """Four chunks. Relative to float64 both gradients are off by about 3e-3; autograd's, from whole logits, as much.

    A weight held in float32 is cast, as the eager head does, and its gradient is summed in float32.
    """
    hidden, weight, targets = _inputs(torch.bfloat16, (256, 64, 400), spread=0.2)
    weight = weight.detach().to(held).requires_grad_()
    factor = 0.3
    truth = _truth(hidden, weight.bfloat16(), targets, factor)
    (linear_cross_entropy_sum(hidden, weight, targets, 64) * factor).backward()
    mine = hidden.grad, weight.grad
    hidden.grad = weight.grad = None
    logits = F.linear(hidden, weight.to(hidden.dtype)).float()
    (F.cross_entropy(logits, targets, reduction="sum") * factor).backward()
    assert mine[0].dtype == torch.bfloat16
    assert mine[1].dtype == held
    eager = _error(hidden.grad, truth[1]), _error(weight.grad, truth[2])
    assert _error(mine[0], truth[1]) < 1.3 * eager[0]  # one rounding more, by the factor
    assert _error(mine[1], truth[2]) < (2.0 if held == torch.bfloat16 else 1.05) * eager[1]


@pytest.mark.parametrize(("num_chunks", "limit"), [(1, 2.5e-3), (8, 4e-3), (64, 9e-3)])
def test_bfloat16_sums_over_chunks_err_as_the_description_says(num_chunks: int, limit: float) -> None:
    hidden, weight, targets = _inputs(torch.bfloat16, (128 * num_chunks, 16, 50), spread=0.2)
    linear_cross_entropy_sum(hidden, weight, targets, 128).backward()
    truth = _truth(hidden, weight, targets, 1.0)[2]
    assert _error(weight.grad, truth) < limit
    wide = weight.detach().float().requires_grad_()
    linear_cross_entropy_sum(hidden, wide, targets, 128).backward()
    assert _error(wide.grad, truth) < 1.5e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_what_memory_held_before_does_not_matter(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of logits are padded; oneDNN's bfloat16 product read the padding, and gradients were now and then NaN."""
    empty = torch.Tensor.new_empty

    def poisoned(self: torch.Tensor, *size: Any, **options: Any) -> torch.Tensor:
        return empty(self, *size, **options).fill_(torch.nan)

    hidden, weight, targets = _inputs(dtype, (64, 32, 200))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)
    linear_cross_entropy_sum(hidden, weight, targets, 64).backward()
    assert hidden.grad.isfinite().all()
    assert weight.grad.isfinite().all()


def test_split_products_write_where_rows_lie_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient of a transposed hidden lies transposed too, and products through a matrix unit write by rows."""
    hidden, weight, targets = _inputs(shape=(300, D, V))
    turned = hidden.detach().t().contiguous().t().requires_grad_()
    written = []

    def product(x: torch.Tensor, right: Any, *, flat: bool, out: torch.Tensor) -> torch.Tensor:
        written.append(out.stride(-1))
        return torch.mm(x, right.weight_FD if flat else right.weight_FD.t(), out=out)

    monkeypatch.setattr(cpu_train, "takes", lambda *tensors: all(t.stride(-1) == 1 for t in tensors))
    monkeypatch.setattr(cpu_train._state, "splits", True)
    monkeypatch.setattr(cpu_train, "product", product)
    monkeypatch.setattr(module, "cross_entropy_and_grad_", cross_entropy_and_grad_reference_)
    linear_cross_entropy_sum(turned, weight, targets, 300).backward()
    assert set(written) <= {1}
    _, grad, _ = _truth(hidden, weight, targets, 1.0)
    assert turned.grad is not None
    torch.testing.assert_close(turned.grad.double(), grad, rtol=1e-4, atol=1e-5)


def test_the_incoming_scalar_is_not_rounded_to_the_gradients_dtype() -> None:
    """1.003 is 1 in bfloat16: every gradient would be off by 0.3 %."""
    hidden, weight, targets = _inputs(torch.bfloat16, (64, 32, 200))
    (linear_cross_entropy_sum(hidden, weight, targets, 64) * 1.003).backward()
    scaled = hidden.grad.clone(), weight.grad.clone()
    hidden.grad = weight.grad = None
    linear_cross_entropy_sum(hidden, weight, targets, 64).backward()
    for mine, plain in zip(scaled, (hidden.grad, weight.grad), strict=True):
        assert torch.equal(mine, (plain.float() * 1.003).bfloat16())


def test_float16_keeps_probabilities_that_vanish_in_its_range() -> None:
    """Over 60,000 words a flat softmax has p = 1.7e-5, of which plain float16 keeps 8 bits; of less, fewer."""
    hidden, weight, targets = _inputs(torch.float16, (16, 8, 60_000), spread=0.5)
    scale = 65536.0 / 1000
    (linear_cross_entropy_sum(hidden, weight, targets, 8) * scale).backward()
    truth = _truth(hidden, weight, targets, scale)
    assert weight.grad.dtype == torch.float16
    assert _error(hidden.grad, truth[1]) < 1e-3
    assert _error(weight.grad, truth[2]) < 1e-3
    rare = (truth[2].abs() > 0) & (truth[2].abs() < 1e-2)
    assert _error(weight.grad[rare], truth[2][rare]) < 1e-3


def test_a_weight_held_narrower_than_the_stream_keeps_its_dtype() -> None:
    hidden, weight, targets = _inputs()
    narrow = weight.detach().bfloat16().requires_grad_()
    linear_cross_entropy_sum(hidden, narrow, targets, 10).backward()
    assert narrow.grad.dtype == torch.bfloat16
    assert _error(narrow.grad, _truth(hidden, narrow.float(), targets, 1.0)[2]) < 2**-8


def test_a_second_backward_pass_is_refused() -> None:
    hidden, weight, targets = _inputs()
    loss = linear_cross_entropy_sum(hidden, weight, targets, 10)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="backward was called twice"):
        loss.backward()


def test_the_weights_gradient_is_taken_over_without_a_copy() -> None:
    hidden, weight, targets = _inputs()
    loss = linear_cross_entropy_sum(hidden, weight, targets, 10)
    (_, _), (gradient, _) = loss.grad_fn.gradients
    address = gradient.data_ptr()
    del gradient
    loss.backward()
    assert weight.grad.data_ptr() == address


@pytest.mark.parametrize(
    ("rows", "chunk", "sizes"),
    [
        (0, 8, []),
        (5, 8, [5]),
        (9, 8, [8, 1]),
        (2049, 2048, [1152, 897]),
        (4096, 2048, [2048, 2048]),
        (300, 100, [100] * 3),
    ],
)
def test_chunks_are_nearly_equal_and_never_longer_than_asked(rows: int, chunk: int, sizes: list[int]) -> None:
    assert [piece.stop - piece.start for piece in module._chunks(rows, chunk)] == sizes
