"""One update of AdamW with block-wise 8-bit moments. Sources: arXiv 2110.02861, sections 1.2 and 2; arXiv 1711.05101.

A moment is held as a code of 8 bits for each value and the largest magnitude of each block of 256 (float32).
`update` takes one pass where Triton is installed: dequantise, update in float32, write the weight, quantise.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tunesmith.kernels.adam8bit_moments import BLOCK, AdamSettings, Moments, codebook_on
from tunesmith.kernels.nf4 import use_kernel

# The reference takes a large tensor slice by slice, so that its moments are never dequantised as a whole.
SLICE = BLOCK * 2**16


def quantise_blocks(values: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
    """Codes (uint8, one per value) and the absolute maximum of each block of 256 (float32) of a flat tensor."""
    count = values.numel()
    padded = torch.nn.functional.pad(values, (0, -count % BLOCK)).view(-1, BLOCK)
    absmax = padded.abs().amax(dim=1)
    scaled = padded / absmax.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
    middles = (codebook[1:] + codebook[:-1]) / 2
    codes = torch.bucketize(scaled, middles, out_int32=True).to(torch.uint8)
    return codes.view(-1)[:count], absmax


def dequantise_blocks(codes: Tensor, absmax: Tensor, codebook: Tensor) -> Tensor:
    """The float32 values of `quantise_blocks`."""
    scales = absmax.repeat_interleave(BLOCK)[: codes.numel()]
    return codebook[codes.int()] * scales


def adamw_(parameter: Tensor, grad: Tensor, mean: Tensor, square: Tensor, settings: AdamSettings) -> None:
    """AdamW with moments in float32, in place, for flat tensors. Source: arXiv 1711.05101, algorithm 2."""
    beta1, beta2 = settings.betas
    mean.lerp_(grad, 1 - beta1)
    square.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    mean_correction, square_correction = settings.corrections
    denominator = (square / square_correction).sqrt_().add_(settings.eps)
    update = (mean / mean_correction).div_(denominator)
    wide = parameter.float().mul_(1 - settings.learning_rate * settings.weight_decay)
    parameter.copy_(wide.sub_(update, alpha=settings.learning_rate))


def update(
    parameter: Tensor, grad: Tensor, moments: Moments, settings: AdamSettings, divisor: Tensor, stopped: Tensor
) -> None:
    """Parameter and moments after one update by grad / divisor, in place; as they were where `stopped` is 1.

    Args:
        parameter, grad: flat and contiguous, [N], of any floating dtype.
        divisor, stopped: float32 scalars on their device. The kernel leaves them there; the reference reads `stopped`.
    """
    if not use_kernel(parameter.device):
        update_reference(parameter, grad, moments, settings, divisor, stopped)
        return
    from tunesmith.kernels.adam8bit_triton import update_kernel

    update_kernel(parameter, grad, moments, settings, divisor, stopped)


def update_reference(
    parameter: Tensor, grad: Tensor, moments: Moments, settings: AdamSettings, divisor: Tensor, stopped: Tensor
) -> None:
    """`update` in plain torch."""
    if bool(stopped):
        return
    for part, of_part in moments.slices(SLICE):
        _update_slice(parameter[part], grad[part].float() / divisor, of_part, settings)


def _update_slice(parameter: Tensor, grad: Tensor, moments: Moments, settings: AdamSettings) -> None:
    signed, unsigned = codebook_on(True, parameter.device), codebook_on(False, parameter.device)
    mean = dequantise_blocks(moments.mean_codes, moments.mean_absmax, signed)
    square = dequantise_blocks(moments.square_codes, moments.square_absmax, unsigned)
    adamw_(parameter, grad, mean, square, settings)
    codes, absmax = quantise_blocks(mean, signed)
    moments.mean_codes.copy_(codes)
    moments.mean_absmax.copy_(absmax)
    codes, absmax = quantise_blocks(square, unsigned)
    # Rounded to zero, it would leave eps alone to divide by: a step of thousands of learning rates.
    moments.square_codes.copy_(codes.clamp_(min=1).mul_(square > 0))
    moments.square_absmax.copy_(absmax)
