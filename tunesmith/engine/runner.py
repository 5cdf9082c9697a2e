"""Runs the model for one step: a batch in, its sampled tokens out. The native one: our decoder over paged keys.

forward:  tokens (some only on the device) -> Decoder.forward with PagedAttention -> hidden states of the sampled rows
sample:   -> logits -> sampling -> last tokens (stay on the device), and copies for the host

Batch-invariant mode: the decoder runs over exactly FIXED_ROWS rows at a time, padded, every row attends on its own, and
so does the head. A product's sum then never depends on how many rows there are, so a token's logits are the same bits
in a long prompt, in a lone step and among any others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tunesmith.engine.attend import PagedAttention
from tunesmith.engine.batch import SampledRow, StepBatch, StepResult
from tunesmith.engine.cache_size import kv_torch_dtype, num_pages
from tunesmith.engine.config import EngineConfig
from tunesmith.engine.interfaces import Runner
from tunesmith.engine.logprobs import LogprobTensors, score_prompt
from tunesmith.engine.pages import PageAllocator, PagedCache
from tunesmith.engine.sampling import Sampled, Sampling
from tunesmith.errors import RequestError
from tunesmith.model.decoder import Decoder
from tunesmith.model.language_model import LanguageModel

__all__ = ["NativeRunner", "Runner", "evaluating"]

# Rows of a pass in batch-invariant mode: on a CPU few, since a lone request pays for all of them.
FIXED_ROWS = {"cpu": 16, "cuda": 64}


@contextmanager
def evaluating(model: LanguageModel) -> Iterator[None]:
    """The model in evaluation mode (no dropout, no noise); a model that was training trains on afterwards."""
    was_training = model.training
    if was_training:
        model.eval()
    try:
        yield
    finally:
        if was_training:
            model.train()


@dataclass
class DevicePending:
    """A launched step: copies to the host that are complete once `done` is."""

    sampled: Sampled
    scored: LogprobTensors | None
    num_scored_top: int
    done: torch.cuda.Event | None

    def wait(self) -> StepResult:
        """The step's tokens on the host."""
        if self.done is not None:
            self.done.synchronize()
        tokens, logprobs = self.sampled.lists()
        if self.scored is None:
            return StepResult(tokens, logprobs)
        num = len(self.scored.chosen_M)
        return StepResult(tokens, logprobs, self.scored.lists([self.num_scored_top] * num))


class NativeRunner:
    """Our decoder over paged keys and values.

    before_pass: called with the batch before every pass over the model (adapters set their indices there).
    num_pages: pages of the cache; None: as many as fit (cache_size.py).
    """

    shares_prefixes = True

    def __init__(self, model: Decoder, config: EngineConfig, num_pages: int | None = None) -> None:
        self.model = model
        self.config = config
        self.max_model_len = config.max_model_len
        self.vocab_size = model.config.vocab_size
        self.before_pass: list[Callable[[StepBatch], None]] = []
        self.device = model.embedding.weight.device
        self.fixed_rows = FIXED_ROWS.get(self.device.type, 16) if config.batch_invariant else None
        if config.batch_invariant and model.config.moe is not None:
            raise RequestError(
                "batch_invariant is not there for mixtures of experts: the rows an expert gets depend on the batch"
            )
        self.sampling = Sampling(config.max_num_seqs, self.vocab_size, self.device)
        self.cache = self._make_cache(num_pages)
        self.pages = PageAllocator(self.cache.num_pages)
        self._hidden: Tensor | None = None
        self._scored: LogprobTensors | None = None

    @property
    def stream_dtype(self) -> torch.dtype:
        """What the model computes in now; a live model's may change."""
        return self.model.compute_dtype or self.model.embedding.weight.dtype

    def _make_cache(self, pages: int | None) -> PagedCache:
        dtype = kv_torch_dtype(self.config, self.stream_dtype)
        if pages is None:
            pages = num_pages(self.config, self.model.config, dtype, self.device, self._worst_pass)
        return PagedCache(self.model.config, pages, dtype=dtype, device=self.device)

    def refresh(self) -> bool:
        """Before anything runs: a cache of the dtype that a live model computes in now. Whether it was made anew."""
        if self.cache.dtype == kv_torch_dtype(self.config, self.stream_dtype):
            return False
        self.cache = self._make_cache(self.cache.num_pages)
        return True

    @contextmanager
    def _passing(self) -> Iterator[None]:
        """The model as it answers: in evaluation mode, its blocks written out where that is a GPU's."""
        was_fused = self.model.is_fused
        self.model.is_fused = was_fused or self.device.type == "cuda"
        try:
            with torch.inference_mode(), evaluating(self.model):
                yield
        finally:
            self.model.is_fused = was_fused

    def forward(self, batch: StepBatch) -> None:
        """Launch the pass over the model."""
        with self._passing():
            hidden_TD = self._all_hidden(batch)
            self._scored = self._score(hidden_TD, batch)
            self._hidden = hidden_TD if batch.is_decode else hidden_TD.index_select(0, batch.sample_rows_B)

    def _all_hidden(self, batch: StepBatch) -> Tensor:
        if not batch.passes:
            return self.hidden(batch)
        return torch.cat([self.hidden(part) for part in batch.passes])[: batch.num_tokens]

    def hidden(self, batch: StepBatch) -> Tensor:
        """hidden_TD of one pass; keys and values are written. What a CUDA graph records."""
        for call in self.before_pass:
            call(batch)
        # What is not known to the host yet was drawn for that slot by the step before.
        last_T = self.sampling.state.last_tokens_N[(-1 - batch.tokens_T).clamp(min=0)]
        tokens_T = torch.where(batch.tokens_T < 0, last_T, batch.tokens_T)
        attend = PagedAttention(self.cache, batch, invariant=self.fixed_rows is not None)
        return self.model(tokens_T, batch.positions_T, attend)

    def logits(self, hidden_BD: Tensor) -> Tensor:
        """logits_BV of hidden states."""
        if self.fixed_rows is None:
            return self.model.logits(hidden_BD)
        rows, num = self.fixed_rows, hidden_BD.shape[0]
        padded = F.pad(hidden_BD, (0, 0, 0, -num % rows))
        return torch.cat([self.model.logits(part) for part in padded.split(rows)])[:num]

    def _score(self, hidden_TD: Tensor, batch: StepBatch) -> LogprobTensors | None:
        if batch.score_rows is None or batch.score_targets is None:
            return None
        hidden = hidden_TD.index_select(0, batch.score_rows)
        return score_prompt(hidden, batch.score_targets, self.logits, self.vocab_size, batch.num_scored_top)

    def step_logits(self, batch: StepBatch) -> Tensor:
        """logits_BV of the batch's sampled rows, without choosing tokens (for checks)."""
        self.forward(batch)
        assert self._hidden is not None
        with self._passing():
            return self.logits(self._hidden)

    def sample(self, batch: StepBatch, rows: Sequence[SampledRow], masks: np.ndarray | None) -> DevicePending:
        """Launch the choice of tokens for the pass that `forward` launched last."""
        assert self._hidden is not None, "sample follows forward"
        with self._passing():
            logits_BV = self.logits(self._hidden)
            masks_MW = None if masks is None else torch.from_numpy(masks).to(self.device, non_blocking=True)
            slots_B, positions_B = batch.sample_slots_B, batch.sample_positions_B
            sampled = self.sampling(logits_BV, rows, slots_B, positions_B, masks_MW).to_host()
            scored = None if self._scored is None else self._scored.to_host()
        self._hidden = self._scored = None
        done = None
        if self.device.type == "cuda":
            done = torch.cuda.Event()
            done.record()
        return DevicePending(sampled, scored, batch.num_scored_top, done)

    def release(self, slot: int) -> None:
        """A sequence has left this slot."""
        self.sampling.release(slot)

    def _worst_pass(self) -> None:
        """The largest pass there can be, without a cache: its activations are what pages must leave room for."""
        num_tokens = min(self.config.max_num_batched_tokens, self.config.max_num_seqs * self.max_model_len)
        num_rows = min(self.config.max_num_seqs, num_tokens)
        zeros_T = torch.zeros(num_tokens, dtype=torch.int64, device=self.device)
        with self._passing():
            hidden_TD = self.model(zeros_T, zeros_T % self.max_model_len, _Nothing())
            logits_BV = self.logits(hidden_TD[:num_rows])
            # Sampling's float32 copies: penalties, thresholds and probabilities.
            del hidden_TD
            copies = [logits_BV.float() for _ in range(3)]
        del logits_BV, copies


class _Nothing:
    """Attention that gives every query its own value: the right shapes, and no cache."""

    def __getitem__(self, layer: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        return lambda query, key, value: torch.zeros_like(query, memory_format=torch.contiguous_format)
