"""The Triton kernel that dequantises NF4, as a torch custom operator. Imported only where Triton is installed."""

# Triton's decorator and its kernels' arguments have no types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

from tunesmith.kernels.codebooks import dynamic_values, nf4_values
from tunesmith.kernels.nf4_weight import BLOCK, SCALE_BLOCK, NF4Weight
from tunesmith.units import ceil_div

# Blocks of one program: 2^10 weights.
BLOCKS = 16
_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def dequantize_parts(parts: Sequence[NF4Weight], dtype: torch.dtype) -> Tensor:
    """The weights of one width in `dtype`, their rows below each other: one operator, a launch for each."""
    empty = parts[0].scales.new_empty(0, dtype=torch.float32)
    return dequantize_operator(
        [part.codes for part in parts],
        [part.scales for part in parts],
        [empty if part.scale_scales is None else part.scale_scales for part in parts],
        [empty if part.offset is None else part.offset for part in parts],
        [part.shape[0] for part in parts],
        parts[0].shape[1],
        parts[0].dtype,
        dtype,
    )


def _current(device: torch.device) -> AbstractContextManager[object]:
    """Triton launches on the current GPU, wherever the tensors are; its interpreter takes tensors of the CPU."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


@torch.library.custom_op("tunesmith::nf4_dequantize", mutates_args=())
def dequantize_operator(
    codes: Sequence[Tensor],
    scales: Sequence[Tensor],
    scale_scales: Sequence[Tensor],
    offsets: Sequence[Tensor],
    rows: Sequence[int],
    columns: int,
    through: torch.dtype,
    dtype: torch.dtype,
) -> Tensor:
    """Dequantised rows [sum(rows), columns] in `dtype`, rounded to `through` before. Empty `scale_scales`: plain."""
    out = torch.empty(sum(rows), columns, dtype=dtype, device=codes[0].device)
    table, dynamic = nf4_values(out.device), dynamic_values(out.device)
    with _current(out.device):
        for part, part_out in enumerate(out.split(list(rows))):
            num_values = part_out.numel()
            grid = (ceil_div(num_values, BLOCKS * BLOCK),)
            _dequantize_kernel[grid](
                codes[part],
                scales[part],
                scale_scales[part],
                offsets[part],
                table,
                dynamic,
                part_out,
                num_values,
                DOUBLE=scale_scales[part].numel() > 0,
                THROUGH=_TYPES[through],
                BLOCK=BLOCK,
                SCALE_BLOCK=SCALE_BLOCK,
                BLOCKS=BLOCKS,
                enable_fp_fusion=False,  # a scale is rounded twice, after the product and after the sum
            )
    return out


@dequantize_operator.register_fake
def _dequantize_fake(
    codes: Sequence[Tensor],
    scales: Sequence[Tensor],
    scale_scales: Sequence[Tensor],
    offsets: Sequence[Tensor],
    rows: Sequence[int],
    columns: int,
    through: torch.dtype,
    dtype: torch.dtype,
) -> Tensor:
    return codes[0].new_empty(sum(rows), columns, dtype=dtype)


@triton.jit
def _dequantize_kernel(
    codes,
    scales,
    scale_scales,
    offset,
    table,
    dynamic,
    out,
    num_values,
    DOUBLE: tl.constexpr,
    THROUGH: tl.constexpr,
    BLOCK: tl.constexpr,
    SCALE_BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
) -> None:
    # One row of the tile is one block: [BLOCKS, 32] bytes become [BLOCKS, 64] weights.
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    in_range = block * BLOCK < num_values
    scale = tl.load(scales + block, mask=in_range, other=0)
    if DOUBLE:
        inner = tl.load(scale_scales + block // SCALE_BLOCK, mask=in_range, other=0.0)
        scale = tl.load(dynamic + scale.to(tl.int32)) * inner + tl.load(offset)
    byte = block[:, None] * (BLOCK // 2) + tl.arange(0, BLOCK // 2)[None, :]
    packed = tl.load(codes + byte, mask=byte * 2 < num_values, other=0).to(tl.int32)
    high = tl.load(table + (packed >> 4)) * scale[:, None]
    low = tl.load(table + (packed & 15)) * scale[:, None]
    values = tl.reshape(tl.join(high, low), [BLOCKS, BLOCK])
    index = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    tl.store(out + index, values.to(THROUGH).to(out.dtype.element_ty), mask=index < num_values)


def approximate_reciprocal(values: Tensor) -> Tensor:
    """1 / values by the chip's own approximation, off by one unit in the last place at most; float32."""
    out = torch.empty_like(values)
    count = values.numel()
    with _current(out.device):
        _reciprocal_kernel[(ceil_div(count, 1024),)](values, out, count, SIZE=1024)
    return out


@triton.jit
def _reciprocal_kernel(values, out, count, SIZE: tl.constexpr) -> None:
    index = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    value = tl.load(values + index, mask=index < count, other=1.0)
    reciprocal = tl.inline_asm_elementwise(
        "rcp.approx.ftz.f32 $0, $1;", "=f,f", [value], dtype=tl.float32, is_pure=True, pack=1
    )
    tl.store(out + index, reciprocal, mask=index < count)
