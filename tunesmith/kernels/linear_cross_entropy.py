"""A linear head and its cross-entropy in one: the logits of all tokens never exist, and no product is computed twice.

For a chunk of tokens: logits = hidden @ weight.T; losses and, over the logits, their gradient; then
grad_hidden = dlogits @ weight and grad_weight += dlogits.T @ hidden. All that is left for the backward pass is to
multiply both by the incoming scalar, so the saved gradients are those of the plain sum of the losses.

What is rounded where: the softmax is in float32; the gradient of the logits is rounded to the compute dtype once, as
autograd rounds it, but before the incoming scalar comes in. In bfloat16 that, and the multiplication of grad_hidden at
the end, each cost one rounding of 2^-8 at most. In float16 the gradient of the logits is computed 1024 times larger,
because a probability under 6e-8 would vanish; an overflow that no loss scale could mend would need weights beyond 30.
grad_weight is summed over the chunks in float32 where the weight is wider than the products or in float16, whose range
the sum over many tokens could leave; else in the weight's dtype. In bfloat16 every chunk then rounds the sum once more:
against float64 its relative error is 2.1e-3 from one chunk, 3.3e-3 from 8 and 7.8e-3 from 64 (in float32 under 1.3e-3).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tunesmith.kernels import cpu_train
from tunesmith.kernels.cross_entropy import cross_entropy, cross_entropy_and_grad_
from tunesmith.kernels.scale import scale_
from tunesmith.units import ceil_div

# Logits: where a row begins. Unaligned rows send products and wide loads down slow paths (a vocabulary of 50,257).
_ALIGNMENT = 16
# Rows: a chunk is a multiple of the products' tiles.
_TILE = 128
# In float16 the gradient of the logits is held this many times larger.
_FLOAT16_SCALE = 1024.0


def linear_cross_entropy_sum(
    hidden_TD: Tensor, weight_VD: Tensor, targets_N: Tensor, chunk_tokens: int, index_N: Tensor | None = None
) -> Tensor:
    """The sum of -log softmax(hidden @ weight.T)[target]: a float32 scalar. The products are in the dtype of hidden.

    Without gradients (evaluation) only the losses are computed. The gradients can be asked for once.

    Args:
        weight_VD: in any dtype; its gradient has the same.
        targets_N: int64 on the device; see kernels.cross_entropy for ignored and impossible targets.
        chunk_tokens: rows of logits that exist at once, at most.
        index_N: the rows of hidden that have a target, without repetition, int64 on the device; None: all T.
    """
    wanted = hidden_TD.requires_grad, weight_VD.requires_grad
    if torch.is_grad_enabled() and any(wanted):
        total = LinearCrossEntropy.apply(hidden_TD, weight_VD, targets_N, chunk_tokens, index_N)
        assert isinstance(total, Tensor)
        return total
    return _Head(hidden_TD, weight_VD, targets_N, chunk_tokens, index_N, (False, False)).run()


class LinearCrossEntropy(torch.autograd.Function):
    """See `linear_cross_entropy_sum`."""

    @staticmethod
    def forward(
        ctx: Any, hidden_TD: Tensor, weight_VD: Tensor, targets_N: Tensor, chunk_tokens: int, index_N: Tensor | None
    ) -> Tensor:
        wanted = ctx.needs_input_grad[:2]
        head = _Head(hidden_TD, weight_VD, targets_N, chunk_tokens, index_N, wanted)
        total = head.run()
        # On the context and not among the saved tensors: offloading those to the host would be of no use.
        ctx.gradients = head.gradients()
        ctx.weight_dtype = weight_VD.dtype
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_total: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError(
                "linear_cross_entropy_sum: backward was called twice; its gradients are multiplied in place"
            )
        (grad_hidden, hidden_scale), (grad_weight, _) = ctx.gradients
        ctx.gradients = None  # the only reference, so that the weight can take the tensor as it is
        if grad_hidden is not None:
            scale_(grad_hidden, grad_total / hidden_scale)
        if grad_weight is not None:
            scale_(grad_weight, grad_total)
            grad_weight = grad_weight.to(ctx.weight_dtype)
        return grad_hidden, grad_weight, None, None, None


class _Head:
    """One pass over the chunks, and the gradients it leaves."""

    def __init__(
        self,
        hidden_TD: Tensor,
        weight_VD: Tensor,
        targets_N: Tensor,
        chunk_tokens: int,
        index_N: Tensor | None,
        wanted: tuple[bool, bool],
    ) -> None:
        self.hidden, self.targets, self.index = hidden_TD, targets_N, index_N
        self.weight = weight_VD.to(hidden_TD.dtype)  # once, not for every chunk
        self.scale = _FLOAT16_SCALE if hidden_TD.dtype == torch.float16 else 1.0
        self.chunks = _chunks(targets_N.numel(), chunk_tokens)
        self.with_gradient = any(wanted)
        self.grad_hidden = self.grad_weight = None
        if wanted[0]:
            complete = index_N is None
            self.grad_hidden = torch.empty_like(hidden_TD) if complete else torch.zeros_like(hidden_TD)
        if wanted[1]:
            # Zeros of no chunk, and not None: processes that sum their gradients must all have one.
            make = torch.empty_like if self.chunks else torch.zeros_like
            self.grad_weight = make(weight_VD, dtype=_sum_dtype(weight_VD.dtype, hidden_TD.dtype))

    def run(self) -> Tensor:
        """The sum of the losses."""
        losses_N = torch.zeros(self.targets.numel(), dtype=torch.float32, device=self.hidden.device)
        num_rows = max((chunk.stop - chunk.start for chunk in self.chunks), default=0)
        buffer = self.hidden.new_empty(num_rows, ceil_div(len(self.weight), _ALIGNMENT) * _ALIGNMENT)
        # oneDNN's bfloat16 product reads past the rows of its left factor, and NaN times nothing is NaN.
        buffer[:, len(self.weight) :].zero_()
        for chunk in self.chunks:
            logits = buffer[: chunk.stop - chunk.start, : len(self.weight)]
            losses_N[chunk] = self._chunk(chunk, logits)
        return losses_N.sum()

    def gradients(self) -> tuple[tuple[Tensor | None, float], tuple[Tensor | None, float]]:
        """Of hidden and weight, each with what it is too large by."""
        return (self.grad_hidden, self.scale), (self.grad_weight, 1.0)

    def _chunk(self, chunk: slice, logits_CV: Tensor) -> Tensor:
        rows = None if self.index is None else self.index[chunk]
        hidden_CD = self.hidden[chunk] if rows is None else self.hidden.index_select(0, rows)
        _multiply(hidden_CD, self.weight, logits_CV, flat=False)
        if not self.with_gradient:
            return cross_entropy(logits_CV, self.targets[chunk])
        losses = cross_entropy_and_grad_(logits_CV, self.targets[chunk], self.scale)
        self._add_gradients(logits_CV, hidden_CD, chunk, rows)
        return losses

    def _add_gradients(self, dlogits_CV: Tensor, hidden_CD: Tensor, chunk: slice, rows: Tensor | None) -> None:
        if self.grad_hidden is not None:
            if rows is None:
                _multiply(dlogits_CV, self.weight, self.grad_hidden[chunk], flat=True)
            else:
                grad_CD = torch.empty_like(hidden_CD)
                self.grad_hidden.index_copy_(0, rows, _multiply(dlogits_CV, self.weight, grad_CD, flat=True))
        if self.grad_weight is not None:
            _add_product(self.grad_weight, dlogits_CV.t(), hidden_CD, 1.0 / self.scale, first=chunk.start == 0)


def _multiply(left_CK: Tensor, weight_VD: Tensor, out: Tensor, *, flat: bool) -> Tensor:
    """out = left @ weight where `flat`, else left @ weight.T."""
    if cpu_train.takes_product(left_CK, weight_VD, out):
        return cpu_train.product(left_CK, cpu_train.Adapted(weight_VD), flat=flat, out=out)
    return torch.mm(left_CK, weight_VD if flat else weight_VD.t(), out=out)


def _add_product(total_VD: Tensor, left_VC: Tensor, right_CD: Tensor, alpha: float, *, first: bool) -> None:
    """total (what it held is forgotten where `first`) += alpha * left @ right, in place, in total's dtype."""
    beta = 0.0 if first else 1.0
    if total_VD.dtype == left_VC.dtype:
        total_VD.addmm_(left_VC, right_CD, beta=beta, alpha=alpha)
    elif total_VD.is_cuda:
        torch.addmm(total_VD, left_VC, right_CD, out_dtype=total_VD.dtype, beta=beta, alpha=alpha, out=total_VD)
    else:
        total_VD.addmm_(left_VC.to(total_VD.dtype), right_CD.to(total_VD.dtype), beta=beta, alpha=alpha)


def _sum_dtype(weight: torch.dtype, compute: torch.dtype) -> torch.dtype:
    """What grad_weight is summed in: see the module's description."""
    if weight == compute and compute != torch.float16:
        return compute
    return torch.promote_types(compute, torch.float32)


def _chunks(num_rows: int, chunk_tokens: int) -> list[slice]:
    """Nearly equal pieces of at most chunk_tokens rows: a short last one would read the whole weight for few rows."""
    if num_rows == 0:
        return []
    size = ceil_div(num_rows, ceil_div(num_rows, chunk_tokens))
    size = min(chunk_tokens, ceil_div(size, _TILE) * _TILE)
    return [slice(start, min(start + size, num_rows)) for start in range(0, num_rows, size)]
