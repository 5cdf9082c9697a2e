"""The steps for which kernels of attention over pages are compared, and which of them a step is most like."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import log

import numpy as np
import torch

from tunesmith.engine.config import EngineConfig
from tunesmith.engine.pages import PAGE_SLOTS, pages_of
from tunesmith.kernels.paged_step import HostLengths, PagedStep

DECODING, CONTEXTS = (1, 16, 256), (1024, 8192)
DRAFTS, PIECE = 16, 1024
"""At most so many new tokens of each request: guesses to verify. From so many of one on: a long prompt's piece."""


@dataclass(frozen=True)
class AttentionShape:
    """Requests of one kind: `num_requests` with `num_new` tokens and `context`, beside `decoding` of single tokens."""

    kind: str
    num_requests: int
    num_new: int
    context: int
    decoding: int = 0

    @property
    def label(self) -> str:
        """As it is stored and said."""
        beside = f" beside {self.decoding}" if self.decoding else ""
        new = f"x{self.num_new}" if self.kind != "decode" else ""
        return f"{self.kind} {self.num_requests}{new} over {self.context}{beside}"

    @property
    def num_rows(self) -> int:
        """Requests of both kinds."""
        return self.num_requests + self.decoding

    def host(self, num_pages: int) -> HostLengths:
        """Its lengths, a little apart, over `num_pages` pages in random order, and the last ones behind those.

        With fewer pages than it needs, requests have some together, but each has its last page to itself.
        """
        counts = np.array([1] * self.decoding + [self.num_new] * self.num_requests)
        contexts = np.maximum(self.context - np.arange(len(counts)) * 7 % 29, counts)
        shape, draw = (len(counts), pages_of(self.context)), np.random.default_rng(0)
        # Drawn each on its own: requests that go over the same pages in the same order would find them in the cache.
        own = draw.permutation(num_pages)[: shape[0] * shape[1]]
        pages = own if len(own) == shape[0] * shape[1] else draw.integers(num_pages, size=shape)
        tables, rows = pages.reshape(shape).astype(np.int32), np.arange(len(counts))
        tables[rows, -(-contexts // PAGE_SLOTS) - 1] = num_pages + rows
        return HostLengths(np.append(0, np.cumsum(counts)), contexts, tables)


def shapes_for(config: EngineConfig) -> list[AttentionShape]:
    """What an engine of these limits can meet."""
    longest, most = config.max_model_len, config.max_num_seqs
    contexts = sorted({min(context, longest) for context in CONTEXTS})
    found = [
        AttentionShape("decode", requests, 1, context)
        for requests in sorted({min(number, most) for number in DECODING})
        for context in contexts
    ]
    piece = min(2048, config.max_num_batched_tokens, max(1, longest // 2))
    short = min(256, piece)
    found += [
        AttentionShape("drafts", min(16, most), min(5, longest), min(1024, longest)),
        AttentionShape("prompts", 1, piece, min(3 * piece, longest)),
        AttentionShape("pieces", min(8, most), short, min(5 * short, longest)),
    ]
    if most > 1:
        found.append(AttentionShape("mixed", 1, piece, min(2 * piece, longest), decoding=min(63, most - 1)))
    return found


def nearest(step: PagedStep, shapes: Sequence[AttentionShape]) -> AttentionShape:
    """The measured shape of the step's kind that is nearest in requests and context."""
    kind = kind_of(step)
    alike = [shape for shape in shapes if shape.kind == kind] or list(shapes)
    return min(alike, key=lambda shape: _distance(step, shape))


def kind_of(step: PagedStep) -> str:
    """As `AttentionShape` has it."""
    if step.is_decode:
        return "decode"
    if step.max_query <= DRAFTS:
        return "drafts"
    if step.min_query <= 1 and step.num_requests > 1:
        return "mixed"
    return "prompts" if step.max_query >= PIECE else "pieces"


def _distance(step: PagedStep, shape: AttentionShape) -> float:
    requests = abs(log(step.num_requests / shape.num_rows))
    return requests + abs(log(max(1, step.max_context) / shape.context))


def step_of(shape: AttentionShape, num_pages: int, device: torch.device) -> PagedStep:
    """A step of this shape over so many pages."""
    host = shape.host(num_pages)
    starts, contexts, tables = (
        torch.from_numpy(np.ascontiguousarray(array, dtype=np.int32)).to(device)
        for array in (host.starts, host.contexts, host.tables)
    )
    least = 1 if shape.decoding else shape.num_new
    return PagedStep(tables, starts, contexts, shape.num_new, int(host.contexts.max()), least, host)


def pages_for(shapes: Sequence[AttentionShape], most: int) -> int:
    """Pages that the largest of these shapes needs, at most those of `most` tokens."""
    needed = max(shape.num_rows * pages_of(shape.context) for shape in shapes)
    return max(1, min(needed, most // PAGE_SLOTS))
