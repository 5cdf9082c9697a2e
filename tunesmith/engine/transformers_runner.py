"""Any causal language model of transformers, for architectures we don't know natively: slower, and announced.

Each request keeps the library's own cache, one request after the other; nothing is paged, pages only count.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tunesmith.engine.batch import SampledRow, StepBatch
from tunesmith.engine.config import EngineConfig
from tunesmith.engine.logprobs import LogprobTensors, score_prompt
from tunesmith.engine.pages import PageAllocator, pages_of
from tunesmith.engine.runner import DevicePending, evaluating
from tunesmith.engine.sampling import Sampling
from tunesmith.errors import RequestError
from tunesmith.model.language_model import LanguageModel

log = logging.getLogger(__name__)


class TransformersRunner:
    """The library's model behind the engine's interface. `states` are the caches by slot."""

    shares_prefixes = False

    def __init__(self, model: LanguageModel, library_model: Any, config: EngineConfig) -> None:
        self.model = model
        self.library_model = library_model
        self.config = config
        self.max_model_len = config.max_model_len
        self.vocab_size = int(library_model.config.get_text_config().vocab_size)
        self.device = next(iter(model.parameters())).device
        self.sampling = Sampling(config.max_num_seqs, self.vocab_size, self.device)
        self.pages = PageAllocator(config.max_num_seqs * pages_of(config.max_model_len))
        self.fixed_rows: int | None = None
        if config.batch_invariant:
            raise RequestError("batch_invariant needs the native decoder, and this model runs through transformers")
        self.states: dict[int, Any] = {}
        accepted = inspect.signature(library_model.forward).parameters
        self.options = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}
        self.cache_name = "cache_params" if "cache_params" in accepted else "past_key_values"
        self._logits_BV = torch.empty(0)
        self._scored: LogprobTensors | None = None
        log.info("generation runs through transformers' own cache: its keys and values are not paged or counted")

    def refresh(self) -> bool:
        """Nothing is kept that a changed model could spoil."""
        return False

    def warm_up(self, limit_s: float | None = None) -> None:
        """Nothing is recorded here."""

    def idle(self) -> bool:
        """Nothing is left to do."""
        return False

    def forward(self, batch: StepBatch) -> None:
        """Run the sequences of the batch, one after the other."""
        starts, contexts = batch.query_starts_R1.tolist(), batch.context_R.tolist()
        ends, wanted = starts[1:], batch.sample_rows_B.tolist()
        # A prompt's logits are many: where only last ones are drawn from, only those are computed.
        last_only = bool(self.options) and batch.score_rows is None and set(wanted) <= {end - 1 for end in ends}
        parts = zip(batch.sequence_slots, starts, ends, contexts, strict=False)
        with torch.inference_mode(), evaluating(self.model):
            logits_TV = torch.cat(
                [self._one(slot, batch.tokens_T[start:end], context, last_only) for slot, start, end, context in parts]
            )
            self._scored = self._score(logits_TV, batch)
            rows = [ends.index(row + 1) for row in wanted] if last_only else wanted
            self._logits_BV = logits_TV[rows]

    def _one(self, slot: int, tokens_T: Tensor, context: int, last_only: bool) -> Tensor:
        """logits_TV of one sequence's new tokens, or of the last of them."""
        if context == len(tokens_T):
            self.states.pop(slot, None)
        last_T = self.sampling.state.last_tokens_N[(-1 - tokens_T).clamp(min=0)]
        out = self.library_model(
            input_ids=torch.where(tokens_T < 0, last_T, tokens_T)[None],
            use_cache=True,
            return_dict=True,
            **{self.cache_name: self.states.get(slot)},
            **(self.options if last_only else {}),
        )
        state = getattr(out, self.cache_name, None)
        if state is None:
            raise RequestError(
                f"{type(self.library_model).__name__} returned no cache from transformers, so it can't generate here"
            )
        self.states[slot] = state
        logits: Tensor = out.logits[0]
        return logits

    def _score(self, logits_TV: Tensor, batch: StepBatch) -> LogprobTensors | None:
        if batch.score_rows is None or batch.score_targets is None:
            return None
        rows = logits_TV.index_select(0, batch.score_rows)
        return score_prompt(rows, batch.score_targets, lambda part: part, self.vocab_size, batch.num_scored_top)

    def sample(self, batch: StepBatch, rows: Sequence[SampledRow], masks: np.ndarray | None) -> DevicePending:
        """Choose tokens for the pass that `forward` ran last."""
        masks_MW = None if masks is None else torch.from_numpy(masks).to(self.device)
        with torch.inference_mode():
            slots_B, positions_B = batch.sample_slots_B, batch.sample_positions_B
            sampled = self.sampling(self._logits_BV, rows, slots_B, positions_B, masks_MW).to_host()
            scored = None if self._scored is None else self._scored.to_host()
        done = None
        if self.device.type == "cuda":
            done = torch.cuda.Event()
            done.record()
        return DevicePending(sampled, scored, batch.num_scored_top, done)

    def release(self, slot: int) -> None:
        """Drop the slot's cache."""
        self.states.pop(slot, None)
        self.sampling.release(slot)
