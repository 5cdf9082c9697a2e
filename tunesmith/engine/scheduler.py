"""Who runs next: one budget of tokens a step, which decoding requests and pieces of prompts share.

    submit -> waiting (by priority, then arrival) -> admitted: slot, shared prefix, pages -> running -> finish or abort
                 ^                                                                              |
                 +---------------- preempted: pages given back, tokens kept, computed anew <----+

A request is admitted when the pages that it needs now are free, not its worst case. When pages run out, the request
that runs and would be served last gives all of its pages back and waits again.
"""

from __future__ import annotations

from bisect import insort
from dataclasses import dataclass, field

from tunesmith.engine.config import EngineConfig
from tunesmith.engine.pages import PAGE_SLOTS, PageAllocator, pages_of
from tunesmith.engine.prefix import PrefixCache
from tunesmith.engine.sequence import Sequence

# Pages kept free at admission while others run, so that their growth doesn't preempt at once what was just admitted.
ADMISSION_RESERVE = 0.01


@dataclass(eq=False, slots=True)
class Scheduled:
    """One sequence's part of a step: `num_tokens` tokens from position `start` on.

    samples: whether its last tokens' next one is drawn; False for a piece of a prompt that ends before its end.
    num_drafts: how many of the tokens, the last ones, are guesses to be verified; then num_drafts + 1 rows are drawn.
    num_scored: rows whose next token's log-probability is asked for (a prompt's; set as the batch is built).
    """

    sequence: Sequence
    start: int
    num_tokens: int
    samples: bool
    num_drafts: int = 0
    num_scored: int = 0

    @property
    def num_rows(self) -> int:
        """Rows whose next token is drawn."""
        return self.num_drafts + 1 if self.samples else 0


@dataclass
class StepPlan:
    """What one step computes, in the order of its batch."""

    scheduled: list[Scheduled] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.scheduled)

    @property
    def num_tokens(self) -> int:
        """Tokens of the step."""
        return sum(part.num_tokens for part in self.scheduled)


class Scheduler:
    """Waiting and running sequences, their slots and their pages. `plan` is called once a step."""

    def __init__(self, config: EngineConfig, pages: PageAllocator, prefix: PrefixCache | None) -> None:
        self.config = config
        self.pages = pages
        self.prefix = prefix
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.sequences: dict[int, Sequence] = {}
        self.free_slots = list(range(config.max_num_seqs - 1, -1, -1))
        self.left_slots: list[int] = []
        self.num_preempted = 0
        self.prefix_queries_tokens = 0
        self.prefix_hits_tokens = 0
        self.admitted: list[Sequence] = []

    @property
    def has_work(self) -> bool:
        """Whether anything waits or runs."""
        return bool(self.waiting or self.running)

    def submit(self, sequence: Sequence) -> None:
        """Put a sequence among those that wait, behind all that go before it."""
        self.sequences[sequence.request.id] = sequence
        insort(self.waiting, sequence, key=_rank)

    def find(self, request_id: int) -> Sequence | None:
        """The waiting or running sequence of a request, or None."""
        return self.sequences.get(request_id)

    def finish(self, sequence: Sequence) -> None:
        """Take a sequence out, wherever it is, and give its pages and its slot back."""
        sequence.is_finished = True
        del self.sequences[sequence.request.id]
        if sequence.slot is None:
            self.waiting.remove(sequence)
        else:
            self.running.remove(sequence)
            self._leave(sequence)

    def plan(self) -> StepPlan:
        """The next step: decoding sequences first, then prompts that have begun, then new ones, within the budget."""
        step = _Step(self.config.max_num_batched_tokens)
        prompts = self._decode(step)
        for sequence in prompts:
            # One that ran may have been preempted for another.
            if step.budget > 0 and sequence.slot is not None:
                self._grow(step, sequence)
        grown = list(step.parts.values())
        self._admit(step)
        # Only now is it sure that they are computed: one that is admitted may have displaced them.
        for part in grown:
            sequence = part.sequence
            if sequence.num_computed - sequence.num_remembered * PAGE_SLOTS >= PAGE_SLOTS and sequence.slot is not None:
                self.remember(sequence)
        return StepPlan(list(step.parts.values()))

    def _decode(self, step: _Step) -> list[Sequence]:
        """Add all that decode to the step; those that run and have more than one token to compute are given back.

        Written for a loop over hundreds: the usual case, one token and a page that has room, is all in here.
        """
        prompts, parts = [], step.parts
        for sequence in list(self.running):
            start, in_flight = sequence.num_computed, sequence.in_flight
            known = len(sequence.all_ids)
            if known + in_flight >= sequence.limit:
                continue  # its last token is in flight
            if known + in_flight - start != 1:
                prompts.append(sequence)
            elif step.budget <= 0 or sequence.slot is None:
                continue
            elif sequence.drafts or start == len(sequence.pages) * PAGE_SLOTS:
                self._grow(step, sequence)
            else:
                parts[sequence.request_id] = Scheduled(sequence, start, 1, True)
                step.budget -= 1
                sequence.num_computed, sequence.in_flight = start + 1, in_flight + 1
        return prompts

    def _grow(self, step: _Step, sequence: Sequence) -> None:
        """Add a running sequence to the step, at the cost of those that would be served last."""
        num_drafts = len(sequence.drafts) if sequence.num_missing == 1 else 0
        num_tokens = min(sequence.num_missing + num_drafts, step.budget)
        needed = pages_of(sequence.num_computed + num_tokens) - len(sequence.pages)
        if num_drafts and needed > self.pages.num_free:  # nobody gives way to guesses
            num_tokens = 1
            needed = pages_of(sequence.num_computed + 1) - len(sequence.pages)
        while needed > self.pages.num_free:
            victim = self.running[-1]
            self._preempt(step, victim)
            if victim is sequence:
                return
        self._take(sequence, needed)
        self._schedule(step, sequence, num_tokens)

    def _admit(self, step: _Step) -> None:
        """Let waiting sequences in, in order, while there is budget, a slot and pages."""
        place = 0
        while step.budget > 0 and place < len(self.waiting):
            sequence = self.waiting[place]
            if sequence.is_at_limit or not sequence.is_ready:
                place += 1  # its last token is on the way; or its grammar or adapter is
                continue
            # One preempted a moment ago, whose last token is not known yet, keeps its turn: nobody takes its pages.
            if sequence.in_flight or not self._has_seat(step, sequence) or not self._enter(step, sequence):
                return

    def _has_seat(self, step: _Step, sequence: Sequence) -> bool:
        """A free slot, made free by one that comes after this one in priority where needed."""
        if not self.free_slots and self._yields(sequence):
            self._preempt(step, self.running[-1])
        return bool(self.free_slots)

    def _yields(self, sequence: Sequence) -> bool:
        """Whether the last of those that run has a lower priority than this one (arrival alone displaces nobody)."""
        return bool(self.running) and self.running[-1].request.priority > sequence.request.priority

    def _enter(self, step: _Step, sequence: Sequence) -> bool:
        """Admit a sequence with its first tokens, or not."""
        while True:
            found = self._lookup(sequence)
            num_cached = len(found) * PAGE_SLOTS
            num_tokens = min(len(sequence.all_ids) - num_cached, step.budget)
            needed = pages_of(num_cached + num_tokens) - len(found)
            revived = sum(not self.pages.counts[page] for page in found)
            reserve = int(self.pages.num_pages * ADMISSION_RESERVE) if self.running else 0
            if needed + revived + reserve <= self.pages.num_free:
                break
            if not self._yields(sequence):
                return False
            self._preempt(step, self.running[-1])
        self.waiting.remove(sequence)
        insort(self.running, sequence, key=_rank)
        for page in found:
            self.pages.share(page)
        sequence.pages, sequence.num_computed = found, num_cached
        sequence.num_remembered = len(found)
        sequence.enter(self.free_slots.pop())
        self._count(sequence, num_cached)
        self._take(sequence, needed)
        self._schedule(step, sequence, num_tokens)
        # Every layer writes a step's keys before a query reads them, so even requests of one step share. (Nothing takes
        # this one out of the step again: those that are looked at after it come after it in priority.)
        self.remember(sequence)
        return True

    def _lookup(self, sequence: Sequence) -> list[int]:
        if self.prefix is None or sequence.wants_prompt_scores:
            return []
        return self.prefix.lookup(sequence.chain, sequence.all_ids)

    def _count(self, sequence: Sequence, num_cached: int) -> None:
        if sequence.was_admitted:
            return
        sequence.was_admitted, sequence.num_cached = True, num_cached
        self.admitted.append(sequence)
        if self.prefix is not None:
            self.prefix_queries_tokens += sequence.num_prompt
            self.prefix_hits_tokens += num_cached

    def _take(self, sequence: Sequence, num_pages: int) -> None:
        sequence.pages += self.pages.take_run(num_pages, sequence.pages[-1] if sequence.pages else None)

    def _schedule(self, step: _Step, sequence: Sequence, num_tokens: int) -> None:
        """Plan `num_tokens` more tokens, for which the pages are there."""
        missing = sequence.num_missing
        samples = num_tokens >= missing
        num_drafts = max(0, num_tokens - missing)
        step.add(Scheduled(sequence, sequence.num_computed, num_tokens, samples, num_drafts))
        sequence.drafts = sequence.drafts[:num_drafts]
        sequence.num_computed += num_tokens
        sequence.in_flight += samples

    def remember(self, sequence: Sequence) -> None:
        """Tell the prefix cache of full pages whose tokens are known."""
        if self.prefix is None:
            return
        num_sure = min(sequence.num_computed - len(sequence.drafts), len(sequence.all_ids))
        first, last = sequence.num_remembered, num_sure // PAGE_SLOTS
        if last > first:
            self.prefix.remember(sequence.chain, sequence.all_ids, first, sequence.pages[first:last])
            sequence.num_remembered = last

    def _preempt(self, step: _Step, sequence: Sequence) -> None:
        """Take a running sequence's pages; it waits again with the tokens that it has."""
        step.drop(sequence)
        self.running.remove(sequence)
        self._leave(sequence)
        self.num_preempted += 1
        insort(self.waiting, sequence, key=_rank)

    def _leave(self, sequence: Sequence) -> None:
        self.pages.release_all(sequence.pages)
        slot = sequence.leave()
        self.free_slots.append(slot)
        self.left_slots.append(slot)

    def check(self) -> None:
        """Raise ValueError unless every page and every slot is accounted for."""
        self.pages.check(sequence.pages for sequence in self.running)
        slots = [sequence.slot for sequence in self.running] + self.free_slots
        if sorted(slots) != list(range(self.config.max_num_seqs)):  # type: ignore[type-var]
            raise ValueError(f"slot accounting is broken: {len(self.running)} run, {len(self.free_slots)} are free")
        if any(sequence.pages for sequence in self.waiting):
            raise ValueError("page accounting is broken: a waiting request holds pages")


class _Step:
    """A step that is being planned."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.parts: dict[int, Scheduled] = {}

    def add(self, part: Scheduled) -> None:
        self.parts[part.sequence.request.id] = part
        self.budget -= part.num_tokens

    def drop(self, sequence: Sequence) -> None:
        """Take a sequence out again, as if it had not been planned."""
        part = self.parts.pop(sequence.request.id, None)
        if part is not None:
            self.budget += part.num_tokens
            sequence.in_flight -= part.samples


def _rank(sequence: Sequence) -> tuple[int, int]:
    return sequence.request.rank
