"""NF4, a 4-bit format for normally distributed weights: 64 weights share a scale, and the scales may be quantised too.

    weight  = value[code] * scale                       code: 4 bits, two to a byte, the first in the high half
    scale   = plain float32, the block's largest magnitude
    or      = dynamic[byte] * scale_of_256 + offset     doubly quantised: one byte each

Blocks run over the flattened weight. Codes and scales are bit for bit those of bitsandbytes on the same device, and
so differ between devices in a few weights of a million: where a weight lies on the edge between two codes.
Source: arXiv 2305.14314, section 3.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from tunesmith.kernels.codebooks import dynamic_values, midpoints, nf4_bounds, nf4_values
from tunesmith.kernels.nf4_weight import BLOCK as BLOCK
from tunesmith.kernels.nf4_weight import SCALE_BLOCK as SCALE_BLOCK
from tunesmith.kernels.nf4_weight import NF4Weight as NF4Weight
from tunesmith.units import ceil_div

# Weights quantised at once: bounds the float32 copies, and is a multiple of the block.
CHUNK = 2**24
_SMALLEST = 1e-38
_log = logging.getLogger(__name__)


def empty_nf4(
    shape: tuple[int, int], dtype: torch.dtype, double: bool, device: torch.device | str | None = None
) -> NF4Weight:
    """An NF4 weight of the right sizes without content (on the meta device: without storage)."""
    num_values = shape[0] * shape[1]
    num_scales = ceil_div(num_values, BLOCK)
    codes = torch.empty(ceil_div(num_values, 2), dtype=torch.uint8, device=device)
    plain = NF4Weight(_in_rows(codes, shape), torch.empty(num_scales, device=device), shape, dtype)
    if not double:
        return plain
    return replace(
        plain,
        scales=torch.empty(num_scales, dtype=torch.uint8, device=device),
        scale_scales=torch.empty(ceil_div(num_scales, SCALE_BLOCK), device=device),
        offset=torch.empty((), device=device),
    )


@torch.no_grad()
def quantize_nf4(weight_FD: Tensor, double: bool = True) -> NF4Weight:
    """The NF4 form of a weight, on its device. Holds at most a chunk in float32 besides the result."""
    num_rows, num_columns = weight_FD.shape
    flat = weight_FD.detach().reshape(-1)
    out = empty_nf4((num_rows, num_columns), weight_FD.dtype, False, weight_FD.device)
    codes = out.codes.view(-1)
    for start in range(0, flat.numel(), CHUNK):
        chunk = flat[start : start + CHUNK]
        packed, scales = _quantize_chunk(chunk)
        codes[start // 2 : start // 2 + packed.numel()] = packed
        out.scales[start // BLOCK : start // BLOCK + scales.numel()] = scales
    return double_quantize(out) if double else out


def double_quantize(weight: NF4Weight) -> NF4Weight:
    """The same weight with its plain scales quantised."""
    offset = weight.scales.mean()
    scales, scale_scales = _quantize_scales(weight.scales - offset)
    return replace(weight, scales=scales, scale_scales=scale_scales, offset=offset)


def plain_scales(weight: NF4Weight) -> Tensor:
    """The float32 scale of every block, whether quantised or not."""
    if weight.scale_scales is None or weight.offset is None:
        return weight.scales
    values = dynamic_values(weight.scales.device).index_select(0, weight.scales.int())
    return _scale_blocks(values, weight.scale_scales, SCALE_BLOCK) + weight.offset


def dequantize_reference(weight: NF4Weight, dtype: torch.dtype | None = None) -> Tensor:
    """The weight [F, D] in `dtype` (None: its own), by plain torch: the truth that the kernel must equal."""
    num_values = weight.shape[0] * weight.shape[1]
    pairs = _pairs(weight.codes.device).index_select(0, weight.codes.view(-1).int())
    values = pairs.view(-1)[:num_values]
    scaled = _scale_blocks(values, plain_scales(weight), BLOCK)
    return scaled.to(weight.dtype).to(dtype or weight.dtype).view(weight.shape)


def dequantize_nf4(weights: NF4Weight | Sequence[NF4Weight], dtype: torch.dtype | None = None) -> Tensor:
    """The weight [F, D] in `dtype` (None: its own); of several weights of one width, their rows below each other."""
    parts = [weights] if isinstance(weights, NF4Weight) else list(weights)
    first = parts[0]
    if not use_kernel(first.codes.device):
        rows = [dequantize_reference(part, dtype) for part in parts]
        return rows[0] if len(rows) == 1 else torch.cat(rows)
    from tunesmith.kernels.nf4_triton import dequantize_parts

    return dequantize_parts(parts, dtype or first.dtype)


_kernel_devices: tuple[str, ...] = ("cuda",)


def use_kernel(device: torch.device) -> bool:
    """Whether the Triton kernel runs on this device."""
    return device.type in _kernel_devices and _has_triton()


@contextmanager
def kernels_on(device_type: str) -> Iterator[None]:
    """On this kind of device too everything goes the kernels' way, for whoever wants to know which are launched."""
    global _kernel_devices
    before, _kernel_devices = _kernel_devices, (*_kernel_devices, device_type)
    try:
        yield
    finally:
        _kernel_devices = before


@cache
def _has_triton() -> bool:
    """Whether Triton is installed; its absence is said once."""
    try:
        import triton  # noqa: F401
    except ImportError:
        _log.warning(
            "triton is not installed: plain torch stands in for the kernels, which is slower and takes more memory; "
            "install it with: pip install 'tunesmith[gpu]'"
        )
        return False
    return True


@cache
def _pairs(device: torch.device) -> Tensor:
    """What a byte stands for, the high half first: float32 [256, 2]."""
    byte = torch.arange(256, device=device)
    return nf4_values(device)[torch.stack((byte >> 4, byte & 15), dim=1)]


def _in_rows(codes: Tensor, shape: tuple[int, int]) -> Tensor:
    return codes if shape[1] % 2 else codes.view(shape[0], shape[1] // 2)


def _quantize_chunk(values: Tensor) -> tuple[Tensor, Tensor]:
    """Packed codes and scales of some whole blocks; the last may be short."""
    codes, scales = _codes_on_cpu(values) if values.is_cpu else _codes_on_cuda(values)
    if codes.numel() % 2:
        # The idle half of the last byte holds the code of zero.
        codes = torch.cat((codes, codes.new_full((1,), 7)))
    return (codes[::2] << 4) | codes[1::2], scales


def _codes_on_cpu(values: Tensor) -> tuple[Tensor, Tensor]:
    """A short last block is divided by its scale, the others are multiplied by the reciprocal, as bitsandbytes does."""
    num_whole = values.numel() // BLOCK * BLOCK
    blocks = values[:num_whole].view(-1, BLOCK).float()
    scales = blocks.abs().amax(dim=1)
    codes = _nearest_code((blocks * (1.0 / scales.clamp(min=_SMALLEST))[:, None]).view(-1))
    if num_whole == values.numel():
        return codes, scales
    tail = values[num_whole:].float()
    scale = tail.abs().max().clamp(min=_SMALLEST)
    return torch.cat((codes, _nearest_code(tail / scale))), torch.cat((scales, scale[None]))


def _codes_on_cuda(values: Tensor) -> tuple[Tensor, Tensor]:
    """bitsandbytes' CUDA kernel takes a scale below float32's normal range as zero; a block of zeros has code 0."""
    blocks = F.pad(values, (0, -values.numel() % BLOCK)).view(-1, BLOCK).float()
    scales = _without_subnormals(blocks.abs().amax(dim=1))
    codes = _nearest_code(blocks * _reciprocal(scales)[:, None])
    codes[scales == 0] = 0
    # Two to a byte: where their number is odd, what pads the block fills the last byte.
    return codes.view(-1)[: values.numel() + values.numel() % 2], scales


def _nearest_code(normalised: Tensor) -> Tensor:
    """The code whose value is nearest, the lower of two equally near: uint8. Overwrites its argument."""
    bounds = nf4_bounds(normalised.device)
    return torch.bucketize(normalised.clamp_(-1, 1), bounds, out_int32=True).to(torch.uint8)


def _quantize_scales(centred: Tensor) -> tuple[Tensor, Tensor]:
    """The dynamic 8-bit codes of the scales less their mean, and the scale of every 256 of them."""
    num_scales = centred.numel()
    blocks = F.pad(centred, (0, -num_scales % SCALE_BLOCK)).view(-1, SCALE_BLOCK)
    largest = blocks.abs().amax(dim=1)
    if not centred.is_cpu:
        largest = _without_subnormals(largest)
    codes = _nearest_dynamic(blocks * _reciprocal(largest)[:, None])
    codes[largest == 0] = 0
    return codes.view(-1)[:num_scales].clone(), largest  # not a view that would hold the padding


def _nearest_dynamic(normalised: Tensor) -> Tensor:
    """The dynamic code of values in [-1, 1]: uint8.

    The nearest, of two equally near the even one; on a CPU bitsandbytes looks the value up in a grid of 2^16 points.
    """
    bounds = midpoints(dynamic_values(normalised.device))
    if not normalised.is_cpu:
        lower = torch.bucketize(normalised, bounds, out_int32=True)
        upper = torch.bucketize(normalised, bounds, out_int32=True, right=True)
        return torch.where(lower % 2 == 0, lower, upper).to(torch.uint8)
    last = 2**16 - 1
    index = ((normalised.nan_to_num().clamp(-1, 1) + 1.0) * 0.5 * last + 0.5).to(torch.int32)
    return torch.bucketize(index * (2.0 / last) - 1.0, bounds, out_int32=True).to(torch.uint8)


def _without_subnormals(scales: Tensor) -> Tensor:
    return torch.where(scales < torch.finfo(torch.float32).tiny, 0.0, scales)


def _reciprocal(scales: Tensor) -> Tensor:
    """1 / scales, as bitsandbytes computes it on this device: its CUDA kernel takes the chip's approximation."""
    if not use_kernel(scales.device):
        return 1.0 / scales
    from tunesmith.kernels.nf4_triton import approximate_reciprocal

    return approximate_reciprocal(scales)


def _scale_blocks(values: Tensor, scales: Tensor, block: int) -> Tensor:
    """values * their block's scale; the last block may be short."""
    num_whole = values.numel() // block
    scaled = values[: num_whole * block].view(-1, block) * scales[:num_whole, None]
    if num_whole * block == values.numel():
        return scaled.view(-1)
    return torch.cat((scaled.view(-1), values[num_whole * block :] * scales[num_whole:]))
