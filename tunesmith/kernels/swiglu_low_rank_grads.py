"""SwiGLU's gradient with the gradients of the adapters on both sides of it, summed while their factors are at hand.

    dgate_up = the gradient of gate_up + low @ up.T          as `swiglu_low_rank_backward` makes it
    of_up    = dgate_up.T @ low       [2I, R]                the adapters before: their second matrix
    of_down  = dlow.T @ h             [S, I]                 the adapters after: their first

Made by themselves, the two sums read dgate_up and h from memory again, and h has to be written for nothing else: 1.2 GB
for 8,192 tokens of a 7B model's layer. dgate_up and h are rounded to their dtype before they are multiplied, as they
are there; the sums are float32.
"""

from __future__ import annotations

from torch import Tensor

from tunesmith.kernels.nf4 import use_kernel
from tunesmith.kernels.swiglu_low_rank import swiglu_low_rank_backward_reference

# Ranks above have sums that do not fit into a program's registers.
WIDEST_RANK = 64
Factors = tuple[Tensor | None, Tensor | None]


def can_sum_grads(before: Factors, after: Factors) -> bool:
    """Whether there are adapters (their skinny activation and their matrix) on both sides, of ranks that are taken."""
    if any(tensor is None for tensor in (*before, *after)):
        return False
    return all(left is not None and 0 < left.shape[1] <= WIDEST_RANK for left, _ in (before, after))


def swiglu_low_rank_grads(
    grad_h_TI: Tensor,
    gate_up_TF: Tensor,
    low_TR: Tensor | None,
    up_FR: Tensor | None,
    dlow_TS: Tensor | None,
    down_SI: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """gate_up becomes the gradient of gate_up + low @ up.T, given grad_h + dlow @ down.

    Returns: dgate_up.T @ low, float32 [2I, R]; dlow.T @ h, float32 [S, I]; summed in the same order in every run.
    Raises: ValueError for factors that `can_sum_grads` does not take.
    """
    if low_TR is None or up_FR is None or dlow_TS is None or down_SI is None:
        raise ValueError("swiglu_low_rank_grads needs the factors of both adapters, and got None: see can_sum_grads")
    if not can_sum_grads((low_TR, up_FR), (dlow_TS, down_SI)):
        ranks = (low_TR.shape[1], dlow_TS.shape[1])
        raise ValueError(f"swiglu_low_rank_grads takes ranks from 1 to {WIDEST_RANK}, got {ranks}")
    arguments = (grad_h_TI, gate_up_TF, low_TR, up_FR, dlow_TS, down_SI)
    if not use_kernel(gate_up_TF.device):
        return swiglu_low_rank_grads_reference(*arguments)
    from tunesmith.kernels.swiglu_low_rank_grads_triton import swiglu_low_rank_grads_operator

    return swiglu_low_rank_grads_operator(*arguments)


def swiglu_low_rank_grads_reference(
    grad_h_TI: Tensor, gate_up_TF: Tensor, low_TR: Tensor, up_FR: Tensor, dlow_TS: Tensor, down_SI: Tensor
) -> tuple[Tensor, Tensor]:
    """swiglu_low_rank_grads by plain torch, one after the other: the kernel equals it but for the order of the sums."""
    factors = (low_TR, up_FR, dlow_TS, down_SI)
    grad_TF, h_TI = swiglu_low_rank_backward_reference(grad_h_TI, gate_up_TF, *factors, True, gate_up_TF)
    assert h_TI is not None
    return grad_TF.float().t() @ low_TR.float(), dlow_TS.float().t() @ h_TI.float()
