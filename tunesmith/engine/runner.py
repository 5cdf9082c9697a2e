"""Runs the model for one step: tokens of several requests in, each request's next logits out.

The native runner passes packed tokens through `Decoder.forward` with attention over pages. The transformers runner
is for architectures we don't know natively: each request keeps the library's own cache, and nothing is paged.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from tunesmith.engine.attend import PagedAttention, Span
from tunesmith.engine.pages import PagedCache, PageTable
from tunesmith.engine.scheduler import Lease
from tunesmith.errors import RequestError
from tunesmith.model.decoder import Decoder
from tunesmith.model.language_model import LanguageModel

log = logging.getLogger(__name__)
PREFILL_TOKENS = 4096


class Runner(Protocol):
    """What the engine asks of a runner. Work is (lease, tokens not yet in the cache) per request."""

    max_model_len: int

    def open(self, max_tokens: int) -> Lease | None:
        """Room for a request of at most `max_tokens` positions, or None while there is none."""

    def step(self, work: Sequence[tuple[Any, list[int]]]) -> Tensor:
        """logits_BV of the last token of each request; its tokens are in the cache afterwards."""


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


class NativeRunner:
    """Our decoder over paged keys and values."""

    def __init__(self, model: Decoder, max_model_len: int, max_running: int = 1) -> None:
        self.model = model
        self.max_model_len = max_model_len
        self.max_tokens = max_running * max_model_len
        self.cache = self._make_cache()

    def _make_cache(self) -> PagedCache:
        weight = self.model.embedding.weight
        return PagedCache(self.model.config, self.max_tokens, dtype=self._dtype(), device=weight.device)

    def _dtype(self) -> torch.dtype:
        return self.model.compute_dtype or self.model.embedding.weight.dtype

    def open(self, max_tokens: int) -> PageTable | None:
        """A page table, or None while its worst case doesn't fit. A live model may have changed its compute dtype."""
        if not self.cache.tables and self.cache.dtype != self._dtype():
            self.cache = self._make_cache()
        return self.cache.open(max_tokens)

    def step(self, work: Sequence[tuple[PageTable, list[int]]]) -> Tensor:
        """logits_BV of each request's last token. A long prompt is computed in chunks before the others join."""
        with torch.inference_mode(), evaluating(self.model):
            batch = [(table, self._prefill(table, pending)) for table, pending in work]
            hidden_TD = self._hidden(batch)
            if hidden_TD.shape[0] > len(batch):
                ends = torch.tensor([len(pending) for _, pending in batch]).cumsum(0) - 1
                hidden_TD = hidden_TD[ends.to(hidden_TD.device)]
            return self.model.logits(hidden_TD)

    def _prefill(self, table: PageTable, pending: list[int]) -> list[int]:
        while len(pending) > PREFILL_TOKENS:
            self._hidden([(table, pending[:PREFILL_TOKENS])])
            pending = pending[PREFILL_TOKENS:]
        return pending

    def _hidden(self, batch: Sequence[tuple[PageTable, list[int]]]) -> Tensor:
        device = self.cache.device
        spans: list[Span] = []
        tokens: list[int] = []
        positions: list[int] = []
        for table, pending in batch:
            positions += range(table.length, table.length + len(pending))
            tokens += pending
            table.extend(len(pending))
            spans.append(Span.of(table, len(pending), device))
        tokens_T = torch.tensor(tokens, device=device)
        positions_T = torch.tensor(positions, device=device)
        return self.model(tokens_T, positions_T, PagedAttention(self.cache, spans))


@dataclass
class LibraryCache:
    """A request's hold on transformers' own cache object."""

    owner: TransformersRunner
    state: Any = None

    def close(self) -> None:
        """Drop the cache."""
        self.state = None
        self.owner.leases.discard(id(self))


class TransformersRunner:
    """Any causal language model of transformers, one request after the other, each with the library's cache."""

    def __init__(self, model: LanguageModel, library_model: Any, max_model_len: int) -> None:
        self.model = model
        self.library_model = library_model
        self.max_model_len = max_model_len
        self.leases: set[int] = set()
        accepted = inspect.signature(library_model.forward).parameters
        self.options = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}
        self.cache_name = "cache_params" if "cache_params" in accepted else "past_key_values"
        log.info("generation runs through transformers' own cache: its keys and values are not paged or counted")

    def open(self, max_tokens: int) -> LibraryCache | None:
        """Always room: the library allocates as it goes."""
        lease = LibraryCache(self)
        self.leases.add(id(lease))
        return lease

    def step(self, work: Sequence[tuple[LibraryCache, list[int]]]) -> Tensor:
        """logits_BV of each request's last token."""
        with torch.inference_mode(), evaluating(self.model):
            return torch.cat([self._one(lease, pending) for lease, pending in work])

    def _one(self, lease: LibraryCache, pending: list[int]) -> Tensor:
        device = next(iter(self.model.parameters())).device
        out = self.library_model(
            input_ids=torch.tensor([pending], device=device),
            use_cache=True,
            return_dict=True,
            **{self.cache_name: lease.state},
            **self.options,
        )
        lease.state = getattr(out, self.cache_name, None)
        if lease.state is None:
            raise RequestError(
                f"{type(self.library_model).__name__} returned no cache from transformers, so it can't generate here"
            )
        return out.logits[:, -1]
