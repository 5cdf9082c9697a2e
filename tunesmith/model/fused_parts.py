"""What the written-out blocks compute between two products, by the kernel that does most of what the products ask for.

A projection with an fp8 base multiplies codes, and the kernel that makes its input can quantise it on the way; the
adapters on both sides of SwiGLU need products with its gradients, and the kernel that makes those can sum them up.
Which of them run is in `USED`; else launches of their own do the same, but for the order of sums.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from tunesmith.kernels.norm_fp8 import rms_norm_fp8
from tunesmith.kernels.rms_norm import rms_norm
from tunesmith.kernels.swiglu_fp8 import swiglu_fp8, swiglu_fp8_backward
from tunesmith.kernels.swiglu_low_rank import swiglu_low_rank, swiglu_low_rank_backward
from tunesmith.kernels.swiglu_low_rank_grads import can_sum_grads, swiglu_low_rank_grads
from tunesmith.model.coded import hand_over
from tunesmith.model.fp8 import Fp8Linear
from tunesmith.model.low_rank import wide_product
from tunesmith.model.projection import Projection
from tunesmith.model.quant import NF4Linear
from tunesmith.model.trained_fp8 import TrainedFp8Linear

Skinny = tuple[Tensor | None, Tensor | None]
"""Two factors whose product belongs to an activation, or two times None."""


@dataclass
class Used:
    """Which of the kernels that do more than one thing run; read at every pass (recorded graphs keep theirs).

    norm_codes: the norm quantises its result for an fp8 base. swiglu_codes, swiglu_grad_codes: so do SwiGLU and its
    gradient; their launch has programs that wait for others, and is off until it is measured. adapter_grads: SwiGLU's
    gradient sums up the gradients of the adapters beside it; off until measured. Where that is done,
    `swiglu_grad_codes` is not looked at.
    """

    norm_codes: bool = True
    swiglu_codes: bool = False
    swiglu_grad_codes: bool = False
    adapter_grads: bool = False


USED = Used()


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


def normed(x_TD: Tensor, weight_D: Tensor, eps: float, projection: Projection) -> tuple[Tensor, Tensor]:
    """`rms_norm`, with codes for the projection where it takes them."""
    if not (USED.norm_codes and _takes_codes(projection)):
        return rms_norm(x_TD, weight_D, eps)
    y_TD, rstd_T, *codes = rms_norm_fp8(x_TD, weight_D, eps)
    hand_over(y_TD, (codes[0], codes[1]))
    return y_TD, rstd_T


def activated(gate_up_TF: Tensor, skinny: Skinny, down: Projection) -> Tensor:
    """`swiglu_low_rank`, with codes for the projection after it where it takes them."""
    if not (USED.swiglu_codes and _takes_codes(down)):
        return swiglu_low_rank(gate_up_TF, *skinny)
    h_TI, *codes = swiglu_fp8(gate_up_TF, *skinny)
    hand_over(h_TI, (codes[0], codes[1]))
    return h_TI


def activation_grads(
    grad_h_TI: Tensor, gate_up_TF: Tensor, skinny: Skinny, grad_skinny: Skinny, up: Projection, down: Projection
) -> ActivationGrads:
    """The gradient of gate_up, written over it, with what the products before and after it ask for.

    Args: skinny: whose product belongs to gate_up; grad_skinny: to grad_h.
    """
    if USED.adapter_grads and _are_plain(up, down) and can_sum_grads(skinny, grad_skinny):
        sums = swiglu_low_rank_grads(grad_h_TI, gate_up_TF, *skinny, *grad_skinny)
        return ActivationGrads(gate_up_TF, None, *sums)
    arguments = (grad_h_TI, gate_up_TF, *skinny, *grad_skinny, down.needs_input)
    if not (USED.swiglu_grad_codes and _takes_codes(up)):
        return ActivationGrads(*swiglu_low_rank_backward(*arguments, gate_up_TF))
    fold_F = up.base.fold if isinstance(up.base, NF4Linear | Fp8Linear) else None
    grad, h, *codes = swiglu_fp8_backward(*arguments, fold_F, gate_up_TF)
    hand_over(grad, (codes[0], codes[1]), fold_F)
    return ActivationGrads(grad, h)


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


def _takes_codes(projection: Projection) -> bool:
    base = projection.base
    return isinstance(base, NF4Linear | Fp8Linear | TrainedFp8Linear) and base.takes_codes


def _are_plain(*projections: Projection) -> bool:
    """Whether their adapters' gradients are those of two products: neither DoRA's nor with dropout."""
    return all(type(projection) is Projection and not projection.dropout for projection in projections)
