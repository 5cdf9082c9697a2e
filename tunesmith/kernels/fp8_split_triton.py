"""A product of fp8 with fp8 for some tens of tokens, its sums cut into parts that programs take side by side.

    parts[s, t, n] = sum over the columns of part s of x_code[t, k] w_code[n, k]
    y[t, n] = (parts[0] + parts[1] + ...) * x_scale[t] * w_scale[n] + bias[n]

A weight of few rows has fewer tiles than the chip has processors, and with few tokens nothing else is left to divide:
each tile walks the whole width while most processors idle. The parts are added up in one order, so that bits repeat.
Imported only where Triton is installed.
"""

# Triton's decorator and its kernels' arguments have no types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tunesmith.kernels.jit import jit
from tunesmith.kernels.launch import current
from tunesmith.kernels.quick import quick
from tunesmith.units import ceil_div

# Of a tile: tokens at most, rows of the weight, columns of a step.
TOKENS, ROWS, STEP = 128, 128, 128
_OUT_COLUMNS = 1024
# From so many tokens on two tiles are nearly full; a weight so wide is worth parts then too.
_NEARLY_FULL, _WIDE = 224, 8192


def num_parts(num_tokens: int, num_rows: int, width: int, processors: int) -> int:
    """Parts into which a product's sums are cut: as many as keep its programs running at once; 1: not worth it.

    With more tokens than a tile has cuBLAS is faster, but for wide weights and full tiles. On an H200 144, 192 and 256
    tokens with [3584, 18944] took 84, 67 and 39 us by parts, 48 by cuBLAS; with [3584, 3584] 24, 19 and 14, and 13.
    """
    if num_tokens > TOKENS and (num_tokens < _NEARLY_FULL or width < _WIDE):
        return 1
    programs = ceil_div(num_rows, ROWS) * ceil_div(num_tokens, TOKENS)
    if width % STEP or not programs:
        return 1
    return max(1, min(processors // programs, width // (4 * STEP)))


@torch.library.custom_op("tunesmith::fp8_split_product", mutates_args=())
def split_product_operator(
    x_codes: Tensor, x_scale: Tensor, w_codes: Tensor, w_scale: Tensor, bias: Tensor | None, parts: int
) -> Tensor:
    """y bfloat16 [T, N] of codes [T, K] and [N, K], scales float32 [T, 1] and [N]; contiguous, K a multiple of STEP."""
    (num_tokens, width), num_rows = x_codes.shape, w_codes.shape[0]
    sums = torch.empty(parts, num_tokens, num_rows, device=x_codes.device, dtype=torch.float32)
    y = torch.empty(num_tokens, num_rows, device=x_codes.device, dtype=torch.bfloat16)
    tokens = min(TOKENS, max(16, triton.next_power_of_2(num_tokens)))
    with current(x_codes.device):
        quick(_part_kernel)[(ceil_div(num_rows, ROWS), ceil_div(num_tokens, tokens), parts)](
            x_codes,
            w_codes,
            sums,
            num_tokens,
            num_rows,
            ceil_div(width // STEP, parts),
            WIDTH=width,
            TOKENS=tokens,
            ROWS=ROWS,
            STEP=STEP,
            num_warps=4,  # 8 took 47 us where 4 took 39
            num_stages=4,
            enable_fp_fusion=True,
        )
        quick(_sum_kernel)[(num_tokens, ceil_div(num_rows, _OUT_COLUMNS))](
            sums,
            x_scale,
            w_scale,
            y if bias is None else bias,
            y,
            num_tokens * num_rows,
            num_rows,
            parts,
            PARTS=triton.next_power_of_2(parts),
            BIAS=bias is not None,
            COLUMNS=_OUT_COLUMNS,
            num_warps=4,
            enable_fp_fusion=True,
        )
    return y


@split_product_operator.register_fake
def _split_product_fake(
    x_codes: Tensor, x_scale: Tensor, w_codes: Tensor, w_scale: Tensor, bias: Tensor | None, parts: int
) -> Tensor:
    return torch.empty(x_codes.shape[0], w_codes.shape[0], device=x_codes.device, dtype=torch.bfloat16)


@jit(do_not_specialize=["num_tokens", "of_part"])
def _part_kernel(
    x,
    w,
    sums,
    num_tokens,
    num_rows,
    of_part,
    WIDTH: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
):
    """The sums of a tile over `of_part` steps of columns. Rows and tokens that are not there are others once more.

    Nothing is known when compiling that depends on the number of tokens: prompts of every length come while serving.
    """
    part = tl.program_id(2)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    column = tl.arange(0, STEP)
    x_at = x + tl.minimum(token, num_tokens - 1).to(tl.int64)[:, None] * WIDTH + column[None, :]
    w_at = w + tl.minimum(row, num_rows - 1).to(tl.int64)[None, :] * WIDTH + column[:, None]
    acc = tl.zeros([TOKENS, ROWS], tl.float32)
    for step in range(part * of_part, tl.minimum((part + 1) * of_part, WIDTH // STEP)):
        acc = tl.dot(tl.load(x_at + step * STEP), tl.load(w_at + step * STEP), acc)
    at = (part * num_tokens + token).to(tl.int64)[:, None] * num_rows + row[None, :]
    tl.store(sums + at, acc, mask=(token < num_tokens)[:, None] & (row < num_rows)[None, :])


@jit(do_not_specialize=["size", "parts"])
def _sum_kernel(
    sums,
    x_scale,
    w_scale,
    bias,
    y,
    size,
    num_rows,
    parts,
    PARTS: tl.constexpr,
    BIAS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    # PARTS: at least the parts there are, a power of two.
    token = tl.program_id(0)
    row = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = row < num_rows
    at = token.to(tl.int64) * num_rows + row
    total = tl.zeros([COLUMNS], tl.float32)
    for part in tl.static_range(PARTS):
        is_there = inside & (row * 0 + part < parts)
        total += tl.load(sums + part * size.to(tl.int64) + at, mask=is_there, other=0.0)
    total *= tl.load(x_scale + token) * tl.load(w_scale + row, mask=inside, other=0.0)
    if BIAS:
        total += tl.load(bias + row, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + at, total.to(y.dtype.element_ty), mask=inside)
