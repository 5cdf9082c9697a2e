"""Sampling's Triton kernels, as torch custom operators. Imported only where Triton is installed."""

# Triton's decorator and its kernels' arguments have no types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tunesmith.kernels.jit import jit
from tunesmith.kernels.launch import current, num_processors
from tunesmith.kernels.philox import ROUNDS
from tunesmith.kernels.quick import quick
from tunesmith.kernels.sampling_noise import BROKEN, SERIES_BELOW, SITE, quarter
from tunesmith.units import ceil_div

# Columns of each of a program's four strips. Few: what one token can win is given noise in all of them.
_COLUMNS = 512
_WARPS = 4
_PROGRAMS_PER_PROCESSOR = 4


@torch.library.custom_op("tunesmith::choose", mutates_args=("last_tokens",))
def choose_operator(
    logits: Tensor,
    temperatures: Tensor,
    seeds: Tensor,
    slots: Tensor,
    positions: Tensor,
    last_tokens: Tensor,
    thresholds: Tensor | None,
) -> Tensor:
    """tokens [B] int64 of logits [B, V], whose last stride is 1; the other arguments are contiguous."""
    num_rows, vocab_size = logits.shape
    tokens = slots.new_empty(num_rows)
    if not num_rows:
        return tokens
    splits = num_splits(num_rows, vocab_size, logits.device)
    scores = torch.empty(num_rows, splits, dtype=torch.float32, device=logits.device)
    best = torch.empty(num_rows, splits, dtype=torch.int32, device=logits.device)
    with current(logits.device):
        quick(_best_kernel)[(num_rows, splits)](
            logits,
            temperatures,
            seeds,
            slots,
            positions,
            scores if thresholds is None else thresholds,
            scores,
            best,
            logits.stride(0),
            splits,
            VOCAB=vocab_size,
            QUARTER=quarter(vocab_size),
            COLUMNS=_COLUMNS,
            HAS_THRESHOLDS=thresholds is not None,
            SITE=SITE,
            SERIES_BELOW=SERIES_BELOW,
            ROUNDS=ROUNDS,
            num_warps=_WARPS,
            enable_fp_fusion=False,  # rounds as plain torch does
        )
        quick(_reduce_kernel)[(num_rows,)](
            scores,
            best,
            slots,
            tokens,
            last_tokens,
            splits,
            SPLITS=triton.next_power_of_2(most_splits(vocab_size)),  # one kernel for every batch
            BROKEN=BROKEN,
            num_warps=1,
            enable_fp_fusion=True,
        )
    return tokens


@choose_operator.register_fake
def _choose_fake(
    logits: Tensor,
    temperatures: Tensor,
    seeds: Tensor,
    slots: Tensor,
    positions: Tensor,
    last_tokens: Tensor,
    thresholds: Tensor | None,
) -> Tensor:
    return slots.new_empty(logits.shape[0])


def num_splits(num_rows: int, vocab_size: int, device: torch.device) -> int:
    """Programs that share a row."""
    wanted = ceil_div(_PROGRAMS_PER_PROCESSOR * num_processors(device), max(num_rows, 1))
    return max(1, min(wanted, most_splits(vocab_size)))


def most_splits(vocab_size: int) -> int:
    """Blocks that a row can be split into."""
    return ceil_div(quarter(vocab_size), _COLUMNS)


@jit
def _gumbel(word, SERIES_BELOW: tl.constexpr):
    """Standard Gumbel noise of a word: minus the logarithm of an exponential value."""
    u = tl.minimum((word.to(tl.float32) + 0.5) * (2.0**-32), 1 - 2.0**-24)
    series = u * (1 + u * (1 / 2 + u * (1 / 3 + u * (1 / 4))))
    return -tl.log(tl.where(u < SERIES_BELOW, series, -tl.log(1 - u)))


@jit
def _value(source, column, strip, threshold, VOCAB: tl.constexpr, QUARTER: tl.constexpr, HAS_THRESHOLDS: tl.constexpr):
    """The tokens of one strip and their logits: minus infinity where there is none, or none that may be drawn."""
    at = column + strip * QUARTER
    mask = (column < QUARTER) & (at < VOCAB)
    value = tl.load(source + at, mask=mask, other=float("-inf")).to(tl.float32)
    if HAS_THRESHOLDS:
        value = tl.where(value < threshold, float("-inf"), value)
    return at, value


@jit
def _better(top, token, value, score, at):
    """The best of each lane, with one more token; a logit that is not a number beats all."""
    score = tl.where(value != value, float("inf"), score)
    is_better = (score > top) | ((score == top) & (at < token))
    return tl.where(is_better, score, top), tl.where(is_better, at, token)


@jit(do_not_specialize=["splits"])
def _best_kernel(
    logits,
    temperatures,
    seeds,
    slots,
    positions,
    thresholds,
    scores,
    best,
    row_stride,
    splits,
    VOCAB: tl.constexpr,
    QUARTER: tl.constexpr,
    COLUMNS: tl.constexpr,
    HAS_THRESHOLDS: tl.constexpr,
    SITE: tl.constexpr,
    SERIES_BELOW: tl.constexpr,
    ROUNDS: tl.constexpr,
) -> None:
    """The best token of one program's share of a row: blocks split, split + splits, ... of the row's quarter.

    A block in which no token can reach the best so far is given no noise: noise is -log(e) with e >= u, the uniform
    number of the word, so a token needs u <= exp(logit / temperature - best). Two logarithms are saved for it.
    """
    row, split = tl.program_id(0), tl.program_id(1)
    source = logits + row.to(tl.int64) * row_stride
    slot = tl.load(slots + row)
    temperature, seed = tl.load(temperatures + slot), tl.load(seeds + slot)
    position = tl.load(positions + row).to(tl.int32)
    threshold = float("-inf")
    if HAS_THRESHOLDS:
        threshold = tl.load(thresholds + row)
    top = tl.full((COLUMNS,), float("-inf"), tl.float32)
    token = tl.full((COLUMNS,), VOCAB, tl.int32)
    if temperature > 0:
        reached = float("-inf")
        in_log2 = 1.4426950408889634 / temperature
        for block in range(split, (QUARTER + COLUMNS - 1) // COLUMNS, splits):
            column = block * COLUMNS + tl.arange(0, COLUMNS)
            zero = column * 0
            # Word w of the counter at `column` belongs to token column + w * QUARTER.
            words = tl.philox(seed, column, zero + position, zero + SITE, zero, ROUNDS)
            # The slack is more than rounding can make of a difference of scores. First every logit can win.
            below = 0.02 + 4e-6 * tl.abs(reached) - reached * 1.4426950408889634
            below = tl.where(reached == float("-inf"), 3.4e38, below)
            loses = column >= 0
            for strip in tl.static_range(4):
                _, value = _value(source, column, strip, threshold, VOCAB, QUARTER, HAS_THRESHOLDS)
                # 1 + u from the word's upper bits: not above the u that noise is made of.
                least = ((words[strip] >> 9) | 0x3F800000).to(tl.float32, bitcast=True)
                # What is not a number does not lose.
                loses &= least > 1 + tl.exp2(value * in_log2 + below)
            if tl.min(loses.to(tl.int32), 0) == 0:
                for strip in tl.static_range(4):
                    at, value = _value(source, column, strip, threshold, VOCAB, QUARTER, HAS_THRESHOLDS)
                    score = value / temperature + _gumbel(words[strip], SERIES_BELOW)
                    top, token = _better(top, token, value, score, at)
                reached = tl.max(top, 0)
    else:
        for block in range(split, (QUARTER + COLUMNS - 1) // COLUMNS, splits):
            column = block * COLUMNS + tl.arange(0, COLUMNS)
            for strip in tl.static_range(4):
                at, value = _value(source, column, strip, threshold, VOCAB, QUARTER, HAS_THRESHOLDS)
                top, token = _better(top, token, value, value, at)
    highest = tl.max(top, 0)
    tl.store(scores + row * splits + split, highest)
    tl.store(best + row * splits + split, tl.min(tl.where(top == highest, token, VOCAB), 0))


@jit(do_not_specialize=["splits"])
def _reduce_kernel(
    scores, best, slots, tokens, last_tokens, splits, SPLITS: tl.constexpr, BROKEN: tl.constexpr
) -> None:
    row = tl.program_id(0)
    split = tl.arange(0, SPLITS)
    top = tl.load(scores + row * splits + split, mask=split < splits, other=float("-inf"))
    token = tl.load(best + row * splits + split, mask=split < splits, other=2147483647)
    highest = tl.max(top, 0)
    found = tl.min(tl.where(top == highest, token, 2147483647), 0).to(tl.int64)
    is_number = (highest > float("-inf")) & (highest < float("inf"))
    tl.store(tokens + row, tl.where(is_number, found, BROKEN))
    tl.store(last_tokens + tl.load(slots + row), tl.where(is_number, found, 0))
