"""From a plan to the tensors of its step: numpy on the host, one buffer, one copy to the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from tunesmith.engine.batch import FreshTail, SampledRow, StepBatch
from tunesmith.engine.config import EngineConfig
from tunesmith.engine.moving import move
from tunesmith.engine.pages import PAGE_SLOTS, pages_of
from tunesmith.engine.scheduler import Scheduled, StepPlan
from tunesmith.engine.sequence import Sequence as Running
from tunesmith.kernels.paged_step import HostLengths
from tunesmith.units import ceil_div

_PAGE_BITS = PAGE_SLOTS.bit_length() - 1
_FEW_PARTS = 32
"""Steps of so many single tokens are put together number by number: each call of numpy costs as much as ten of them."""


@dataclass(frozen=True)
class HostBatch:
    """The same as StepBatch, in numpy: what `to_device` copies, and what is cut into passes of fixed size."""

    tokens: np.ndarray
    positions: np.ndarray
    slots: np.ndarray
    starts: np.ndarray
    contexts: np.ndarray
    tables: np.ndarray
    sequence_slots: np.ndarray
    sample_rows: np.ndarray
    adapters: np.ndarray | None
    score_rows: np.ndarray
    score_targets: np.ndarray
    num_scored_top: int
    is_decode: bool


class BatchBuilder:
    """Keeps each slot's page table in one array, so that a step only adds what is new."""

    def __init__(self, max_num_seqs: int, max_model_len: int, device: torch.device) -> None:
        self.device = device
        self.tables = np.zeros((max_num_seqs, pages_of(max_model_len)), dtype=np.int32)

    def build(self, plan: StepPlan, fixed_rows: int | None = None) -> tuple[StepBatch, list[SampledRow]]:
        """The plan's batch, and one row for each sampled row of it.

        fixed_rows: also cut the batch into passes of exactly this many rows (StepBatch.passes).
        """
        if fixed_rows is None and self.device.type == "cpu" and _is_plain_decode(plan.scheduled):
            return self._decode_batch(plan.scheduled)
        host = self.host_batch(plan.scheduled)
        batch = to_device(host, self.device)
        if fixed_rows is not None:
            passes = tuple(to_device(part, self.device) for part in cut(host, fixed_rows))
            batch = batch.with_passes(passes)
        return batch, _rows(plan.scheduled)

    def _decode_batch(self, parts: Sequence[Scheduled]) -> tuple[StepBatch, list[SampledRow]]:
        """`build` of few sequences that have one new token each, on a CPU."""
        rows: list[SampledRow] = []
        wide: list[list[int]] = [[], [], [], [], []]
        tokens, positions, places, slots, nexts = wide
        for part in parts:
            sequence, start = part.sequence, part.start
            slot, pages, ids = sequence.slot, sequence.pages, sequence.all_ids
            assert slot is not None and sequence.row is not None
            if sequence.num_tabled != len(pages):
                self._write_table(sequence)
            tokens.append(ids[start] if start < len(ids) else -1 - slot)
            positions.append(start)
            places.append(pages[start // PAGE_SLOTS] * PAGE_SLOTS + start % PAGE_SLOTS)
            slots.append(slot)
            nexts.append(start + 1)
            rows.append(sequence.row)
        num, longest = len(parts), max(nexts)
        numbers = torch.from_numpy(np.array([*wide, range(num)], dtype=np.int64))
        narrow = torch.from_numpy(np.array([*range(num + 1), *nexts], dtype=np.int32))
        tokens_T, positions_T, slots_T, sample_slots_B, next_B, sample_rows_B = numbers.unbind()
        batch = StepBatch(
            tokens_T=tokens_T,
            positions_T=positions_T,
            slots_T=slots_T,
            query_starts_R1=narrow[: num + 1],
            context_R=narrow[num + 1 :],
            block_tables_RP=torch.from_numpy(self.tables[slots, : pages_of(longest)]),
            max_query=1,
            min_query=1,
            max_context=longest,
            sample_rows_B=sample_rows_B,
            sample_slots_B=sample_slots_B,
            sample_positions_B=next_B,
            sequence_slots=slots,
            is_decode=True,
        )
        return batch, rows

    def host_batch(self, parts: Sequence[Scheduled]) -> HostBatch:
        """The arrays of a step."""
        for part in parts:
            sequence = part.sequence
            if sequence.num_tabled != len(sequence.pages):
                self._write_table(sequence)
        numbers = [(part.sequence.slot, part.start, part.num_tokens) for part in parts]
        slots, computed, counts = np.array(numbers, dtype=np.int64).T
        starts = np.zeros(len(parts) + 1, dtype=np.int64)
        np.cumsum(counts, out=starts[1:])
        positions = np.arange(starts[-1])
        positions -= np.repeat(starts[:-1] - computed, counts)
        # A token's page in the tables as one line of numbers: shifts and masks, since a division is ten times as slow.
        entries = positions >> _PAGE_BITS
        entries += np.repeat(slots * self.tables.shape[1], counts)
        places = self.tables.reshape(-1).take(entries).astype(np.int64)
        places <<= _PAGE_BITS
        places |= positions & (PAGE_SLOTS - 1)
        contexts = computed + counts
        sample_rows = _sampled(parts, starts)
        score_rows, score_targets, num_top = _scored(parts, starts)
        return HostBatch(
            tokens=_tokens(parts),
            positions=positions,
            slots=places,
            starts=starts,
            contexts=contexts,
            tables=self.tables[slots, : pages_of(int(contexts.max()))],
            sequence_slots=slots,
            sample_rows=sample_rows,
            adapters=_adapters(parts, counts),
            score_rows=score_rows,
            score_targets=score_targets,
            num_scored_top=num_top,
            is_decode=bool(len(sample_rows) == starts[-1] == len(parts)),
        )

    def _write_table(self, sequence: Running) -> None:
        new = sequence.pages[sequence.num_tabled :]
        self.tables[sequence.slot, sequence.num_tabled : len(sequence.pages)] = new
        sequence.num_tabled = len(sequence.pages)


def _is_plain_decode(parts: Sequence[Scheduled]) -> bool:
    """Whether few sequences have one new token each that is drawn, and nothing else is to be done."""
    if len(parts) > _FEW_PARTS:
        return False
    for part in parts:
        sequence = part.sequence
        if part.num_tokens != 1 or not part.samples or sequence.adapter_index >= 0 or sequence.is_scored:
            return False
    return True


def _rows(parts: Sequence[Scheduled]) -> list[SampledRow]:
    """One for each row that is drawn."""
    rows: list[SampledRow] = []
    for part in parts:
        row = part.sequence.row
        assert row is not None
        if part.num_drafts:
            rows += [row] * part.num_rows
        elif part.samples:
            rows.append(row)
    return rows


def _tokens(parts: Sequence[Scheduled]) -> np.ndarray:
    """The new tokens of all parts; one that is on the device only is named by its slot (see batch.py)."""
    pieces: list[np.ndarray] = []
    tokens: list[int] = []
    for part in parts:
        sequence, start = part.sequence, part.start
        ids = sequence.all_ids
        if part.num_tokens == 1:
            tokens.append(ids[start] if start < len(ids) else -1 - (sequence.slot or 0))
        elif start + part.num_tokens <= sequence.num_prompt:
            if tokens:
                pieces.append(np.array(tokens, dtype=np.int64))
                tokens = []
            pieces.append(sequence.request.prompt_tokens[start : start + part.num_tokens])
        else:
            tokens += _beyond_prompt(part)
    pieces.append(np.array(tokens, dtype=np.int64))
    return np.concatenate(pieces)


def _beyond_prompt(part: Scheduled) -> list[int]:
    """Several tokens of one sequence, some of which may be guesses, or not known yet."""
    sequence, start = part.sequence, part.start
    tokens = sequence.all_ids[start : start + part.num_tokens]
    if part.num_tokens - len(tokens) > part.num_drafts:
        tokens.append(-1 - (sequence.slot or 0))
    return tokens + sequence.drafts[: part.num_drafts]


def _sampled(parts: Sequence[Scheduled], starts: np.ndarray) -> np.ndarray:
    """The rows that are drawn: of each part that samples its last one, and with drafts as many before it."""
    last = starts[1:] - 1
    if all(part.samples and not part.num_drafts for part in parts):
        return last
    ends = starts[1:].tolist()
    rows = [row for part, end in zip(parts, ends, strict=True) for row in range(end - part.num_rows, end)]
    return np.array(rows, dtype=np.int64)


def _adapters(parts: Sequence[Scheduled], counts: np.ndarray) -> np.ndarray | None:
    if all(part.sequence.adapter_index < 0 for part in parts):
        return None
    return np.repeat(np.array([part.sequence.adapter_index for part in parts], dtype=np.int32), counts)


def _scored(parts: Sequence[Scheduled], starts: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
    """Rows whose next token is a prompt's token that has no log-probability yet, those tokens, and the most likely
    ones beside each that the most demanding of these prompts asks for."""
    rows: list[int] = []
    targets: list[int] = []
    num_top = 0
    for place, part in enumerate(parts):
        sequence = part.sequence
        if not sequence.is_scored or not sequence.wants_prompt_scores:
            continue
        first = max(part.start, sequence.num_scored)
        stop = max(first, min(part.start + part.num_tokens, sequence.num_prompt - 1))
        part.num_scored, sequence.num_scored = stop - first, stop
        start = int(starts[place]) - part.start
        rows += range(start + first, start + stop)
        targets += sequence.all_ids[first + 1 : stop + 1]
        num_top = max(num_top, sequence.request.params.prompt_logprobs or 0)
    return np.array(rows, dtype=np.int64), np.array(targets, dtype=np.int64), num_top


def to_device(host: HostBatch, device: torch.device) -> StepBatch:
    """Copy a batch over, in one buffer; nothing waits for it."""
    sample_rows = host.sample_rows
    owner = np.searchsorted(host.starts, sample_rows, side="right") - 1
    wide = [host.tokens, host.positions, host.slots, sample_rows, host.sequence_slots[owner]]
    wide += [host.positions[sample_rows] + 1, host.score_rows, host.score_targets]
    narrow = [host.starts, host.contexts, host.tables] + ([] if host.adapters is None else [host.adapters])
    arrays = [a.astype(np.int64, copy=False) for a in wide] + [a.astype(np.int32, copy=False) for a in narrow]
    counts = np.diff(host.starts)
    moved = move(arrays, device)
    is_scored = len(host.score_rows) > 0
    return StepBatch(
        tokens_T=moved[0],
        positions_T=moved[1],
        slots_T=moved[2],
        sample_rows_B=moved[3],
        sample_slots_B=moved[4],
        sample_positions_B=moved[5],
        score_rows=moved[6] if is_scored else None,
        score_targets=moved[7] if is_scored else None,
        query_starts_R1=moved[8],
        context_R=moved[9],
        block_tables_RP=moved[10],
        adapter_T=None if host.adapters is None else moved[11],
        token_adapters=host.adapters,
        max_query=int(counts.max()),
        min_query=int(counts.min()),
        max_context=int(host.contexts.max()),
        sequence_slots=host.sequence_slots.tolist(),
        is_decode=host.is_decode,
        num_scored_top=host.num_scored_top,
        fresh=None if host.is_decode else _fresh_tail(host, counts),
        host=HostLengths(host.starts, host.contexts, host.tables),
    )


def _fresh_tail(host: HostBatch, counts: np.ndarray) -> FreshTail | None:
    """The last requests that have as many new tokens as context."""
    others = np.flatnonzero(counts != host.contexts)
    num_before = int(others[-1]) + 1 if len(others) else 0
    if num_before == len(counts):
        return None
    return FreshTail(
        lengths=tuple(counts[num_before:].tolist()),
        num_before=num_before,
        max_query=int(counts[:num_before].max(initial=1)),
        max_context=int(host.contexts[:num_before].max(initial=1)),
    )


def cut(host: HostBatch, rows: int) -> list[HostBatch]:
    """The batch as passes of exactly `rows` rows, in order, each row a sequence of its own with one new token.

    So no product and no attention sees how many tokens there are: every shape is the same for every token. What came
    before in its sequence is in the pages, written by this pass or an earlier one. The last pass is filled with padding
    that is written nowhere.
    """
    owner = np.repeat(np.arange(len(host.contexts)), np.diff(host.starts))
    return [_pass(host, owner, first, rows) for first in range(0, len(host.tokens), rows)]


def _pass(host: HostBatch, owner: np.ndarray, first: int, rows: int) -> HostBatch:
    here = slice(first, min(first + rows, len(host.tokens)))
    pad = rows - (here.stop - here.start)
    positions = _padded(host.positions[here], pad, 0)
    none = np.zeros(0, dtype=np.int64)
    return HostBatch(
        tokens=_padded(host.tokens[here], pad, 0),
        positions=positions,
        slots=_padded(host.slots[here], pad, -1),
        starts=np.arange(rows + 1),
        contexts=positions + 1,
        tables=host.tables[_padded(owner[here], pad, 0)],
        sequence_slots=host.sequence_slots[_padded(owner[here], pad, 0)],
        sample_rows=none,
        adapters=None if host.adapters is None else _padded(host.adapters[here], pad, -1),
        score_rows=none,
        score_targets=none,
        num_scored_top=0,
        is_decode=True,
    )


SMALL_PROMPTS, SMALL_CONTEXT = (75, 200, 600), 100
"""Tokens of prompts: kernels are cut in other ways for some tens, some hundreds and more of them."""

USUAL_PROMPT = 450


def worst_batches(config: EngineConfig) -> list[HostBatch]:
    """The largest step of prompts there can be, and the largest of decoding at full context. All pages are page 0, and
    nothing is written: for measuring."""
    full, rest = divmod(config.max_num_batched_tokens, config.max_model_len)
    counts = ([config.max_model_len] * full + ([rest] if rest else []))[: config.max_num_seqs]
    return [_worst(np.array(counts), np.array(counts)), decode_batch(config.max_num_seqs, config.max_model_len)]


def decode_batch(num_requests: int, context: int) -> HostBatch:
    """A step of so many requests that decode, all with this context; for measuring too."""
    return _worst(np.ones(num_requests, dtype=np.int64), context)


def small_batches(config: EngineConfig) -> list[HostBatch]:
    """Small steps of every kind: one request that decodes and many, alone and beside a prompt, with short and with the
    longest contexts. What they launch is compiled before anyone waits for it. Nothing is written."""
    longest, most = config.max_model_len, config.max_num_seqs
    found = []
    for requests in sorted({1, max(1, most - 1)}):
        room = min(longest, config.max_num_batched_tokens - requests) if requests < most else 0
        beside = [[], *([prompt] for prompt in sorted({min(prompt, room) for prompt in SMALL_PROMPTS} - {0}))]
        for context in sorted({min(SMALL_CONTEXT, longest), longest}):
            found += [
                _worst(np.array([1] * requests + prompts), context) for prompts in beside if sum(prompts) <= context
            ]
    return found


def many_prompts(config: EngineConfig) -> HostBatch:
    """A full step of whole prompts of the usual kind: many, and hardly two of one length. Nothing is written."""
    most = config.max_num_batched_tokens
    num = min(config.max_num_seqs, ceil_div(most, min(USUAL_PROMPT, config.max_model_len)))
    counts = np.full(num, min(most // num, config.max_model_len))
    counts -= np.arange(num) % min(16, int(counts[0]))
    return _worst(counts, counts)


def _worst(counts: np.ndarray, contexts: np.ndarray | int) -> HostBatch:
    starts = np.append(0, np.cumsum(counts))
    owner = np.repeat(np.arange(len(counts)), counts)
    contexts = np.broadcast_to(contexts, counts.shape)
    none = np.zeros(0, dtype=np.int64)
    return HostBatch(
        tokens=np.zeros(starts[-1], dtype=np.int64),
        positions=np.arange(starts[-1]) - (starts[1:] - contexts)[owner],
        slots=np.full(starts[-1], -1),
        starts=starts,
        contexts=contexts,
        tables=np.zeros((len(counts), pages_of(int(contexts.max()))), dtype=np.int32),
        sequence_slots=np.arange(len(counts)),
        sample_rows=starts[1:] - 1,
        adapters=None,
        score_rows=none,
        score_targets=none,
        num_scored_top=0,
        is_decode=False,
    )


def _padded(values: np.ndarray, num: int, value: int) -> np.ndarray:
    return np.pad(values, (0, num), constant_values=value) if num else values
