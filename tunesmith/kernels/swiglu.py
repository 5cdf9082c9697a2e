"""SwiGLU over a fused gate-up activation, and its gradient.

h = silu(gate) * up with silu(g) = g * sigmoid(g). Computed in float32 and rounded once, where the eager path also
rounds silu(gate): not the same bits in bfloat16.
Source: arXiv 2002.05202, section 2; the gradient is derived from it: with s = sigmoid(gate),
grad_up = grad_h * gate * s and grad_gate = grad_h * up * s * (1 + gate * (1 - s)).
"""

from __future__ import annotations

import torch
from torch import Tensor

from tunesmith.kernels import cpu_train
from tunesmith.kernels.in_float32 import in_float32_on_cpu
from tunesmith.kernels.nf4 import use_kernel


def swiglu(gate_up_TF: Tensor) -> Tensor:
    """silu(gate) * up, [T, I] contiguous, of gate_up [T, 2I]: the first I columns are the gate's."""
    if use_kernel(gate_up_TF.device):
        from tunesmith.kernels.swiglu_triton import swiglu_operator

        return swiglu_operator(gate_up_TF)
    if gate_up_TF.dim() == 2 and cpu_train.takes(gate_up_TF):
        return cpu_train.swiglu(gate_up_TF)
    if in_float32_on_cpu(gate_up_TF):
        return _swiglu_in_place(gate_up_TF)
    return swiglu_reference(gate_up_TF)


def swiglu_backward(
    grad_h_TI: Tensor, gate_up_TF: Tensor, want_h: bool, out: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """The gradient of gate_up [T, 2I], and h [T, I] once more (bit for bit) where it is wanted.

    Args: out: where the gradient is written, of gate_up's shape and dtype; gate_up itself saves its memory, since
    every element is read before its own place is written. No other overlap is allowed.
    Returns: the gradient (`out` where given); h or None.
    """
    if use_kernel(gate_up_TF.device):
        from tunesmith.kernels.swiglu_triton import swiglu_backward_on_gpu

        return swiglu_backward_on_gpu(grad_h_TI, gate_up_TF, want_h, out)
    if gate_up_TF.dim() == 2 and cpu_train.takes(grad_h_TI, gate_up_TF, out):
        return cpu_train.swiglu_backward(grad_h_TI, gate_up_TF, want_h, out)
    if in_float32_on_cpu(grad_h_TI, gate_up_TF, out):
        return _swiglu_backward_in_place(grad_h_TI, gate_up_TF, want_h, out)
    return swiglu_backward_reference(grad_h_TI, gate_up_TF, want_h, out)


def swiglu_reference(gate_up_TF: Tensor) -> Tensor:
    """swiglu by plain torch: the truth that the kernel must equal."""
    gate, up = gate_up_TF.float().chunk(2, dim=-1)
    return (gate * torch.sigmoid(gate) * up).to(gate_up_TF.dtype)


def swiglu_backward_reference(
    grad_h_TI: Tensor, gate_up_TF: Tensor, want_h: bool, out: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """swiglu_backward by plain torch."""
    h = swiglu_reference(gate_up_TF) if want_h else None
    grad_h = grad_h_TI.float()
    gate, up = gate_up_TF.float().chunk(2, dim=-1)
    gate_sigmoid = torch.sigmoid(gate)
    grad_gate = grad_h * up * gate_sigmoid * (1 + gate * (1 - gate_sigmoid))
    grad = torch.cat((grad_gate, grad_h * gate * gate_sigmoid), dim=-1).to(gate_up_TF.dtype)
    return (grad if out is None else out.copy_(grad)), h


def _swiglu_in_place(gate_up_TF: Tensor) -> Tensor:
    """swiglu with one tensor besides its input."""
    gate, up = gate_up_TF.chunk(2, dim=-1)
    h = gate_up_TF.new_empty(gate.shape)
    torch.ops.aten.silu.out(gate, out=h)
    return h.mul_(up)


def _swiglu_backward_in_place(
    grad_h_TI: Tensor, gate_up_TF: Tensor, want_h: bool, out: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """swiglu_backward; every half of gate_up is read for the last time by what writes over it."""
    gate, up = gate_up_TF.chunk(2, dim=-1)
    out = torch.empty_like(gate_up_TF) if out is None else out
    grad_gate, grad_up = out.chunk(2, dim=-1)
    activated = gate_up_TF.new_empty(gate.shape)
    torch.ops.aten.silu.out(gate, out=activated)
    grad_activated = grad_h_TI * up
    h = activated * up if want_h else None
    torch.mul(grad_h_TI, activated, out=grad_up)
    torch.ops.aten.silu_backward.grad_input(grad_activated, gate, grad_input=grad_gate)
    return out, h
