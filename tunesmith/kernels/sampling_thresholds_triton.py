"""The thresholds of top-k, top-p and min-p without sorting: Triton kernels as one torch custom operator.

A row is cut into chunks, always the same ones, so that a row's threshold does not depend on the batch.

    maxima     of every chunk
    measures   of every chunk, at J distances below the row's maximum: how many logits lie above, and their mass
    candidates the logits above the nearest of these distances that leaves enough, in the row's order
    search     for the exact threshold among the candidates; among the whole row where they are too many

The search halves an interval [low, high] of logits that exist until one is left:

    low ......... middle ......... high      enough at or above the middle?  yes: the least logit not below it is low
              |          |                                                   no: the largest logit below it is high
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
from tunesmith.units import ceil_div

CHUNK = 4096
DISTANCES = 16
"""J: the last one holds every finite logit."""
MOST_CANDIDATES = 4096
_WARPS = 8
LEAST = tl.constexpr(-3.4028234e38)  # the least finite number


@torch.library.custom_op("tunesmith::find_thresholds", mutates_args=())
def thresholds_operator(logits: Tensor, temperatures: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """thresholds [M] float32 of logits [M, V], whose last stride is 1; the others are contiguous [M]."""
    num_rows, vocab_size = logits.shape
    found = torch.empty(num_rows, dtype=torch.float32, device=logits.device)
    if not num_rows:
        return found
    chunks = ceil_div(vocab_size, CHUNK)
    maxima = torch.empty(num_rows, chunks, dtype=torch.float32, device=logits.device)
    counts = torch.empty(num_rows, DISTANCES, chunks, dtype=torch.int32, device=logits.device)
    masses = torch.empty(num_rows, DISTANCES, chunks, dtype=torch.float32, device=logits.device)
    candidates = torch.empty(num_rows, MOST_CANDIDATES, dtype=torch.float32, device=logits.device)
    wide = {"CHUNKS": triton.next_power_of_2(chunks), "CHUNK": CHUNK, "num_warps": _WARPS}
    # All kernels must find the same levels, so that counts and candidates agree.
    wide["enable_fp_fusion"] = False
    wanted = (temperatures, top_k, top_p, min_p.log())
    measured = (maxima, counts, masses)
    with current(logits.device):
        grid, place = (num_rows, chunks), (logits.stride(0), vocab_size, chunks)
        maxima_kernel[grid](logits, maxima, *place, CHUNK=CHUNK, num_warps=_WARPS, enable_fp_fusion=True)
        measure_kernel[grid](logits, temperatures, *measured, *place, DISTANCES=DISTANCES, **wide)
        gather_kernel[grid](
            logits, *wanted, *measured, candidates, *place, DISTANCES=DISTANCES, MOST=MOST_CANDIDATES, **wide
        )
        search_kernel[(num_rows,)](
            logits, *wanted, *measured, candidates, found, *place, DISTANCES=DISTANCES, MOST=MOST_CANDIDATES, **wide
        )
    return found


@thresholds_operator.register_fake
def _thresholds_fake(logits: Tensor, temperatures: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    return temperatures.new_empty(logits.shape[0])


@jit
def _load(logits, row, chunk, stride, vocab_size, CHUNK: tl.constexpr):
    """One chunk's logits in float32; minus infinity behind the row's end, and in place of what is not a number."""
    at = chunk * CHUNK + tl.arange(0, CHUNK)
    value = tl.load(logits + row.to(tl.int64) * stride + at, mask=at < vocab_size, other=float("-inf")).to(tl.float32)
    return tl.where(value == value, value, float("-inf"))


@jit
def _highest(maxima, row, chunks, CHUNKS: tl.constexpr):
    chunk = tl.arange(0, CHUNKS)
    return tl.max(tl.load(maxima + row * chunks + chunk, mask=chunk < chunks, other=float("-inf")), 0)


@jit
def _distance(step):
    """How far below the maximum a measure is taken, in temperatures: dense near it."""
    return 0.08 * (step + 1) * (step + 1) + 0.4 * (step + 1)


@jit
def _level(step, highest, temperature, DISTANCES: tl.constexpr):
    """The logit that a measure counts from; for the last one the least finite number."""
    return tl.where(step == DISTANCES - 1, LEAST, highest - temperature * _distance(step.to(tl.float32)))


@jit
def _choice(counts, masses, row, chunks, highest, temperature, top_k, top_p, log_min_p, CHUNKS: tl.constexpr,
            DISTANCES: tl.constexpr):  # fmt: skip
    """The first measure that holds all that may be kept, how many logits it holds, and the mass of the whole row."""
    step, chunk = tl.arange(0, DISTANCES), tl.arange(0, CHUNKS)
    at = (row * DISTANCES + step[:, None]) * chunks + chunk[None, :]
    held = tl.sum(tl.load(counts + at, mask=chunk[None, :] < chunks, other=0), 1)
    mass = tl.sum(tl.load(masses + at, mask=chunk[None, :] < chunks, other=0.0), 1)
    whole = tl.max(mass, 0)
    level = _level(step, highest, temperature, DISTANCES)
    by_count = (top_k > 0) & (held >= top_k)
    least = highest + temperature * log_min_p
    by_share = level <= least
    by_mass = mass >= tl.where((top_k > 0) | (top_p >= 1) | (least >= LEAST), float("inf"), top_p * whole)
    enough = by_count | by_share | by_mass | (step == DISTANCES - 1)
    chosen = tl.min(tl.where(enough, step, DISTANCES), 0)
    return chosen, tl.sum(tl.where(step == chosen, held, 0), 0), whole


@jit(do_not_specialize=["vocab_size", "chunks"])
def maxima_kernel(logits, maxima, stride, vocab_size, chunks, CHUNK: tl.constexpr) -> None:
    row, chunk = tl.program_id(0), tl.program_id(1)
    tl.store(maxima + row * chunks + chunk, tl.max(_load(logits, row, chunk, stride, vocab_size, CHUNK), 0))


@jit(do_not_specialize=["vocab_size", "chunks"])
def measure_kernel(
    logits,
    temperatures,
    maxima,
    counts,
    masses,
    stride,
    vocab_size,
    chunks,
    DISTANCES: tl.constexpr,
    CHUNKS: tl.constexpr,
    CHUNK: tl.constexpr,
) -> None:
    row, chunk = tl.program_id(0), tl.program_id(1)
    temperature, highest = tl.load(temperatures + row), _highest(maxima, row, chunks, CHUNKS)
    value = _load(logits, row, chunk, stride, vocab_size, CHUNK)
    mass = tl.exp((value - highest) / temperature)
    into = row * DISTANCES * chunks + chunk
    for step in range(DISTANCES):
        level = tl.where(step == DISTANCES - 1, LEAST, highest - temperature * _distance(step * 1.0))
        tl.store(counts + into + step * chunks, tl.sum((value >= level).to(tl.int32), 0))
        tl.store(masses + into + step * chunks, tl.sum(tl.where(value >= level, mass, 0.0), 0))


@jit(do_not_specialize=["vocab_size", "chunks"])
def gather_kernel(
    logits,
    temperatures,
    top_ks,
    top_ps,
    log_min_ps,
    maxima,
    counts,
    masses,
    candidates,
    stride,
    vocab_size,
    chunks,
    DISTANCES: tl.constexpr,
    MOST: tl.constexpr,
    CHUNKS: tl.constexpr,
    CHUNK: tl.constexpr,
) -> None:
    """Put a chunk's candidates behind those of the chunks before it."""
    row, chunk = tl.program_id(0), tl.program_id(1)
    temperature, highest = tl.load(temperatures + row), _highest(maxima, row, chunks, CHUNKS)
    wanted = (tl.load(top_ks + row), tl.load(top_ps + row), tl.load(log_min_ps + row))
    step, num, _whole = _choice(
        counts, masses, row, chunks, highest, temperature, wanted[0], wanted[1], wanted[2], CHUNKS, DISTANCES
    )
    if num <= MOST:
        before = tl.arange(0, CHUNKS)
        held = tl.load(counts + (row * DISTANCES + step) * chunks + before, mask=before < chunk, other=0)
        value = _load(logits, row, chunk, stride, vocab_size, CHUNK)
        is_candidate = value >= _level(step, highest, temperature, DISTANCES)
        place = tl.sum(held, 0) + tl.cumsum(is_candidate.to(tl.int32), 0) - 1
        tl.store(candidates + row * MOST + place, value, mask=is_candidate & (place < MOST))


@jit
def _scan(source, num, low, middle, high, highest, temperature, CHUNK: tl.constexpr):
    """Of the logits from `low` to `high`: the largest below the middle, and the least that is not; how many of the
    whole source are not below the middle, and their mass."""
    below = tl.full((CHUNK,), float("-inf"), tl.float32)
    above = tl.full((CHUNK,), float("inf"), tl.float32)
    count = tl.zeros((CHUNK,), tl.int32)
    mass = tl.zeros((CHUNK,), tl.float32)
    for start in range(0, num, CHUNK):
        at = start + tl.arange(0, CHUNK)
        value = tl.load(source + at, mask=at < num, other=float("-inf")).to(tl.float32)
        value = tl.where(value == value, value, float("-inf"))
        is_above = value >= middle
        count += is_above.to(tl.int32)
        mass += tl.where(is_above, tl.exp((value - highest) / temperature), 0.0)
        inside = (value >= low) & (value <= high)
        below = tl.where(inside & (value < middle), tl.maximum(below, value), below)
        above = tl.where(inside & is_above, tl.minimum(above, value), above)
    return tl.max(below, 0), tl.min(above, 0), tl.sum(count, 0), tl.sum(mass, 0)


@jit
def _search(source, num, low, high, highest, temperature, least_count, least_mass, CHUNK: tl.constexpr):
    """The largest logit from `low` to `high`, which exist, with at least so many, and so much mass, not below it."""
    while low < high:
        middle = low + (high - low) * 0.5
        middle = tl.where(middle > low, middle, high)
        below, above, count, mass = _scan(source, num, low, middle, high, highest, temperature, CHUNK)
        is_enough = (count >= least_count) & (mass >= least_mass)
        low = tl.where(is_enough, above, low)
        high = tl.where(is_enough, high, below)
    return low


@jit
def _exact(source, num, highest, temperature, top_k, top_p, least, whole, CHUNK: tl.constexpr):
    """A row's threshold, found among `num` logits of `source`.

    least: min-p's threshold. whole: the mass of the whole row, of which top-p takes its share where it comes first.
    """
    _below, low, _count, mass = _scan(source, num, LEAST, least, highest, highest, temperature, CHUNK)
    if top_k > 0:
        low = _search(source, num, low, highest, highest, temperature, top_k, 0.0, CHUNK)
    if top_p < 1:
        _below, _above, _count, mass = _scan(source, num, low, low, highest, highest, temperature, CHUNK)
        mass = tl.where((top_k > 0) | (least > LEAST), mass, whole)
        low = _search(source, num, low, highest, highest, temperature, 0, top_p * mass, CHUNK)
    return low


@jit(do_not_specialize=["vocab_size", "chunks"])
def search_kernel(
    logits,
    temperatures,
    top_ks,
    top_ps,
    log_min_ps,
    maxima,
    counts,
    masses,
    candidates,
    found,
    stride,
    vocab_size,
    chunks,
    DISTANCES: tl.constexpr,
    MOST: tl.constexpr,
    CHUNKS: tl.constexpr,
    CHUNK: tl.constexpr,
) -> None:
    row = tl.program_id(0)
    temperature, highest = tl.load(temperatures + row), _highest(maxima, row, chunks, CHUNKS)
    top_k, top_p, log_min_p = tl.load(top_ks + row), tl.load(top_ps + row), tl.load(log_min_ps + row)
    threshold = float("-inf")
    if (temperature > 0) & (highest > float("-inf")) & (highest < float("inf")):
        _step, num, whole = _choice(
            counts, masses, row, chunks, highest, temperature, top_k, top_p, log_min_p, CHUNKS, DISTANCES
        )
        least = tl.maximum(highest + temperature * log_min_p, LEAST)
        if num <= MOST:
            threshold = _exact(candidates + row * MOST, num, highest, temperature, top_k, top_p, least, whole, CHUNK)
        else:
            threshold = _exact(
                logits + row.to(tl.int64) * stride,
                vocab_size,
                highest,
                temperature,
                top_k,
                top_p,
                least,
                whole,
                CHUNK,
            )
    tl.store(found + row, threshold)
