"""Sampling's Triton kernels, as torch custom operators. Imported only where Triton is installed."""

# Triton's decorator and its kernels' arguments have no types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tunesmith.kernels.launch import current, num_processors
from tunesmith.kernels.philox import ROUNDS
from tunesmith.kernels.sampling_noise import BROKEN, SERIES_BELOW, SITE, quarter
from tunesmith.units import ceil_div

# Columns of each of a program's four strips: 16 bytes a thread in 16-bit formats.
_COLUMNS = 1024
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
        _best_kernel[(num_rows, splits)](
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
        _reduce_kernel[(num_rows,)](
            scores,
            best,
            slots,
            tokens,
            last_tokens,
            splits,
            SPLITS=triton.next_power_of_2(most_splits(vocab_size)),  # one kernel for every batch
            BROKEN=BROKEN,
            num_warps=1,
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


@triton.jit
def _gumbel(word, SERIES_BELOW: tl.constexpr):
    """Standard Gumbel noise of a word: minus the logarithm of an exponential value."""
    u = tl.minimum((word.to(tl.float32) + 0.5) * (2.0**-32), 1 - 2.0**-24)
    series = u * (1 + u * (1 / 2 + u * (1 / 3 + u * (1 / 4))))
    return -tl.log(tl.where(u < SERIES_BELOW, series, -tl.log(1 - u)))


@triton.jit(do_not_specialize=["splits"])
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
    """The best token of one program's share of a row: blocks split, split + splits, ... of the row's quarter."""
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
    for block in range(split, (QUARTER + COLUMNS - 1) // COLUMNS, splits):
        column = block * COLUMNS + tl.arange(0, COLUMNS)
        zero = column * 0
        none = zero.to(tl.uint32)
        word_0, word_1, word_2, word_3 = none, none, none, none
        if temperature > 0:
            # Word w of the counter at `column` belongs to token column + w * QUARTER.
            word_0, word_1, word_2, word_3 = tl.philox(seed, column, zero + position, zero + SITE, zero, ROUNDS)
        words = (word_0, word_1, word_2, word_3)
        for strip in tl.static_range(4):
            at = column + strip * QUARTER
            mask = (column < QUARTER) & (at < VOCAB)
            value = tl.load(source + at, mask=mask, other=float("-inf")).to(tl.float32)
            score = value
            if temperature > 0:
                score = value / temperature + _gumbel(words[strip], SERIES_BELOW)
            if HAS_THRESHOLDS:
                score = tl.where(value < threshold, float("-inf"), score)
            score = tl.where(value != value, float("inf"), score)
            better = (score > top) | ((score == top) & (at < token))
            top = tl.where(better, score, top)
            token = tl.where(better, at, token)
    highest = tl.max(top, 0)
    tl.store(scores + row * splits + split, highest)
    tl.store(best + row * splits + split, tl.min(tl.where(top == highest, token, VOCAB), 0))


@triton.jit(do_not_specialize=["splits"])
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
