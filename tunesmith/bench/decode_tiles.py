"""Kernels of decoding's products, with the shapes of programs that benchmarks/decode_linears.py tries."""

from __future__ import annotations

from functools import lru_cache
from typing import cast

from torch import Tensor

from tunesmith.kernels import gemv_dot_triton, gemv_triton
from tunesmith.kernels import gemv_quads_triton as fragments
from tunesmith.kernels import int4_bytes_operator as by_bytes
from tunesmith.kernels.int4_bytes import MOST_TOKENS as BYTES_TOKENS
from tunesmith.kernels.x_bytes import quantize_x_bytes

Rest = tuple[Tensor | None, Tensor | None, Tensor | None]
Tile = tuple[int, ...]


@lru_cache(maxsize=1)
def in_bytes(x: Tensor) -> Tensor:
    """The input as products by bytes take it, made once."""
    return quantize_x_bytes(x)


def tiles(format_id: int, rows: int, width: int, tokens: int, processors: int) -> list[tuple[str, tuple[int, ...]]]:
    """Kernels of ours and their tiles; of each kernel the one that it takes now comes first."""
    found: list[tuple[str, tuple[int, ...]]] = []
    if tokens <= fragments.MOST_TOKENS[format_id] and width % fragments.COLUMNS[format_id] == 0:
        now = fragments.shape_of(format_id, rows, width, processors, tokens)
        found += [("fragments", tile) for tile in dict.fromkeys((now, *near(now, format_id)))]
    if format_id == 0:
        return found
    if format_id == 3 and tokens <= BYTES_TOKENS[128] and width % by_bytes.STEP == 0:
        mine = by_bytes.shape_of(rows, width, processors, by_bytes.tiles_of(tokens, 1))
        others = [(warps, ahead) for ahead in (1, 2) for warps in (1, 2, 4, 8, 16)]
        found += [("bytes", shape) for shape in dict.fromkeys((mine, *others))]
    if tokens == 1:
        found += [("one", gemv_triton.SHAPES[format_id])]
    elif tokens <= 64:
        found += [("dot", gemv_dot_triton.SHAPES[format_id])]
    return found


def near(now: fragments.Shape, format_id: int) -> list[fragments.Shape]:
    """Shapes around one: other warps, rows, and steps under way, as far as registers go."""
    rows, warps, ahead = now
    fewer, more = max(2, warps // 2), min(16, 2 * warps)
    wanted = [(rows, warps, 3 - min(ahead, 2)), (rows, fewer, 2), (rows, fewer, 4), (rows, warps, 4), (8, warps, 2)]
    wanted += [(8, more, 2), (8, warps, 4), (16, more, 1), (16, fewer, 1), (32, warps, 1)]
    most = 32 if format_id == 3 else 64  # rows times steps whose words a thread holds
    return [shape for shape in wanted if shape[0] * shape[2] <= most]


def run_fragments(format_id: int, rest: Rest, tile: Tile, x: Tensor, codes: Tensor, out: Tensor) -> Tensor:
    """Raises: RuntimeError where its result is not to be trusted."""
    if not fragments.quads(format_id, x, codes, *rest, out, shape=cast(fragments.Shape, tile)):
        raise RuntimeError("this Triton moves the loop's values between threads")
    return out


def run_bytes(format_id: int, rest: Rest, tile: Tile, x: Tensor, codes: Tensor, out: Tensor) -> Tensor:
    """int4 by the integer units, of an input that is in bytes already. Raises: as `run_fragments`."""
    scales, shape = cast(Tensor, rest[0]), cast(by_bytes.Shape, tile)
    if not by_bytes.multiply(in_bytes(x), codes, scales, *rest[1:], out, shape=shape):
        raise RuntimeError("this Triton moves the loop's values between threads")
    return out


def run_one(format_id: int, rest: Rest, tile: Tile, x: Tensor, codes: Tensor, out: Tensor) -> Tensor:
    """The kernel that gives each lane all rows."""
    shape, has_zeros = cast(tuple[int, int], tile), rest[1] is not None
    gemv_triton.gemv(format_id, x[0], codes, *rest, out[0], shape=shape, has_zeros=has_zeros)
    return out


def run_dot(format_id: int, rest: Rest, tile: Tile, x: Tensor, codes: Tensor, out: Tensor) -> Tensor:
    """The kernel that widens tiles for the tensor cores."""
    gemv_dot_triton.dot(format_id, x, codes, *rest, out, shape=cast(tuple[int, int, int, int], tile))
    return out


RUNS = {"fragments": run_fragments, "bytes": run_bytes, "one": run_one, "dot": run_dot}
