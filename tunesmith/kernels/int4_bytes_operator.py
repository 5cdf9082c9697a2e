"""The product of kernels/int4_bytes.py as a torch custom operator, and how its programs are cut.

Imported only where Triton is installed.
"""

from __future__ import annotations

import logging
from functools import cache
from typing import Any

import torch
from torch import Tensor

from tunesmith.kernels.gemv_quads_triton import stays_in_threads
from tunesmith.kernels.int4 import Int4Weight, dequantize_int4
from tunesmith.kernels.int4_bytes_triton import bytes_kernel
from tunesmith.kernels.int4_layout import BLOCK
from tunesmith.kernels.launch import current, num_processors, overlaps
from tunesmith.kernels.quick import quick
from tunesmith.kernels.x_bytes import x_of_bytes
from tunesmith.units import ceil_div

ROWS, STEP = 16, 256
# Tiles of a program: beyond, other programs have the same rows.
_MOST_TILES = 4
_WARPS_WANTED = 8
_MOST_WARPS = 8
# Registers of a processor and of a thread: what two steps ahead take, and how few they do with.
_REGISTERS, _TAKEN, _LEAST = 65536, 128, 80
_log = logging.getLogger(__name__)
Shape = tuple[int, int]
"""Of a program: its warps, and the steps that each warp has under way."""


@torch.library.custom_op("tunesmith::int4_bytes", mutates_args=())
def int4_bytes_operator(
    x_bytes: Tensor,
    words: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """x @ weight.T + bias [T, F] in dtype; x int32 [T, D / 128, 72] as x_bytes.py has it, the weight as int4.py."""
    out = torch.empty(x_bytes.shape[0], words.shape[0], dtype=dtype, device=x_bytes.device)
    if not out.numel() or multiply(x_bytes, words, scales, zeros, bias, out):
        return out
    # This version of Triton moves the loop's values between threads: by what was dequantised, both of them.
    held = Int4Weight(words, scales, zeros, (words.shape[0], words.shape[1] * 8), dtype)
    y = torch.nn.functional.linear(x_of_bytes(x_bytes, dtype), dequantize_int4(held))
    return y if bias is None else y + bias.to(dtype)


@int4_bytes_operator.register_fake
def _int4_bytes_fake(
    x_bytes: Tensor,
    words: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    return x_bytes.new_empty(x_bytes.shape[0], words.shape[0], dtype=dtype)


@cache
def shape_of(num_rows: int, width: int, processors: int, tiles: int = 1) -> Shape:
    """A program's shape: warps until every processor has `_WARPS_WANTED`, as long as each has steps of its own.

    Two steps under way where a tile is all that a program has; of several tiles the registers hold one. Where one warp
    is enough so many of them are there that one step is enough too. Of 7B on an H200, one token, us a product: query,
    key and value 5.0 (8 warps 5.5), gate and up 23.4 (two steps 24.3; bytes 16.7); 8 tokens: 7.4 (10.8).
    """
    programs, steps = ceil_div(num_rows, ROWS), width // STEP
    if programs >= _WARPS_WANTED * processors:
        return 1, 1
    ahead = 2 if tiles == 1 and steps > 1 else 1
    warps = 1
    while warps < _MOST_WARPS and programs * warps < _WARPS_WANTED * processors and warps * ahead < steps:
        warps *= 2
    return warps, ahead


def registers_of(num_rows: int, shape: Shape, processors: int) -> int | None:
    """Registers of a thread with which all programs run at once; None: they do anyway, or they can't."""
    warps, ahead = shape
    at_once = ceil_div(ceil_div(num_rows, ROWS), processors) * warps
    registers = _REGISTERS // (32 * at_once) // 8 * 8
    return registers if ahead > 1 and _LEAST <= registers < _TAKEN else None


def tiles_of(num_tokens: int, parts: int) -> int:
    """Tiles of eight columns of a program: each has 4 / parts tokens."""
    return min(_MOST_TILES, ceil_div(num_tokens * parts, 4))


def multiply(
    x_bytes: Tensor,
    words: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    out: Tensor,
    *,
    shape: Shape | None = None,
) -> bool:
    """Launch the kernel: the product into `out` [T, F].

    shape: a program's (None: by `shape_of`).
    Returns: whether the result is right. Not where a version of Triton moves the loop's values between threads.
    """
    (num_tokens, num_rows), width, device = out.shape, words.shape[1] * 8, out.device
    parts = scales.shape[1] * BLOCK // width
    tiles, processors = tiles_of(num_tokens, parts), num_processors(device)
    shape = shape or shape_of(num_rows, width, processors, tiles)
    options: dict[str, object] = {"launch_pdl": True} if overlaps(device) else {}
    registers = registers_of(num_rows, shape, processors)
    if registers is not None and device.type != "cpu":
        options["maxnreg"] = registers
    with current(device):
        compiled = quick(bytes_kernel)[(ceil_div(num_tokens * parts, 4 * tiles), ceil_div(num_rows, ROWS))](
            x_bytes,
            words,
            scales.view(torch.int32 if parts == 1 else torch.int16),
            out if zeros is None else zeros.view(torch.int16) if parts == 1 else zeros,
            out if bias is None else bias,
            out,
            num_rows,
            num_tokens,
            WIDTH=width,
            PARTS=parts,
            ZEROS=zeros is not None,
            BIAS=bias is not None,
            SCALE_HALF=scales.dtype == torch.float16,
            EVEN_ROWS=num_rows % ROWS == 0,
            TILES=tiles,
            WARPS=shape[0],
            AHEAD=shape[1],
            BY_HAND=device.type != "cpu",  # Triton's interpreter has no assembler
            OVERLAP="launch_pdl" in options,
            num_warps=shape[0],
            num_stages=1,
            enable_fp_fusion=True,
            **options,
        )
    return compiled is None or _stays_in_threads(compiled)


_checked: dict[int, tuple[Any, bool]] = {}


def _stays_in_threads(compiled: Any) -> bool:
    """`stays_in_threads` of a compiled kernel, read once."""
    known = _checked.get(id(compiled))
    if known is None:
        asm = getattr(compiled, "asm", {})
        known = _checked[id(compiled)] = compiled, "ttgir" not in asm or stays_in_threads(asm["ttgir"])
        if not known[1]:
            _log.warning("products of int4 by bytes are off: this Triton moves values between threads")
    return known[1]
