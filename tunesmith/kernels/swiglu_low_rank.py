"""SwiGLU of a gate-up activation whose adapters are still a skinny product beside it, and its gradient.

    gate_up = base + low @ up.T                base [T, 2I] from the frozen weight, low [T, R], up [2I, R]
    grad_h  = base_grad_h + dlow @ down        dlow [T, S], down [S, I]: the adapters of the projection after it

The sums are made tile by tile in float32 and never written: adding them to the activations first costs a trip of the
widest tensor of a block to memory and back, and rounds once more. SwiGLU itself and its gradient are `swiglu`'s.
Source: arXiv 2106.09685, section 4.1 (the skinny products), and `tunesmith.kernels.swiglu`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tunesmith.kernels.in_float32 import in_float32_on_cpu
from tunesmith.kernels.nf4 import use_kernel
from tunesmith.kernels.swiglu import swiglu, swiglu_backward


def swiglu_low_rank(gate_up_TF: Tensor, low_TR: Tensor | None, up_FR: Tensor | None) -> Tensor:
    """silu(gate) * up, [T, I] contiguous, of gate_up + low @ up.T; the first I columns are the gate's.

    Rounded once, at the end. Without adapters (both None) this is `swiglu`.
    """
    if low_TR is None or up_FR is None:
        return swiglu(gate_up_TF)
    if in_float32_on_cpu(gate_up_TF, low_TR, up_FR):
        return swiglu(_summed(gate_up_TF, low_TR, up_FR.t()))
    if not use_kernel(gate_up_TF.device):
        return swiglu_low_rank_reference(gate_up_TF, low_TR, up_FR)
    from tunesmith.kernels.swiglu_low_rank_triton import swiglu_low_rank_operator

    return swiglu_low_rank_operator(gate_up_TF, low_TR, up_FR)


def swiglu_low_rank_backward(
    grad_h_TI: Tensor,
    gate_up_TF: Tensor,
    low_TR: Tensor | None,
    up_FR: Tensor | None,
    dlow_TS: Tensor | None,
    down_SI: Tensor | None,
    want_h: bool,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The gradient of gate_up + low @ up.T, [T, 2I], given grad_h + dlow @ down; and h once more where it is wanted.

    Args: low_TR, up_FR: as in the forward pass, or both None. dlow_TS, down_SI: the rest of grad_h, or both None.
    out: where the gradient is written; gate_up itself is allowed, no other overlap.
    Returns: the gradient (`out` where given); h [T, I], the bits of the forward pass's, or None.
    """
    if in_float32_on_cpu(grad_h_TI, gate_up_TF, low_TR, up_FR, dlow_TS, down_SI, out):
        gate_up = _summed(gate_up_TF, low_TR, None if up_FR is None else up_FR.t())
        return swiglu_backward(_summed(grad_h_TI, dlow_TS, down_SI), gate_up, want_h, out)
    if not use_kernel(gate_up_TF.device):
        return swiglu_low_rank_backward_reference(grad_h_TI, gate_up_TF, low_TR, up_FR, dlow_TS, down_SI, want_h, out)
    if low_TR is None and dlow_TS is None:
        return swiglu_backward(grad_h_TI, gate_up_TF, want_h, out)
    from tunesmith.kernels.swiglu_low_rank_triton import swiglu_low_rank_backward_on_gpu

    return swiglu_low_rank_backward_on_gpu(grad_h_TI, gate_up_TF, low_TR, up_FR, dlow_TS, down_SI, want_h, out)


def swiglu_low_rank_reference(gate_up_TF: Tensor, low_TR: Tensor | None, up_FR: Tensor | None) -> Tensor:
    """swiglu_low_rank by plain torch: the truth that the kernel must equal but for the order of the sums."""
    gate, up = _summed(gate_up_TF, low_TR, None if up_FR is None else up_FR.t()).chunk(2, dim=-1)
    return (gate * torch.sigmoid(gate) * up).to(gate_up_TF.dtype)


def swiglu_low_rank_backward_reference(
    grad_h_TI: Tensor,
    gate_up_TF: Tensor,
    low_TR: Tensor | None,
    up_FR: Tensor | None,
    dlow_TS: Tensor | None,
    down_SI: Tensor | None,
    want_h: bool,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """swiglu_low_rank_backward by plain torch."""
    dtype = gate_up_TF.dtype
    gate, up = _summed(gate_up_TF, low_TR, None if up_FR is None else up_FR.t()).chunk(2, dim=-1)
    grad_h = _summed(grad_h_TI, dlow_TS, down_SI)
    sigmoid = torch.sigmoid(gate)
    h = (gate * sigmoid * up).to(dtype) if want_h else None
    grad_gate = grad_h * up * sigmoid * (1 + gate * (1 - sigmoid))
    grad = torch.cat((grad_gate, grad_h * gate * sigmoid), dim=-1).to(dtype)
    return (grad if out is None else out.copy_(grad)), h


def _summed(base: Tensor, left: Tensor | None, right: Tensor | None) -> Tensor:
    """base + left @ right in float32."""
    if left is None or right is None:
        return base.float()
    return torch.addmm(base.float(), left.float(), right.float())
