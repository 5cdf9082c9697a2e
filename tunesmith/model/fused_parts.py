"""The gradients of SwiGLU and of the adapters on both sides of it, by one kernel where one makes them all.

Elsewhere (DoRA, dropout, wide ranks, a CPU) launches of their own do the same, but for the order of sums.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from tunesmith.kernels.nf4 import use_kernel
from tunesmith.kernels.swiglu_low_rank import swiglu_low_rank_backward
from tunesmith.kernels.swiglu_low_rank_grads import can_sum_grads, swiglu_low_rank_grads
from tunesmith.model.low_rank import wide_product
from tunesmith.model.projection import Projection

Skinny = tuple[Tensor | None, Tensor | None]
"""Two factors whose product belongs to an activation, or two times None."""


@dataclass
class ActivationGrads:
    """What the backward pass of SwiGLU makes.

    gate_up: the gradient [T, 2I]; hidden: the activation [T, I], where a gradient is still to be made from it;
    of_wide [2I, R], of_narrow [S, I]: the gradients of the adapters' matrices beside it, float32, where they are made.
    """

    gate_up: Tensor
    hidden: Tensor | None
    of_wide: Tensor | None = None
    of_narrow: Tensor | None = None


def activation_grads(
    grad_h_TI: Tensor, gate_up_TF: Tensor, skinny: Skinny, grad_skinny: Skinny, up: Projection, down: Projection
) -> ActivationGrads:
    """The gradient of gate_up, written over it, with the adapters' gradients where one kernel sums them up, too.

    Args: skinny: whose product belongs to gate_up; grad_skinny: to grad_h.
    """
    if use_kernel(gate_up_TF.device) and _are_plain(up, down) and can_sum_grads(skinny, grad_skinny):
        sums = swiglu_low_rank_grads(grad_h_TI, gate_up_TF, *skinny, *grad_skinny)
        return ActivationGrads(gate_up_TF, None, *sums)
    arguments = (grad_h_TI, gate_up_TF, *skinny, *grad_skinny, down.needs_input)
    return ActivationGrads(*swiglu_low_rank_backward(*arguments, gate_up_TF))


def adapter_grads(
    projection: Projection, g_TF: Tensor, x_TD: Tensor | None, low_TR: Tensor, dlow_TR: Tensor, made: Skinny
) -> list[Tensor]:
    """`Projection.parameter_grads` where one or both of the gradients of up_FR and down_RD are `made` already."""
    of_up, of_down = made
    assert projection.low_rank is not None
    of_up = wide_product(g_TF.t(), low_TR) if of_up is None else of_up
    if of_down is None:
        assert x_TD is not None
        of_down = wide_product(dlow_TR.t(), x_TD)
    return projection.low_rank.master_grads(of_down, of_up)


def _are_plain(*projections: Projection) -> bool:
    """Whether their adapters' gradients are those of two products: neither DoRA's nor with dropout."""
    return all(type(projection) is Projection and not projection.dropout for projection in projections)
