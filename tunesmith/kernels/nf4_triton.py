"""The Triton kernel that dequantises NF4, as a torch custom operator. Imported only where Triton is installed."""

# Triton's decorator and its kernels' arguments have no types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
import triton.language as tl
from torch import Tensor

from tunesmith.kernels.codebooks import dynamic_values, nf4_values
from tunesmith.kernels.jit import jit
from tunesmith.kernels.nf4_weight import BLOCK, SCALE_BLOCK, NF4Weight
from tunesmith.units import ceil_div

# Blocks of one program: 2^12 weights, 32 a thread (of six shapes of a program the fastest on an H200: 3.4 TB/s for the
# gate and up of a 7B, where the bytes would take 4.2).
BLOCKS = 64
WARPS = 4
# Weights that one launch dequantises: query, key and value, or gate and up.
TOGETHER = 3
_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def dequantize_parts(parts: Sequence[NF4Weight], dtype: torch.dtype) -> Tensor:
    """The weights of one width in `dtype`, their rows below each other: one operator, a launch for every three."""
    if len({part.is_double for part in parts}) > 1:
        raise ValueError("weights whose scales are quantised and weights whose scales are not can't be taken together")
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
    in_words = all(_is_in_words(part, count * columns) for part, count in zip(codes, rows, strict=True))
    codes = [part.view(torch.int32) for part in codes] if in_words else codes
    parts = [*zip(codes, scales, scale_scales, offsets, out.split(list(rows)), strict=True)]
    with _current(out.device):
        for first in range(0, len(parts), TOGETHER):
            some = parts[first : first + TOGETHER]
            counts = [part_out.numel() for *_, part_out in some]
            programs = [ceil_div(count, BLOCKS * BLOCK) for count in counts]
            missing = TOGETHER - len(some)  # those get no program, and any pointers
            _dequantize_kernel[(sum(programs),)](
                *(tensor for part in [*some, *[some[0]] * missing] for tensor in part),
                *counts,
                *[counts[0]] * missing,
                programs[0],
                sum(programs[:2]),
                table,
                dynamic,
                WORDS=in_words,
                DOUBLE=some[0][2].numel() > 0,
                THROUGH=_TYPES[through],
                BLOCK=BLOCK,
                SCALE_BLOCK=SCALE_BLOCK,
                BLOCKS=BLOCKS,
                num_warps=WARPS,
                enable_fp_fusion=False,  # a scale is rounded twice, after the product and after the sum
            )
    return out


def _is_in_words(codes: Tensor, num_values: int) -> bool:
    """Whether the codes of so many values are whole blocks that can be read four bytes at a time."""
    in_row = codes.shape[-1]
    return num_values % BLOCK == 0 and in_row % 4 == 0 and codes.storage_offset() % 4 == 0


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


@jit
def _dequantize_tile(
    first,
    codes,
    scales,
    scale_scales,
    offset,
    out,
    num_values,
    table,
    dynamic,
    WORDS: tl.constexpr,
    DOUBLE: tl.constexpr,
    THROUGH: tl.constexpr,
    BLOCK: tl.constexpr,
    SCALE_BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    # One row of the tile is one block: [BLOCKS, 32] bytes become [BLOCKS, 64] weights.
    block = first.to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    in_range = block * BLOCK < num_values
    index = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    scale = tl.load(scales + block, mask=in_range, other=0)
    if DOUBLE:
        inner = tl.load(scale_scales + block // SCALE_BLOCK, mask=in_range, other=0.0)
        scale = tl.load(dynamic + scale.to(tl.int32)) * inner + tl.load(offset)
    if WORDS:
        # Eight codes in four bytes: of each byte the high one first.
        word = block[:, None] * (BLOCK // 8) + tl.arange(0, BLOCK // 8)[None, :]
        packed = tl.load(codes + word, mask=in_range[:, None], other=0)
        place = tl.arange(0, 8)
        shift = (place // 2) * 8 + (1 - place % 2) * 4
        code = tl.reshape((packed[:, :, None] >> shift[None, None, :]) & 15, [BLOCKS, BLOCK])
        values = tl.load(table + code) * scale[:, None]
        tl.store(out + index, values.to(THROUGH).to(out.dtype.element_ty), mask=in_range[:, None])
    else:
        byte = block[:, None] * (BLOCK // 2) + tl.arange(0, BLOCK // 2)[None, :]
        packed = tl.load(codes + byte, mask=byte * 2 < num_values, other=0).to(tl.int32)
        high = tl.load(table + (packed >> 4)) * scale[:, None]
        low = tl.load(table + (packed & 15)) * scale[:, None]
        values = tl.reshape(tl.join(high, low), [BLOCKS, BLOCK])
        tl.store(out + index, values.to(THROUGH).to(out.dtype.element_ty), mask=index < num_values)


@jit
def _dequantize_kernel(
    codes0,
    scales0,
    scale_scales0,
    offset0,
    out0,
    codes1,
    scales1,
    scale_scales1,
    offset1,
    out1,
    codes2,
    scales2,
    scale_scales2,
    offset2,
    out2,
    count0,
    count1,
    count2,
    until0,
    until1,
    table,
    dynamic,
    WORDS: tl.constexpr,
    DOUBLE: tl.constexpr,
    THROUGH: tl.constexpr,
    BLOCK: tl.constexpr,
    SCALE_BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
) -> None:
    # Up to three weights, the programs of one after those of the other.
    program = tl.program_id(0)
    if program < until0:
        _dequantize_tile(
            program, codes0, scales0, scale_scales0, offset0, out0, count0, table, dynamic,
            WORDS, DOUBLE, THROUGH, BLOCK, SCALE_BLOCK, BLOCKS,
        )  # fmt: skip
    elif program < until1:
        _dequantize_tile(
            program - until0, codes1, scales1, scale_scales1, offset1, out1, count1, table, dynamic,
            WORDS, DOUBLE, THROUGH, BLOCK, SCALE_BLOCK, BLOCKS,
        )  # fmt: skip
    else:
        _dequantize_tile(
            program - until1, codes2, scales2, scale_scales2, offset2, out2, count2, table, dynamic,
            WORDS, DOUBLE, THROUGH, BLOCK, SCALE_BLOCK, BLOCKS,
        )  # fmt: skip


def approximate_reciprocal(values: Tensor) -> Tensor:
    """1 / values by the chip's own approximation, off by one unit in the last place at most; float32."""
    out = torch.empty_like(values)
    count = values.numel()
    with _current(out.device):
        _reciprocal_kernel[(ceil_div(count, 1024),)](values, out, count, SIZE=1024, enable_fp_fusion=True)
    return out


@jit
def _reciprocal_kernel(values, out, count, SIZE: tl.constexpr) -> None:
    index = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    value = tl.load(values + index, mask=index < count, other=1.0)
    reciprocal = tl.inline_asm_elementwise(
        "rcp.approx.ftz.f32 $0, $1;", "=f,f", [value], dtype=tl.float32, is_pure=True, pack=1
    )
    tl.store(out + index, reciprocal, mask=index < count)
