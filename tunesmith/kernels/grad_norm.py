"""The 2-norm over all gradients: large tensors in programs of equal work, small ones together."""

from __future__ import annotations

import torch
from torch import Tensor

from tunesmith.kernels.nf4 import use_kernel

# Values whose norm one program finds.
PART = 2**14
# Tensors with more bytes are worth a launch of their own.
LARGE_BYTES = 4 * 2**20
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def global_norm(gradients: list[Tensor]) -> Tensor:
    """The 2-norm over all gradients, a float32 scalar on their device.

    The same bits for the same gradients: parts are summed in one order, whichever is ready first.
    """
    if not gradients:
        return torch.zeros(())
    large = [gradient for gradient in gradients if _takes_kernel(gradient)]
    if not large:
        return _together(gradients)
    device = large[0].device
    norms = [part_norms([g for g in large if g.device == other]) for other in dict.fromkeys(g.device for g in large)]
    small = [gradient for gradient in gradients if not _takes_kernel(gradient)]
    if small:
        norms.append(_together(small)[None])
    return torch.linalg.vector_norm(torch.cat([norm.to(device) for norm in norms]))


def part_norms(gradients: list[Tensor]) -> Tensor:
    """The norms of the gradients' parts of PART values, float32 [sum of ceil(N / PART)], by the Triton kernel.

    Args: gradients: contiguous, on one device.
    """
    from tunesmith.kernels.grad_norm_triton import part_norms_operator

    return part_norms_operator(gradients, PART)


def part_norms_reference(gradients: list[Tensor]) -> Tensor:
    """`part_norms` in plain torch."""
    parts = [part for gradient in gradients for part in gradient.reshape(-1).split(PART)]
    return torch.stack([torch.linalg.vector_norm(part, dtype=torch.float32) for part in parts])


def _takes_kernel(gradient: Tensor) -> bool:
    if gradient.nbytes <= LARGE_BYTES or not gradient.is_contiguous() or gradient.dtype not in _DTYPES:
        return False
    return use_kernel(gradient.device)


def _together(gradients: list[Tensor]) -> Tensor:
    norms = torch._foreach_norm(gradients, 2, dtype=torch.float32)
    return torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device) for norm in norms]))
