"""Cross-entropy of rows of logits with its gradient in the same pass, in place: one read for the sums, one to rewrite.

With p = softmax(logits) of a row and t its target, loss = log(sum(exp(logits))) - logits[t], and the gradient with
respect to the logits is p, less 1 at t. All of it is computed in float32 and rounded once, to the logits' dtype.
A row whose target is `IGNORED` has loss 0 and gradient 0. A target that is no word of the vocabulary can't be refused
without waiting for the device: its loss is NaN.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tunesmith.kernels import cpu_train
from tunesmith.kernels.in_float32 import in_float32_on_cpu
from tunesmith.kernels.nf4 import use_kernel

IGNORED = -100


def cross_entropy(logits_TV: Tensor, targets_T: Tensor) -> Tensor:
    """-log softmax(logits)[target] of every row: float32 [T].

    Args: logits_TV: float32, bfloat16 or float16; rows may be apart from each other, a row is contiguous.
    targets_T: int64.
    """
    if use_kernel(logits_TV.device):
        from tunesmith.kernels.cross_entropy_triton import cross_entropy_operator

        return cross_entropy_operator(logits_TV, targets_T, IGNORED)
    return cross_entropy_reference(logits_TV, targets_T)


def cross_entropy_and_grad_(logits_TV: Tensor, targets_T: Tensor, scale: Tensor | float = 1.0) -> Tensor:
    """The losses of the rows as `cross_entropy` has them; the logits become the gradient of scale * losses.sum().

    Args: as `cross_entropy`; scale: a number, or a tensor of one element on the logits' device, which is not read by
    the host. In float16 a scale of more than 1 keeps small probabilities from vanishing below 6e-8.
    """
    if logits_TV.dim() == 2 and cpu_train.takes(logits_TV):
        return cpu_train.cross_entropy_and_grad_(logits_TV, targets_T, float(scale), IGNORED)
    if in_float32_on_cpu(logits_TV):
        return _cross_entropy_and_grad_in_place(logits_TV, targets_T, scale)
    if not use_kernel(logits_TV.device):
        return cross_entropy_and_grad_reference_(logits_TV, targets_T, scale)
    from tunesmith.kernels.cross_entropy_triton import cross_entropy_and_grad_operator

    if isinstance(scale, Tensor):
        return cross_entropy_and_grad_operator(logits_TV, targets_T, IGNORED, 1.0, scale)
    return cross_entropy_and_grad_operator(logits_TV, targets_T, IGNORED, scale, None)


def cross_entropy_reference(logits_TV: Tensor, targets_T: Tensor) -> Tensor:
    """cross_entropy by plain torch: the truth that the kernel must equal but for the order of the sum."""
    return _losses(logits_TV.float().log_softmax(dim=-1), targets_T)


def cross_entropy_and_grad_reference_(logits_TV: Tensor, targets_T: Tensor, scale: Tensor | float = 1.0) -> Tensor:
    """cross_entropy_and_grad_ by plain torch."""
    # A copy even of float32 logits: log_softmax makes it.
    log_probabilities = logits_TV.float().log_softmax(dim=-1)
    losses = _losses(log_probabilities, targets_T)
    gradient = log_probabilities.exp_()
    column = _in_vocabulary(targets_T, logits_TV.shape[-1])[:, None]
    gradient.scatter_(1, column, gradient.gather(1, column) - 1.0)
    gradient.mul_(scale).masked_fill_((targets_T == IGNORED)[:, None], 0.0)
    logits_TV.copy_(gradient)
    return losses


def _cross_entropy_and_grad_in_place(logits_TV: Tensor, targets_T: Tensor, scale: Tensor | float) -> Tensor:
    """cross_entropy_and_grad_ without a second tensor of the logits' size."""
    column = _in_vocabulary(targets_T, logits_TV.shape[-1])[:, None]
    logits_TV.sub_(logits_TV.amax(-1, keepdim=True))
    of_target = logits_TV.gather(1, column)
    total = logits_TV.exp_().sum(-1, keepdim=True)
    kept = targets_T[:, None] != IGNORED
    factor = torch.where(kept, scale / total, 0.0)
    logits_TV.mul_(factor)
    logits_TV.scatter_add_(1, column, torch.where(kept, -scale * torch.ones_like(total), 0.0))
    return _kept((total.log_() - of_target).squeeze(1), column.squeeze(1), targets_T)


def _losses(log_probabilities_TV: Tensor, targets_T: Tensor) -> Tensor:
    column = _in_vocabulary(targets_T, log_probabilities_TV.shape[-1])
    return _kept(-log_probabilities_TV.gather(1, column[:, None]).squeeze(1), column, targets_T)


def _kept(losses_T: Tensor, column_T: Tensor, targets_T: Tensor) -> Tensor:
    """NaN where the target is no word (it was read at `column` instead), 0 where it is ignored."""
    return losses_T.masked_fill(column_T != targets_T, torch.nan).masked_fill(targets_T == IGNORED, 0.0)


def _in_vocabulary(targets_T: Tensor, vocab_size: int) -> Tensor:
    return targets_T.clamp(0, vocab_size - 1)
