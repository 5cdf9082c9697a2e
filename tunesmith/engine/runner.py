"""Runs the model for one step: a batch in, its sampled tokens out. The native one: our decoder over paged keys.

forward:  tokens (some only on the device) -> Decoder.forward with PagedAttention -> hidden states of the sampled rows
          (as graphs: steps that only decode, to their tokens, graphs.py; small ones with prompts, prompt_graphs.py)
sample:   -> logits -> sampling -> last tokens (stay on the device), and copies for the host

Batch-invariant mode: a token's logits are the same bits in a long prompt, in a lone step and among any others, since
no product's shape depends on how many rows there are. On a GPU every linear computes GROUP_ROWS rows at a time
(fixed_rows.py), and the attention kernel has one tile for all. On a CPU, and for a model that is not ours to change,
the whole decoder runs over PASS_ROWS rows at a time, each attending on its own.

Where the decoder has a copy of its head in int8, steps of few requests take that (model/head_copy.py); in
batch-invariant mode none does.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from ctypes import CDLL
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tunesmith.engine.attend import PagedAttention, goes_fresh
from tunesmith.engine.attention_backends import AttentionKernels, find_kernels, heads_of
from tunesmith.engine.batch import SampledRow, StepBatch, StepResult
from tunesmith.engine.batching import small_batches, to_device, worst_batches
from tunesmith.engine.cache_size import kv_torch_dtype, num_pages
from tunesmith.engine.config import EngineConfig
from tunesmith.engine.cpu_pass import CpuPass
from tunesmith.engine.fixed_rows import fix_experts, fix_rows, in_groups
from tunesmith.engine.fused_pass import FusedPass, has_fused_pass
from tunesmith.engine.graph_memory import measured_bytes
from tunesmith.engine.graphs import Decoded, DecodeGraphs
from tunesmith.engine.interfaces import Pending, Runner
from tunesmith.engine.logprobs import LogprobTensors, score_prompt
from tunesmith.engine.pages import PAGE_SLOTS, PageAllocator, PagedCache
from tunesmith.engine.prompt_graphs import PromptGraphs, ladder
from tunesmith.engine.sampling import Sampled, Sampling
from tunesmith.errors import RequestError
from tunesmith.kernels.chip import is_gpu
from tunesmith.kernels.cpu_library import load
from tunesmith.kernels.paged_attention_fresh import warming_fresh
from tunesmith.model.decoder import Decoder
from tunesmith.model.head_copy import MOST_REQUESTS, copied_logits
from tunesmith.model.language_model import LanguageModel
from tunesmith.model.stream import WHOLE

__all__ = ["NativeRunner", "Runner", "evaluating"]

PASS_ROWS = 16
"""Few: on a CPU a lone request pays for all of them."""
GROUP_ROWS = 256
"""As many as decode together: a GPU reads the weights once for all of them, and up to here rows cost little."""


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

    before_pass: called with the batch before every pass that is not a graph's replay, and while one is recorded: then
        only `adapter_T` says which token has which adapter, and its values change at every replay. after_pass: called
        when such a pass was launched.
    num_pages: pages of the cache; None: as many as fit (cache_size.py).
    beside_page_bytes: bytes that another cache takes for each of these pages (a draft model's).
    owns_model: False: the model is someone else's. Nothing is recorded, since its weights may be put elsewhere, and its
        linears stay what they are.
    """

    shares_prefixes = True

    def __init__(
        self,
        model: Decoder,
        config: EngineConfig,
        num_pages: int | None = None,
        *,
        owns_model: bool = True,
        beside_page_bytes: int = 0,
    ) -> None:
        self.model = model
        self.config = config
        self.max_model_len = config.max_model_len
        self.vocab_size = model.config.vocab_size
        self.before_pass: list[Callable[[StepBatch], None]] = []
        self.beside_page_bytes = beside_page_bytes
        self.after_pass: list[Callable[[], None]] = []
        self.device = model.embedding.weight.device
        # Of a model that was loaded elsewhere a copy may be of weights that have changed.
        self.head_copy = model.head_copy if owns_model and not config.batch_invariant else None
        on_gpu = is_gpu(self.device)
        has_groups = config.batch_invariant and on_gpu and owns_model
        self.fixed_rows = PASS_ROWS if config.batch_invariant and not has_groups else None
        self.group_rows = GROUP_ROWS if has_groups else self.fixed_rows
        if config.batch_invariant and model.config.moe is not None and not owns_model:
            raise RequestError(
                "batch_invariant changes how experts compute, so it is not there for a mixture of experts that was "
                "loaded elsewhere: give the model by its path"
            )
        if has_groups:
            fix_rows(model.blocks, GROUP_ROWS)
        elif self.fixed_rows is not None and owns_model:
            fix_experts(model.blocks, self.fixed_rows)
        library = load() if self.device.type == "cpu" and owns_model and not on_gpu else None
        self._fused = self._make_pass(owns_model, library) if has_fused_pass(model) else None
        self.sampling = Sampling(config.max_num_seqs, self.vocab_size, self.device, library)
        self._records = on_gpu and owns_model and not config.enforce_eager and self.fixed_rows is None
        self._owns_model = owns_model
        self.attention = self._find_attention()
        self.cache = self._make_cache(num_pages)
        self.pages = PageAllocator(self.cache.num_pages)
        self.graphs = self._make_graphs() if self._records else None
        self.prompt_graphs = None if self.graphs is None else self._make_prompt_graphs(self.graphs)
        self._num_requests = 0
        self._hidden: Tensor | None = None
        self._ready_BV: Tensor | None = None
        self._decoded: Decoded | None = None
        self._scored: LogprobTensors | None = None

    def _make_pass(self, owns_model: bool, library: CDLL | None) -> FusedPass | CpuPass | None:
        """The written-out pass of this kind of device; a CPU's can't keep rows from each other, nor share a model."""
        if is_gpu(self.device):
            return FusedPass(self.model)
        if self.device.type != "cpu" or self.config.batch_invariant or self.model.stream is not WHOLE:
            return None
        return CpuPass(self.model, self.config.max_num_seqs, self.max_model_len, packs=owns_model, library=library)

    @property
    def stream_dtype(self) -> torch.dtype:
        """What the model computes in now; a live model's may change."""
        return self.model.compute_dtype or self.model.embedding.weight.dtype

    @property
    def page_dtype(self) -> torch.dtype:
        """What keys and values are held in."""
        return kv_torch_dtype(self.config, self.stream_dtype)

    def _find_attention(self) -> AttentionKernels | None:
        """Other libraries' attention over pages, where one is installed and faster here."""
        is_shared = self.model.stream is not WHOLE
        heads = heads_of(self.model.config, self.stream_dtype, self.page_dtype, self.device, is_shared)
        return find_kernels(self.config, heads, self.device, measures=self._owns_model)

    def _make_cache(self, pages: int | None) -> PagedCache:
        if pages is None:
            model, beside = self.model.config, self.beside_page_bytes
            graph_bytes = self._graph_bytes if self._records else None
            pages = num_pages(self.config, model, self.page_dtype, self.device, self.worst_pass, beside, graph_bytes)
        return PagedCache(self.model.config, pages, dtype=self.page_dtype, device=self.device)

    def _graph_bytes(self) -> int:
        """What recorded steps will take: of some that are recorded over one page, and dropped again."""
        self.cache = PagedCache(self.model.config, 1, dtype=self.page_dtype, device=self.device)
        graphs = self._make_graphs()
        return measured_bytes(graphs, self._make_prompt_graphs(graphs))

    def _make_graphs(self) -> DecodeGraphs:
        return DecodeGraphs(
            self._decode,
            self.sampling,
            max_num_seqs=self.config.max_num_seqs,
            max_context=self.max_model_len,
            slots_of_page=PAGE_SLOTS,
            device=self.device,
        )

    def _make_prompt_graphs(self, graphs: DecodeGraphs) -> PromptGraphs | None:
        """Beside those of decoding, in their memory; None where steps with prompts can't be, or are not to be, any."""
        sizes = ladder(self.config.max_num_batched_tokens, self.config.max_num_seqs)
        is_shared, others = self.model.stream is not WHOLE, self.attention
        if not sizes or is_shared or self.config.batch_invariant or (others is not None and others.takes_prompts):
            return None
        return PromptGraphs(
            self._known_hidden,
            self.sampling.state,
            sizes=sizes,
            max_context=self.max_model_len,
            slots_of_page=PAGE_SLOTS,
            device=self.device,
            recorder=graphs.recorder,
        )

    def warm_up(self, limit_s: float | None = None) -> None:
        """Record graphs: the first ones of each kind, and more of decoding for at most about `limit_s` seconds; `idle`
        records the rest. None: all."""
        if self.graphs is None:
            return
        started = time.perf_counter()
        self.graphs.record(limit_s if self.prompt_graphs is None else 0.0)
        if self.graphs.first_kind in self.graphs.refused:
            self.prompt_graphs = None  # whose steps ask for the same, and more memory
        if self.prompt_graphs is not None:
            self.prompt_graphs.record(None if limit_s is None else 0.0)
            while limit_s is None or time.perf_counter() - started < limit_s:
                if not self.graphs.record_next():
                    break

    def idle(self) -> bool:
        """Something that makes later steps faster, in a moment without work; False where nothing is left to do."""
        recordings = (self.graphs, self.prompt_graphs)
        has_recorded = any(graphs is not None and graphs.record_next() for graphs in recordings)
        return has_recorded or self.sampling.warm_up(self.stream_dtype)

    def refresh(self) -> bool:
        """Before anything runs: a cache of the dtype that a live model computes in now. Whether it was made anew."""
        if self.cache.dtype == self.page_dtype:
            return False
        self.attention = self._find_attention()
        self.cache = self._make_cache(self.cache.num_pages)
        for graphs in (self.prompt_graphs, self.graphs):
            if graphs is not None:
                graphs.drop()
        return True

    @contextmanager
    def _passing(self) -> Iterator[None]:
        """The model as it answers: in evaluation mode, its blocks written out where that is a GPU's."""
        was_fused = self.model.is_fused
        is_fused = (was_fused or is_gpu(self.device)) and not self.config.batch_invariant
        if is_fused != was_fused:  # a module's attributes are set by way of a search
            self.model.is_fused = is_fused
        try:
            with torch.inference_mode(), evaluating(self.model):
                yield
        finally:
            if is_fused != was_fused:
                self.model.is_fused = was_fused

    def forward(self, batch: StepBatch) -> None:
        """Launch the pass over the model: as a graph where one covers it."""
        with self._passing():
            self._num_requests = batch.num_requests
            self._hidden = self._scored = None
            self._decoded = None if self.graphs is None or batch.score_rows is not None else self.graphs(batch)
            if self._decoded is not None:
                return
            self._ready_BV = self._compiled(batch)
            if self._ready_BV is not None:
                return
            hidden_TD = self._all_hidden(batch)
            self._scored = self._score(hidden_TD, batch)
            self._hidden = hidden_TD if batch.is_decode else hidden_TD.index_select(0, batch.sample_rows_B)

    def _compiled(self, batch: StepBatch) -> Tensor | None:
        """logits_BV of a step that a CPU's own code takes as a whole."""
        if self.head_copy is not None or not isinstance(self._fused, CpuPass):
            return None
        if batch.score_rows is not None or batch.adapter_T is not None:
            return None
        return self._fused.decode(batch, self.cache, self.sampling.state.last_tokens_N)

    def _all_hidden(self, batch: StepBatch) -> Tensor:
        if not batch.passes:
            recorded_TD = self._recorded_hidden(batch)
            return self.hidden(batch) if recorded_TD is None else recorded_TD
        return torch.cat([self.hidden(part) for part in batch.passes])[: batch.num_tokens]

    def _recorded_hidden(self, batch: StepBatch) -> Tensor | None:
        """hidden_TD of a step with prompts, by a graph until the next one runs; None where none covers it."""
        if self.prompt_graphs is None or batch.is_decode or goes_fresh(self.cache, batch):
            return None
        return self.prompt_graphs(batch)

    def hidden(self, batch: StepBatch) -> Tensor:
        """hidden_TD of one pass; keys and values are written."""
        # What is not known to the host yet was drawn for that slot by the step before.
        last_T = self.sampling.state.last_tokens_N[(-1 - batch.tokens_T).clamp(min=0)]
        return self._pass(torch.where(batch.tokens_T < 0, last_T, batch.tokens_T), batch, self.cache, self.attention)

    def _decode(self, batch: StepBatch) -> Tensor:
        """logits_BV of a batch of single tokens, all of them known: what a graph records."""
        with self._passing():
            return self._drawn_from(self._pass(batch.tokens_T, batch, self.cache, self.attention), batch.num_requests)

    def _known_hidden(self, batch: StepBatch) -> Tensor:
        """hidden_TD of a batch whose tokens are all known: what a graph of prompts records."""
        with self._passing():
            return self._pass(batch.tokens_T, batch, self.cache, kernels=None)

    def _pass(self, tokens_T: Tensor, batch: StepBatch, cache: PagedCache, kernels: AttentionKernels | None) -> Tensor:
        for call in self.before_pass:
            call(batch)
        attend = PagedAttention(cache, batch, invariant=self.config.batch_invariant, kernels=kernels)
        run = self.model if self._fused is None else self._fused
        hidden: Tensor = run(tokens_T, batch.positions_T, attend)
        for done in self.after_pass:
            done()
        return hidden

    def _drawn_from(self, hidden_BD: Tensor, num_requests: int) -> Tensor:
        """logits_BV of the rows that are drawn in a step of so many requests: few take the copy of the head."""
        if self.head_copy is None or num_requests > MOST_REQUESTS:
            return self.logits(hidden_BD)
        return copied_logits(self.head_copy, hidden_BD)

    def logits(self, hidden_BD: Tensor) -> Tensor:
        """logits_BV of hidden states, by the head as it is stored."""
        if isinstance(self._fused, CpuPass):
            return self._fused.logits(hidden_BD)
        if self.group_rows is None:
            return self.model.logits(hidden_BD)
        return in_groups(self.model.logits, hidden_BD, self.group_rows)

    def _score(self, hidden_TD: Tensor, batch: StepBatch) -> LogprobTensors | None:
        if batch.score_rows is None or batch.score_targets is None:
            return None
        hidden = hidden_TD.index_select(0, batch.score_rows)
        return score_prompt(hidden, batch.score_targets, self.logits, self.vocab_size, batch.num_scored_top)

    def step_logits(self, batch: StepBatch) -> Tensor:
        """logits_BV of the batch's sampled rows, without choosing tokens (for checks)."""
        self.forward(batch)
        with self._passing():
            return self._logits().clone()

    def _logits(self) -> Tensor:
        if self._decoded is not None:
            return self._decoded.logits_BV
        if self._ready_BV is not None:
            return self._ready_BV
        assert self._hidden is not None, "sample follows forward"
        return self._drawn_from(self._hidden, self._num_requests)

    def sample(self, batch: StepBatch, rows: Sequence[SampledRow], masks: np.ndarray | None) -> Pending:
        """Launch the choice of tokens for the pass that `forward` launched last."""
        with self._passing():
            masks_MW = None if masks is None else self.sampling.state.moved(torch.from_numpy(masks))
            chosen_B = None if self._decoded is None else self._decoded.tokens_B
            slots_B, positions_B = batch.sample_slots_B, batch.sample_positions_B
            sampled = self.sampling(self._logits(), rows, slots_B, positions_B, masks_MW, chosen_B).to_host()
            scored = None if self._scored is None else self._scored.to_host()
        self._hidden = self._ready_BV = self._decoded = self._scored = None
        done = None
        if self.device.type == "cuda":
            done = torch.cuda.Event()
            done.record()
        return DevicePending(sampled, scored, batch.num_scored_top, done)

    def release(self, slot: int) -> None:
        """A sequence has left this slot."""
        self.sampling.release(slot)
        if isinstance(self._fused, CpuPass):
            self._fused.release(slot)

    def worst_pass(self) -> None:
        """The largest pass there can be, over one page that is never written: what pages must leave room for.

        And small ones of every other kind, so that nothing is compiled while requests wait.
        """
        cache = PagedCache(self.model.config, 1, dtype=self.page_dtype, device=self.device)
        config = self.model.config
        heads = (config.num_attention_heads, config.num_key_value_heads, config.head_dim)
        with warming_fresh(*heads, self.page_dtype, self.device), self._passing():
            for host in [*small_batches(self.config), *worst_batches(self.config)]:
                batch = to_device(host, self.device)
                hidden_TD = self._pass(batch.tokens_T, batch, cache, self.attention)
            for few in () if self.head_copy is None else (1, MOST_REQUESTS):
                self._drawn_from(hidden_TD[:few], few)
            logits_BV = self.logits(hidden_TD[: self.config.max_num_seqs])
            # Float32 copies of sampling: penalties, thresholds and probabilities.
            copies = [logits_BV.float() for _ in range(3)]
        del hidden_TD, logits_BV, copies
