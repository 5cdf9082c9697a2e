"""What sampling keeps on the device: parameters, last tokens and counts by slot, and the plan of a step's rows.

SampledRow --(enters its slot: one copy for all new ones)--> tables by slot
rows of a step --plan--> SamplingPlan (kept while the rows are the same objects)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tunesmith.engine.batch import SampledRow
from tunesmith.engine.moving import move
from tunesmith.engine.request import SamplingParams

GREEDY_BELOW = 1e-5
"""Temperatures below this are greedy."""
FIRST_PLACES = 8
_FLOATS = ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty")
_INTS = ("seed", "top_k", "num_prompt", "min_tokens")


@dataclass(frozen=True)
class Penalised:
    """The rows whose logits depend on tokens seen so far: rows [M] of the step, and their places in the counts [M]."""

    rows: Tensor
    places: Tensor


@dataclass(frozen=True)
class Entries:
    """Single logits that are changed: (row, token) pairs, and the bias of each (minus infinity: not to be drawn)."""

    rows: Tensor
    tokens: Tensor
    biases: Tensor


@dataclass(frozen=True)
class SamplingPlan:
    """What has to be done for the rows of a step, in their order. The tensors are on the device.

    is_greedy: every row takes its largest logit. is_plain: nothing but temperatures matter, so that a recorded graph
    can choose. filtered, reported: rows with top-k, top-p or min-p; that want log-probabilities. places_B, mask_rows_B:
    each row's place in the counts, and its row among the masks, -1 for none; None where no logit is changed.
    has_order: a filtered row has top-k or top-p. num_top: tokens beside each reported one, by reported row.
    """

    rows: tuple[SampledRow, ...]
    is_greedy: bool
    is_plain: bool
    filtered: Tensor | None
    has_order: bool
    penalised: Penalised | None
    biased: Entries | None
    not_yet: Entries | None
    has_masks: bool
    places_B: Tensor | None
    mask_rows_B: Tensor | None
    reported: Tensor | None
    reported_rows: tuple[int, ...]
    num_top: tuple[int, ...]


def _plain_plan(rows: tuple[SampledRow, ...], is_greedy: bool) -> SamplingPlan:
    """Of rows for which nothing but temperatures matter: what `_make_plan` finds after having looked at each."""
    return SamplingPlan(
        rows=rows,
        is_greedy=is_greedy,
        is_plain=True,
        filtered=None,
        has_order=False,
        penalised=None,
        biased=None,
        not_yet=None,
        has_masks=False,
        places_B=None,
        mask_rows_B=None,
        reported=None,
        reported_rows=(),
        num_top=(),
    )


def is_greedy(params: SamplingParams) -> bool:
    """Whether no noise is added: the largest logit, after penalties and masks, is taken."""
    return params.temperature < GREEDY_BELOW or params.top_k == 1


def needs_counts(params: SamplingParams) -> bool:
    """Whether a row's logits depend on how often tokens were seen (drafts can't be verified in one step then)."""
    return params.presence_penalty != 0 or params.frequency_penalty != 0 or params.repetition_penalty != 1


class SamplingState:
    """Tables by slot, on one device. There is one slot more than asked for, `padding_slot`: greedy, for padding rows.

    last_tokens_N: int64, the token drawn last for each slot (never below zero, so that it can be embedded).
    """

    def __init__(self, num_slots: int, vocab_size: int, device: torch.device) -> None:
        self.vocab_size = vocab_size
        self.device = device
        self.padding_slot = num_slots
        self.last_tokens_N = torch.zeros(num_slots + 1, dtype=torch.int64, device=device)
        self.floats_PN = torch.zeros(len(_FLOATS), num_slots + 1, device=device)
        self.ints_PN = torch.zeros(len(_INTS), num_slots + 1, dtype=torch.int64, device=device)
        self.counts = Counts(vocab_size, device)
        self._entered: dict[int, SampledRow] = {}
        self._usual: dict[int, tuple[bool, bool]] = {}  # of those rows: asks for temperatures alone, is greedy
        self._plan: SamplingPlan | None = None
        self.has_new_rows = False

    def release(self, slot: int) -> None:
        """A sequence has left this slot."""
        self._entered.pop(slot, None)
        self._usual.pop(slot, None)
        self.counts.free(slot)

    def plan(self, rows: Sequence[SampledRow]) -> SamplingPlan:
        """The plan of these rows; the last one again where they are the same objects in the same order.

        `has_new_rows` says then whether the tables had to be written for one of them.
        """
        last, self.has_new_rows = self._plan, False
        given = tuple(rows)
        if last is not None and last.rows == given:  # rows are equal where they are the same
            return last
        unique = dict.fromkeys(given)
        own = [row for row in unique if not row.drafted]
        self._enter([row for row in own if self._entered.get(row.slot) is not row])
        self.counts.follow([row for row in given if row.drafted], self)
        usual = [self._usual[row.slot] for row in own] if len(own) == len(unique) else [(False, False)]
        are_plain = all(is_plain for is_plain, _ in usual)
        self._plan = _plain_plan(given, all(greedy for _, greedy in usual)) if are_plain else self._make_plan(given)
        return self._plan

    def _enter(self, new: Sequence[SampledRow]) -> None:
        """Put new rows' parameters into the tables: one copy for the numbers of all of them."""
        self.has_new_rows = bool(new)
        if not new:
            return
        numbers = np.array([row.slot for row in new], dtype=np.int64)
        floats = np.array([[_float(row.params, name) for row in new] for name in _FLOATS], dtype=np.float32)
        ints = np.array([[_int(row, name) for row in new] for name in _INTS], dtype=np.int64)
        slots_M, floats_PM, ints_PM = move([numbers, floats, ints], self.device)
        self.floats_PN.index_copy_(1, slots_M, floats_PM)
        self.ints_PN.index_copy_(1, slots_M, ints_PM)
        for row in new:
            self._entered[row.slot] = row
            self._usual[row.slot] = self._is_usual(row), is_greedy(row.params)
            if needs_counts(row.params):
                self.counts.fill(row.slot, row.seen_ids[: row.num_prompt], row.seen_ids[row.num_prompt :], self)
            else:
                self.counts.free(row.slot)

    def _is_usual(self, row: SampledRow) -> bool:
        """Whether nothing but the temperature matters for a row: a plan of such rows needs no look at each of them."""
        params = row.params
        if needs_counts(params) or params.logit_bias or params.min_tokens or params.logprobs is not None:
            return False
        is_filtered = params.top_p < 1 or 0 < params.top_k < self.vocab_size or params.min_p > 0
        return not row.has_grammar and (is_greedy(params) or not is_filtered)

    def _make_plan(self, rows: tuple[SampledRow, ...]) -> SamplingPlan:
        params = [row.params for row in rows]
        penalised = [i for i, p in enumerate(params) if needs_counts(p)]
        drawn = [i for i, p in enumerate(params) if not is_greedy(p)]
        ordered = [i for i in drawn if params[i].top_p < 1 or 0 < params[i].top_k < self.vocab_size]
        filtered = [i for i in drawn if i in set(ordered) or params[i].min_p > 0]
        reported = [i for i, p in enumerate(params) if p.logprobs is not None]
        masked = [i for i, row in enumerate(rows) if row.has_grammar]
        biases = [
            (i, token, bias)
            for i, p in enumerate(params)
            for token, bias in (p.logit_bias or {}).items()
            if 0 <= token < self.vocab_size
        ]
        stops = [
            (i, token, -torch.inf)
            for i, row in enumerate(rows)
            if row.params.min_tokens
            for token in sorted(row.stop_ids)
            if 0 <= token < self.vocab_size
        ]
        is_changed = bool(penalised or biases or stops or masked)
        places = [self.counts.place(row) if needs_counts(row.params) else -1 for row in rows]
        mask_of = {i: number for number, i in enumerate(masked)}
        mask_rows = [mask_of.get(i, -1) for i in range(len(rows))]
        return SamplingPlan(
            rows=rows,
            is_greedy=not drawn,
            is_plain=not (filtered or is_changed or reported),
            filtered=self._index(filtered),
            has_order=bool(ordered),
            penalised=self._penalised(rows, penalised),
            biased=self._entries(biases),
            not_yet=self._entries(stops),
            has_masks=bool(masked),
            places_B=self.tensor(places, torch.int64) if is_changed else None,
            mask_rows_B=self.tensor(mask_rows, torch.int64) if is_changed else None,
            reported=self._index(reported),
            reported_rows=tuple(reported),
            num_top=tuple(params[i].logprobs or 0 for i in reported),
        )

    def _penalised(self, rows: Sequence[SampledRow], which: list[int]) -> Penalised | None:
        if not which:
            return None
        places = [self.counts.place(rows[i]) for i in which]
        return Penalised(self.tensor(which, torch.int64), self.tensor(places, torch.int64))

    def _entries(self, entries: list[tuple[int, int, float]]) -> Entries | None:
        if not entries:
            return None
        rows, tokens, biases = zip(*entries, strict=True)
        ids = self.tensor([rows, tokens], torch.int64)
        return Entries(ids[0], ids[1], self.tensor(biases, torch.float32))

    def _index(self, which: list[int]) -> Tensor | None:
        return self.tensor(which, torch.int64) if which else None

    def tensor(self, values: Sequence[object], dtype: torch.dtype) -> Tensor:
        """Numbers of the host on the device; nothing waits for the copy."""
        return self.moved(torch.tensor(values, dtype=dtype))

    def moved(self, host: Tensor) -> Tensor:
        """A tensor of the host on the device; nothing waits for the copy."""
        if self.device.type != "cuda":
            return host.to(self.device)
        return host.pin_memory().to(self.device, non_blocking=True)


class Counts:
    """How often each token occurs in the answers that have penalties, and whether it occurs in their prompts.

    Only sequences with penalties have a place: [places, V] in 3 bytes an entry, doubled when all are taken.
    """

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self.places: dict[int, int] = {}
        self.answers_NV = torch.zeros(0, vocab_size, dtype=torch.int16, device=device)
        self.prompts_NV = torch.zeros(0, vocab_size, dtype=torch.bool, device=device)
        self._guessed: dict[tuple[int, int], int] = {}
        self._free: list[int] = []

    def place(self, row: SampledRow) -> int:
        """Where a row's counts are."""
        return self._guessed[row.slot, len(row.drafted)] if row.drafted else self.places[row.slot]

    def follow(self, rows: Sequence[SampledRow], state: SamplingState) -> None:
        """Rows behind guesses have places of their own until the next ones come: what was seen before the guesses, and
        the guesses. The first has been counted already."""
        self._free += self._guessed.values()
        self._guessed.clear()
        for row in rows:
            place, own = self._take(), self.places[row.slot]
            self._guessed[row.slot, len(row.drafted)] = place
            ids = state.tensor(row.drafted, torch.int64)
            self.prompts_NV[place].copy_(self.prompts_NV[own])
            self.answers_NV[place].copy_(self.answers_NV[own])
            self.answers_NV[place].index_add_(0, ids, torch.ones_like(ids, dtype=torch.int16))

    def _take(self) -> int:
        if not self._free:
            self._grow()
        return self._free.pop()

    def free(self, slot: int) -> None:
        """The slot's sequence has no place any more."""
        place = self.places.pop(slot, None)
        if place is not None:
            self._free.append(place)

    def fill(self, slot: int, prompt: Sequence[int], answer: Sequence[int], state: SamplingState) -> None:
        """Count a sequence from the beginning."""
        self.free(slot)
        place = self.places[slot] = self._take()
        self.prompts_NV[place].zero_().index_fill_(0, state.tensor(prompt, torch.int64), True)
        ids = state.tensor(answer, torch.int64)
        self.answers_NV[place].zero_().index_add_(0, ids, torch.ones_like(ids, dtype=torch.int16))

    def add(self, places_M: Tensor, tokens_M: Tensor) -> None:
        """Count a token of each answer; tokens below zero count as token 0 (their requests have failed)."""
        flat = places_M * self.answers_NV.shape[1] + tokens_M.clamp(min=0)
        self.answers_NV.view(-1).index_add_(0, flat, torch.ones_like(flat, dtype=torch.int16))

    def _grow(self) -> None:
        num, vocab_size = self.answers_NV.shape
        more = max(FIRST_PLACES, num)
        self.answers_NV = torch.cat([self.answers_NV, self.answers_NV.new_zeros(more, vocab_size)])
        self.prompts_NV = torch.cat([self.prompts_NV, self.prompts_NV.new_zeros(more, vocab_size)])
        self._free.extend(range(num, num + more))


def _float(params: SamplingParams, name: str) -> float:
    if name == "temperature":
        return 0.0 if is_greedy(params) else params.temperature
    return float(getattr(params, name))


def _int(row: SampledRow, name: str) -> int:
    if name in ("seed", "num_prompt"):
        return int(getattr(row, name))
    return int(getattr(row.params, name))
