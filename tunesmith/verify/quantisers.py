"""What is stored in few bits against its definition: NF4 weights, and the update of AdamW with 8-bit moments.

Every value must become the code whose value is nearest. Where a value lies on the edge between two codes, either is
right: how much farther the chosen code's value is than the nearest one's is what is measured.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tunesmith.kernels.codebooks import dynamic_values, nf4_values
from tunesmith.kernels.nf4 import BLOCK, SCALE_BLOCK, quantize_nf4
from tunesmith.kernels.nf4_weight import NF4Weight
from tunesmith.recipe.schema import MethodSection, TrainSection
from tunesmith.train.adam8bit import SMALLEST_QUANTISED, AdamW8bit
from tunesmith.verify.check import Outcome
from tunesmith.verify.kernels import Shapes

# As parts of a block's largest value. bitsandbytes looks scales up in a grid of 2^16 points on a CPU.
CODE_LIMIT, SCALE_LIMIT = 1e-6, 4e-5
# As a part of the learning rate.
UPDATE_LIMIT = 1e-4
MOST_ROWS = 64
# The moments' block, as the format has it. Source: arXiv 2110.02861, section 2, with blocks of 256.
MOMENT_BLOCK = 256
STEPS = 3


def nf4_quantiser(shapes: Shapes, method: MethodSection, device: torch.device, dtype: torch.dtype) -> Outcome:
    """Codes and scales of a random weight against the nearest ones, as multiples of what rounding explains."""
    rows, columns = min(shapes.config.hidden_size, MOST_ROWS), shapes.config.hidden_size
    generator = torch.Generator(device).manual_seed(0)
    weight = (torch.randn(rows, columns, generator=generator, device=device) * 0.02).to(dtype)
    weight[0, : 2 * BLOCK] = 0  # blocks without any scale
    plain = quantize_nf4(weight, False)
    blocks = _blocks(weight.float().view(-1), BLOCK)
    largest = blocks.abs().amax(1)
    codes = _blocks(_unpacked(plain), BLOCK)
    found = [_relative(plain.scales, largest) / CODE_LIMIT]
    found.append(_too_far(blocks, largest, codes, nf4_values(device)) / CODE_LIMIT)
    if method.double_quantisation:
        found.append(_scales_too_far(quantize_nf4(weight, True), plain) / SCALE_LIMIT)
    kind = "doubly quantised" if method.double_quantisation else "plain"
    detail = f"distance beyond the nearest code, as a multiple of what rounding explains, {rows} x {columns}, {kind}"
    return Outcome(_worst(found), 1.0, detail)


def adamw8bit_update(train: TrainSection, device: torch.device) -> Outcome:
    """Three updates against torch's AdamW, started each time from the moments that are stored in 8 bits.

    Compared are the new weights and, with the nearest ones, the codes that the new moments are stored in.
    """
    count = SMALLEST_QUANTISED + 3 * MOMENT_BLOCK + 17  # the last block is short
    generator = torch.Generator(device).manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(count, generator=generator, device=device) * 0.02)
    betas, rate = (train.beta1, train.beta2), 1e-3
    ours = AdamW8bit([weight], rate, betas, train.eps, train.weight_decay)
    found = []
    for step in range(STEPS):
        gradient = torch.randn(count, generator=generator, device=device) * 1e-3
        theirs = torch.nn.Parameter(weight.detach().clone())
        reference = torch.optim.AdamW([theirs], rate, betas, train.eps, train.weight_decay, foreach=False)
        if step:
            reference.state[theirs] = {"step": torch.tensor(float(step)), **_moments(ours.state[weight], device)}
        weight.grad, theirs.grad = gradient.clone(), gradient.clone()
        ours.step()
        reference.step()
        found.append(float((weight - theirs).detach().abs().max()) / rate / UPDATE_LIMIT)
        found.append(_codes_too_far(ours.state[weight], reference.state[theirs], device) / CODE_LIMIT)
    detail = f"{STEPS} updates of {count} weights against torch's, as a multiple of what rounding explains"
    return Outcome(_worst(found), 1.0, detail)


def _moments(state: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """The moments that the codes stand for: value[code] * largest of the block."""
    found = {}
    for name in ("exp_avg", "exp_avg_sq"):
        values = dynamic_values(device, name == "exp_avg")[state[f"{name}_codes"].long()]
        scaled = _blocks(values, MOMENT_BLOCK) * state[f"{name}_absmax"][:, None]
        found[name] = scaled.view(-1)[: values.numel()].clone()
    return found


def _codes_too_far(state: dict[str, Tensor], moments: dict[str, Tensor], device: torch.device) -> float:
    """How much farther than the nearest the stored codes are; a second moment's may not be zero, which ends steps."""
    found = []
    for name in ("exp_avg", "exp_avg_sq"):
        book = dynamic_values(device, name == "exp_avg")
        blocks = _blocks(moments[name], MOMENT_BLOCK)
        codes = _blocks(state[f"{name}_codes"], MOMENT_BLOCK)
        largest = blocks.abs().amax(1)
        found.append(_relative(state[f"{name}_absmax"], largest))
        if name == "exp_avg_sq":
            raised = (codes == 1) & (blocks > 0)
            found.append(float(((codes == 0) & (blocks > 0)).any()))
            blocks = torch.where(raised, torch.maximum(blocks, book[1] * largest[:, None]), blocks)
        found.append(_too_far(blocks, largest, codes, book))
    return _worst(found)


def _scales_too_far(double: NF4Weight, plain: NF4Weight) -> float:
    assert double.scale_scales is not None and double.offset is not None
    blocks = _blocks(plain.scales - plain.scales.mean(), SCALE_BLOCK)
    largest = blocks.abs().amax(1)
    codes = _blocks(double.scales, SCALE_BLOCK)
    offset = _relative(double.offset, plain.scales.mean())
    inner = _relative(double.scale_scales, largest)
    return _worst([offset, inner, _too_far(blocks, largest, codes, dynamic_values(codes.device))])


def _too_far(blocks: Tensor, largest: Tensor, codes: Tensor, book: Tensor) -> float:
    """The largest of |x - chosen| - |x - nearest| over values divided by their block's largest, in float64."""
    scaled = blocks.double() / largest.double().clamp(min=1e-300)[:, None]
    chosen = (scaled - book.double()[codes.long()]).abs()
    nearest = torch.stack([(scaled - value).abs() for value in book.double()]).amin(0)
    # A block of zeros is zero whatever its codes.
    return float(((chosen - nearest) * (largest > 0)[:, None]).max())


def _relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=torch.finfo(torch.float32).tiny))


def _worst(found: list[float]) -> float:
    """The largest; NaN where any is."""
    return float(torch.tensor(found).max())


def _unpacked(weight: NF4Weight) -> Tensor:
    """One code a weight: two to a byte, the first in the high half."""
    bytes_ = weight.codes.view(-1)
    count = weight.shape[0] * weight.shape[1]
    return torch.stack((bytes_ >> 4, bytes_ & 15), dim=1).view(-1)[:count]


def _blocks(values: Tensor, size: int) -> Tensor:
    """Blocks in rows, the last one filled up with its own last value."""
    missing = -values.numel() % size
    padded = F.pad(values[None].float(), (0, missing), mode="replicate")[0]
    return padded.to(values.dtype).view(-1, size)
