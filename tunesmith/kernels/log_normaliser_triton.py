"""The kernel of kernels/log_normaliser.py, as a torch custom operator. Imported only where Triton is installed."""

# Triton's decorator and its kernels' arguments have no types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from tunesmith.kernels.jit import jit
from tunesmith.kernels.launch import current

_COLUMNS, _WARPS = 4096, 8


@torch.library.custom_op("tunesmith::log_normaliser", mutates_args=())
def log_normaliser_operator(logits: Tensor) -> Tensor:
    """float32 [M] of logits [M, V]: a program a row, whatever M is."""
    logits = logits.contiguous()
    num_rows, vocab_size = logits.shape
    found = torch.empty(num_rows, dtype=torch.float32, device=logits.device)
    if num_rows:
        with current(logits.device):
            _normaliser_kernel[(num_rows,)](
                logits, found, VOCAB=vocab_size, COLUMNS=_COLUMNS, num_warps=_WARPS, enable_fp_fusion=True
            )
    return found


@log_normaliser_operator.register_fake
def _log_normaliser_fake(logits: Tensor) -> Tensor:
    return logits.new_empty(logits.shape[0], dtype=torch.float32)


@jit
def _finite(value):
    # What exponents are taken relative to: infinite where a row has nothing, or too much.
    return tl.where((value > float("-inf")) & (value < float("inf")), value, 0.0)


@jit
def _normaliser_kernel(logits, found, VOCAB: tl.constexpr, COLUMNS: tl.constexpr) -> None:
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, COLUMNS)
    largest = tl.full((COLUMNS,), float("-inf"), tl.float32)
    total = tl.zeros((COLUMNS,), tl.float32)
    for first in range(0, VOCAB, COLUMNS):
        mask = first + column < VOCAB
        value = tl.load(logits + row * VOCAB + first + column, mask=mask, other=float("-inf")).to(tl.float32)
        larger = tl.maximum(largest, value)
        base = _finite(larger)
        total = total * tl.exp(largest - base) + tl.exp(value - base)
        largest = larger
    base = _finite(tl.max(largest, 0))
    tl.store(found + row, tl.log(tl.sum(total * tl.exp(largest - base), 0)) + base)
