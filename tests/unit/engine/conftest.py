"""A fake model for the engine's own logic: its next token is the last one plus one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tunesmith.engine.batch import SampledRow, StepBatch, StepResult
from tunesmith.engine.config import EngineConfig
from tunesmith.engine.engine import Engine
from tunesmith.engine.pages import PAGE_SLOTS, PageAllocator, pages_of

VOCAB = 100


@dataclass
class CountedPending:
    """Tokens that were drawn already; `broken` tokens are no numbers."""

    tokens: list[int]

    def wait(self) -> StepResult:
        return StepResult(self.tokens)


class Counting:
    """A runner that says last token + 1, and reads it from its pages: what was not written there can't be said.

    broken: tokens after which the logits are not numbers. fail_at: the step that is interrupted.
    """

    shares_prefixes = True
    vocab_size = VOCAB
    fixed_rows = None
    device = torch.device("cpu")

    def __init__(self, max_model_len: int, num_pages: int, num_slots: int, fail_at: int = -1) -> None:
        self.max_model_len = max_model_len
        self.pages = PageAllocator(num_pages)
        self.storage = np.full(num_pages * PAGE_SLOTS, -1)
        self.last = [-1] * num_slots
        self.fail_at, self.num_steps = fail_at, 0
        self.broken: set[int] = set()
        self.batches: list[StepBatch] = []
        self.masks: list[np.ndarray | None] = []
        self.released: list[int] = []

    def refresh(self) -> bool:
        return False

    def forward(self, batch: StepBatch) -> None:
        self.num_steps += 1
        self.batches.append(batch)
        if self.num_steps == self.fail_at:
            raise KeyboardInterrupt
        self.tokens = [t if t >= 0 else self.last[-1 - t] for t in batch.tokens_T.tolist()]
        self.storage[batch.slots_T.numpy()] = self.tokens
        starts, contexts = batch.query_starts_R1.tolist(), batch.context_R.tolist()
        for row, context in enumerate(contexts):
            table = batch.block_tables_RP[row].numpy()
            slots = table[np.arange(context) // PAGE_SLOTS] * PAGE_SLOTS + np.arange(context) % PAGE_SLOTS
            seen = self.storage[slots]
            assert (seen >= 0).all(), "a key was read that nobody wrote"
            assert seen[-1] == self.tokens[starts[row + 1] - 1]
            assert batch.positions_T[starts[row + 1] - 1] == context - 1

    def sample(self, batch: StepBatch, rows: Sequence[SampledRow], masks: np.ndarray | None) -> CountedPending:
        self.masks.append(masks)
        assert len(rows) == len(batch.sample_rows_B)
        before = [self.tokens[row] for row in batch.sample_rows_B.tolist()]
        drawn = [-1 if t in self.broken else (t + 1) % VOCAB for t in before]
        for slot, token in zip(batch.sample_slots_B.tolist(), drawn, strict=True):
            self.last[slot] = max(token, 0)
        return CountedPending(drawn)

    def release(self, slot: int) -> None:
        self.released.append(slot)


@pytest.fixture
def counting() -> Callable[..., Engine]:
    """A function that makes an engine over a counting runner, which counts its pages after every request."""

    def make(
        max_num_seqs: int = 1,
        max_model_len: int = 32,
        num_pages: int | None = None,
        fail_at: int = -1,
        stop_ids: Sequence[int] = (),
        parts: dict[str, Any] | None = None,
        **options: Any,
    ) -> Engine:
        options.setdefault("max_num_batched_tokens", max(64, max_num_seqs))
        config = EngineConfig(max_model_len=max_model_len, max_num_seqs=max_num_seqs, debug_pages=True, **options)
        pages = max_num_seqs * pages_of(max_model_len) if num_pages is None else num_pages
        runner = Counting(max_model_len, pages, max_num_seqs, fail_at)
        return Engine(runner, config=config, stop_ids=stop_ids, **(parts or {}))

    return make


@pytest.fixture
def make_adapter(tmp_path: Path) -> Callable[[Path], Path]:
    """From a model's directory to that of an adapter on all its linears, of several ranks and random values."""

    def make(base: Path) -> Path:
        from tunesmith.checkpoint.adapter import save_adapter
        from tunesmith.checkpoint.load import load_decoder
        from tunesmith.model.lora import AdapterOptions
        from tunesmith.model.methods import adapted_linears, add_adapters, block_linears

        model = load_decoder(base, device="cpu", dtype=torch.float32)
        chosen = {target.path: list(target.parts) for target in block_linears(model)}
        add_adapters(model, chosen, lambda name: AdapterOptions(1 + len(name) % 4, 8.0), seed=0)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for linear in adapted_linears(model).values():
                for parameter in linear.adapters.parameters():
                    parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
        save_adapter(model, tmp_path / "adapter", base)
        return tmp_path / "adapter"

    return make
