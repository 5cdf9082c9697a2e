"""Draws of our own C++ are those of the references: same thresholds, same noise, same tokens."""

from __future__ import annotations

import os
import select
import signal
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from tunesmith.kernels.sampling import choose_reference, thresholds_reference
from tunesmith.kernels.sampling_native import NativeDraw
from tunesmith.kernels.sampling_noise import BROKEN

SLOTS = 32


class Tables:
    """By slot: temperatures, filters and seeds of which every combination occurs."""

    def __init__(self, seed: int) -> None:
        draw = torch.Generator().manual_seed(seed)

        def pick(values: list[float]) -> Tensor:
            return torch.tensor(values)[torch.randint(len(values), (SLOTS,), generator=draw)]

        self.temperatures = pick([0.0, 0.3, 0.6, 1.0, 1.7])
        self.top_p = pick([1.0, 1.0, 0.9, 0.5, 0.01])
        self.min_p = pick([0.0, 0.0, 0.05, 0.5])
        self.top_k = pick([0, 0, 1, 5, 40, 100_000]).long()
        self.seeds = torch.randint(2**62, (SLOTS,), generator=draw)
        self.last = torch.zeros(SLOTS, dtype=torch.int64)

    def native(self, library: Any) -> NativeDraw:
        return NativeDraw(
            library,
            temperatures_N=self.temperatures,
            top_p_N=self.top_p,
            min_p_N=self.min_p,
            seeds_N=self.seeds,
            top_k_N=self.top_k,
            last_tokens_N=self.last,
        )

    def reference(self, logits: Tensor, slots: Tensor, positions: Tensor) -> Tensor:
        own = (table[slots] for table in (self.temperatures, self.top_k, self.top_p, self.min_p))
        thresholds = thresholds_reference(logits, *own)
        last = torch.zeros(SLOTS, dtype=torch.int64)
        return choose_reference(logits, self.temperatures, self.seeds, slots, positions, last, thresholds)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab_size", [3, 50, 257, 4096, 33_000])
def test_tokens_are_the_references(vocab_size: int, dtype: torch.dtype, compiled_library: Any) -> None:
    """Equal but for ties of rounding: a draw in ten thousand may fall to another token."""
    num_same = num_all = 0
    for seed in range(3 if vocab_size > 5000 else 12):
        draw = torch.Generator().manual_seed(seed)
        tables = Tables(seed)
        rows = int(torch.randint(1, 17, (1,), generator=draw))
        slots = torch.randperm(SLOTS, generator=draw)[:rows]
        positions = torch.randint(2**31 - 1, (rows,), generator=draw)
        logits = (torch.randn(rows, vocab_size, generator=draw) * [0.01, 3.0, 12.0][seed % 3]).to(dtype)
        logits[torch.rand(rows, vocab_size, generator=draw) < 0.1] = -torch.inf
        logits[:, 1] = 0.5
        found = tables.native(compiled_library)(logits, slots, positions)
        assert torch.equal(tables.last[slots], found.clamp(min=0))
        num_same += int((found == tables.reference(logits, slots, positions)).sum())
        num_all += rows
    assert num_same == num_all


def test_a_top_p_that_vanishes_leaves_all_of_the_largest(compiled_library: Any) -> None:
    """In float32 1e-46 is 0: nothing was left then, and the first of the largest logits was taken for the draw."""
    tables = Tables(5)
    tables.temperatures.fill_(1.0)
    tables.top_p.fill_(1e-46)
    logits = torch.randint(3, (SLOTS, 50), generator=torch.Generator().manual_seed(5)).float()
    rows = torch.arange(SLOTS)
    found = tables.native(compiled_library)(logits, rows, rows)
    assert torch.equal(found, tables.reference(logits, rows, rows))
    assert not torch.equal(found, logits.argmax(1))


def test_a_row_that_is_not_numbers_is_broken_alone(compiled_library: Any) -> None:
    tables = Tables(1)
    logits = torch.randn(5, 300)
    logits[1, 299] = torch.nan
    logits[2] = -torch.inf
    logits[3, 7] = torch.inf
    found = tables.native(compiled_library)(logits, torch.arange(5), torch.arange(5))
    assert found[[1, 2, 3]].tolist() == [BROKEN] * 3
    assert (found[[0, 4]] >= 0).all()


def test_a_row_is_drawn_as_if_it_were_alone(compiled_library: Any) -> None:
    """With any threads, any rows beside it, and rows that are apart."""
    tables, draw = Tables(2), torch.Generator().manual_seed(2)
    wide = torch.randn(6, 20_100, generator=draw)
    logits, slots, positions = wide[:, :20_000], torch.arange(6), torch.arange(6) * 9
    native, threads = tables.native(compiled_library), torch.get_num_threads()
    together = native(logits, slots, positions)
    try:
        torch.set_num_threads(3)
        assert torch.equal(native(logits, slots, positions), together)
    finally:
        torch.set_num_threads(threads)
    for row in range(6):
        one = slice(row, row + 1)
        assert torch.equal(native(logits[one], slots[one], positions[one]), together[one])


def test_tokens_are_drawn_from_the_softmax(compiled_library: Any) -> None:
    tables, num = Tables(3), 4000
    tables.temperatures.fill_(0.8)
    tables.top_p.fill_(1.0)
    tables.min_p.fill_(0.0)
    tables.top_k.fill_(0)
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, 1.5]).expand(num, -1)
    drawn = tables.native(compiled_library)(logits, torch.arange(num) % SLOTS, torch.arange(num))
    shares = torch.bincount(drawn, minlength=5) / num
    torch.testing.assert_close(shares, (logits[0] / 0.8).softmax(0), atol=0.03, rtol=0)


def test_a_fork_has_threads_of_its_own(compiled_library: Any) -> None:
    """A child has none of its parent's threads, and must not wait for them."""
    tables = Tables(4)
    logits, rows = torch.randn(4, 20_000), torch.arange(4)
    native, threads = tables.native(compiled_library), torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        wanted = native(logits, rows, rows)
        reading, writing = os.pipe()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of forks beside threads
            child = os.fork()
        if not child:
            os.write(writing, b"same" if torch.equal(native(logits, rows, rows), wanted) else b"other")
            os._exit(0)
        ready, _, _ = select.select([reading], [], [], 60)
        if not ready:
            os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        assert ready and os.read(reading, 8) == b"same"
    finally:
        torch.set_num_threads(threads)
        os.close(reading)
        os.close(writing)
