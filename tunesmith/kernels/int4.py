"""int4 weights with a scale (and a zero point) for each group of columns of a row: packing, quantising, dequantising.

    w[f, k] = (code[f, k] - zero[f, k // G]) * scale[f, k // G]      code in 0 .. 15, G = 128, 64 or 32
    symmetric: zero is 8 everywhere and not held

Words. Eight codes are in one int32, whose nibbles are planes, so that a kernel unpacks a tile of words into eight
tiles of the same shape and needs no shuffles: in each block of 128 columns, 16 words,

    nibble j (bits 4j .. 4j + 3) of word i      column 16 j + i      i = 0 .. 15, j = 0 .. 7

A row's words are contiguous (16-byte loads hold 32 codes), a plane's columns are a run of 16 in the input, and a plane
lies within one group for every G. Rows are padded to whole blocks with codes and scales of zero.

Rounding to the nearest code leaves one choice, the range: `quantize_int4` tries smaller ranges than the group's own and
keeps, group by group, the one with the least squared error.
Source of the search: arXiv 2306.00978 (AWQ), section 3.2 (weight clipping); by squared error of the weights here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tunesmith.kernels.int4_layout import BLOCK
from tunesmith.kernels.nf4 import use_kernel

WORDS = 16
GROUPS = (128, 64, 32)
LARGEST = 15
SYMMETRIC_ZERO = 8
# Shares of a group's own range that are tried.
CLIPS = (1.0, 0.92, 0.84, 0.76)
# Values searched at once: bounds the float32 copies.
CHUNK = 2**23
_SMALLEST = 1e-7


@dataclass(frozen=True)
class Int4Weight:
    """A weight [F, D] in int4.

    words: int32 [F, ceil(D / 128) * 16]; scales: [F, ceil(D / 128) * 128 / G], bfloat16 or float16;
    zeros: uint8 like scales, or None (symmetric). dtype: what the weight was.
    order: the column that each held column is of, int64 [D]; None: as they are. Products and what is dequantised here
    know nothing of it: the linear that holds the weight does.
    """

    words: Tensor
    scales: Tensor
    zeros: Tensor | None
    shape: tuple[int, int]
    dtype: torch.dtype
    order: Tensor | None = None

    @property
    def group_size(self) -> int:
        """Columns that share a scale."""
        return self.words.shape[1] * 8 // self.scales.shape[1]

    @property
    def num_bytes(self) -> int:
        """Bytes held, scales and zero points included."""
        return self.words.nbytes + self.scales.nbytes + (0 if self.zeros is None else self.zeros.nbytes)


def padded_width(width: int) -> int:
    """Columns of whole blocks that hold `width`."""
    return -(-width // BLOCK) * BLOCK


def empty_int4(
    shape: tuple[int, int],
    dtype: torch.dtype,
    group_size: int,
    symmetric: bool,
    *,
    scale_dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str | None = None,
) -> Int4Weight:
    """An int4 weight of the right sizes, all zero (on the meta device: without storage)."""
    width = padded_width(shape[1])
    words = torch.zeros(shape[0], width // 8, dtype=torch.int32, device=device)
    scales = torch.zeros(shape[0], width // group_size, dtype=scale_dtype, device=device)
    zeros = None if symmetric else torch.zeros(scales.shape, dtype=torch.uint8, device=device)
    return Int4Weight(words, scales, zeros, shape, dtype)


def pack_words(codes_FD: Tensor) -> Tensor:
    """Words [F, ceil(D / 128) * 16] of codes 0 .. 15 (any integer dtype)."""
    rows, width = codes_FD.shape
    padded = F.pad(codes_FD, (0, padded_width(width) - width))
    planes = padded.view(rows, -1, 8, WORDS)
    words = torch.zeros(rows, planes.shape[1], WORDS, dtype=torch.int32, device=codes_FD.device)
    for plane in range(8):
        words |= planes[:, :, plane].to(torch.int32) << (4 * plane)
    return words.view(rows, -1)


def unpack_words(words: Tensor, width: int) -> Tensor:
    """Codes uint8 [F, D] of words."""
    rows = words.shape[0]
    blocks = words.view(rows, -1, WORDS)
    codes = torch.empty(rows, blocks.shape[1], 8, WORDS, dtype=torch.uint8, device=words.device)
    for plane in range(8):
        codes[:, :, plane] = (blocks >> (4 * plane)).bitwise_and_(15)
    return codes.view(rows, -1)[:, :width]


@torch.no_grad()
def quantize_int4(
    weight_FD: Tensor, group_size: int = 128, symmetric: bool = False, *, clips: Sequence[float] = CLIPS
) -> Int4Weight:
    """The int4 form of a weight on its device: of every group, the range among `clips` of its own with least error."""
    check_group(group_size)
    rows, width = weight_FD.shape
    out = empty_int4((rows, width), weight_FD.dtype, group_size, symmetric, device=weight_FD.device)
    step = max(1, CHUNK // max(1, width))
    for start in range(0, rows, step):
        part = slice(start, start + step)
        wide = F.pad(weight_FD[part].detach().float(), (0, padded_width(width) - width))
        groups = wide.view(wide.shape[0], -1, group_size)
        scales, zeros = best_range(groups, symmetric, clips)
        codes = to_codes(groups, scales, zeros)
        out.words[part] = pack_words(codes.view(wide.shape))
        out.scales[part] = scales[..., 0].to(out.scales.dtype)
        if out.zeros is not None:
            out.zeros[part] = zeros[..., 0].to(torch.uint8)
    return out


def best_range(
    groups: Tensor, symmetric: bool, clips: Sequence[float], importance: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Scale (as bfloat16 has it) and zero point, float32 [..., 1], of groups [..., G].

    importance: [..., G] or what broadcasts to it, a weight of each column's squared error.
    """
    best: tuple[Tensor, Tensor] | None = None
    least = groups.new_zeros(())
    for clip in clips:
        scales, zeros = group_range(groups, symmetric, clip)
        if len(clips) == 1:
            return scales, zeros
        wrong = (to_codes(groups, scales, zeros).sub_(zeros).mul_(scales).sub_(groups)).square_()
        error = (wrong if importance is None else wrong * importance).sum(-1, keepdim=True)
        if best is None:
            best, least = (scales, zeros), error
            continue
        better = error < least
        least = torch.where(better, error, least)
        best = torch.where(better, scales, best[0]), torch.where(better, zeros, best[1])
    assert best is not None
    return best


def group_range(groups: Tensor, symmetric: bool, clip: float = 1.0) -> tuple[Tensor, Tensor]:
    """Scale and zero point of a share of each group's range; zero is always in it, and exact."""
    if symmetric:
        largest = groups.abs().amax(-1, keepdim=True) * clip
        scales = _stored(largest / 7.5)
        return scales, torch.full_like(scales, SYMMETRIC_ZERO)
    high = groups.amax(-1, keepdim=True).clamp(min=0) * clip
    low = groups.amin(-1, keepdim=True).clamp(max=0) * clip
    scales = _stored((high - low) / LARGEST)
    return scales, (-low / scales).round_().clamp_(0, LARGEST)


def to_codes(groups: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    """Codes, as float32, of values in groups."""
    return (groups * (1.0 / scales)).add_(zeros).round_().clamp_(0, LARGEST)


def dequantize_int4(weight: Int4Weight, dtype: torch.dtype | None = None) -> Tensor:
    """The weight [F, D] in `dtype` (None: its own): (code - zero) * scale in float32, rounded once."""
    if use_kernel(weight.words.device):
        from tunesmith.kernels.int4_triton import int4_dequantize_operator

        return int4_dequantize_operator(
            weight.words, weight.scales, weight.zeros, weight.shape[1], dtype or weight.dtype
        )
    return dequantize_reference(weight, dtype)


def dequantize_reference(weight: Int4Weight, dtype: torch.dtype | None = None) -> Tensor:
    """`dequantize_int4` by plain torch: the truth that the kernel must equal."""
    rows, width = weight.shape
    out = torch.empty(rows, width, dtype=dtype or weight.dtype, device=weight.words.device)
    step = max(1, CHUNK // max(1, width))
    for start in range(0, rows, step):
        part = slice(start, start + step)
        codes = unpack_words(weight.words[part], padded_width(width)).float()
        groups = codes.view(codes.shape[0], -1, weight.group_size)
        groups -= SYMMETRIC_ZERO if weight.zeros is None else weight.zeros[part, :, None].float()
        groups *= weight.scales[part, :, None].float()
        out[part] = codes[:, :width]
    return out


def check_group(group_size: int) -> None:
    """Raises: ValueError for a group size that the packing does not have."""
    if group_size not in GROUPS:
        raise ValueError(f"int4 groups have {', '.join(map(str, GROUPS))} columns, got {group_size}")


def _stored(scales: Tensor) -> Tensor:
    """As they are held; never 0."""
    return scales.clamp(min=_SMALLEST).to(torch.bfloat16).float()
