"""From logits to tokens, on the device: penalties, biases and masks, then the draw; nothing waits for the device.

    logits_BV -> chosen tokens' log-probabilities are of these
      -> repetition, presence, frequency penalties, logit bias, stop tokens that are too early, the grammar's bitmask
      -> / temperature -> min-p, top-k, top-p -> the largest of what is left plus the noise of (seed, position)

A row's token depends on its own logits, parameters and position alone: not on the batch, nor on what ran before.
Penalties are vLLM's and OpenAI's: presence and frequency count the answer's tokens, repetition the prompt's too.
Behind a guess a row with penalties counts it as seen (`SampledRow.drafted`).
"""

from __future__ import annotations

import ctypes
import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tunesmith.engine.batch import SampledRow
from tunesmith.engine.logprobs import LogprobTensors, chosen_and_top, to_host
from tunesmith.engine.request import TokenLogprobs
from tunesmith.engine.sampling_state import Entries, SamplingPlan, SamplingState
from tunesmith.kernels.chip import is_gpu
from tunesmith.kernels.sampling import choose, choose_greedily, find_thresholds
from tunesmith.kernels.sampling_logits import Allowed, Seen, change_logits
from tunesmith.kernels.sampling_native import NativeDraw
from tunesmith.kernels.sampling_noise import BROKEN
from tunesmith.units import ceil_div

__all__ = ["BROKEN", "Sampled", "Sampling", "SamplingState", "draw_seed"]


def draw_seed() -> int:
    """A fresh seed for a request that has none."""
    return secrets.randbits(63)


@dataclass(frozen=True)
class Sampled:
    """What was drawn, on the device. `BROKEN` (-1) stands where a row's logits are not numbers, or none is allowed."""

    tokens_B: Tensor
    plan: SamplingPlan
    logprobs: LogprobTensors | None = None

    def to_host(self) -> Sampled:
        """Copies that are begun now and that nothing waits for: read them with `lists` when the device is there."""
        return Sampled(to_host(self.tokens_B), self.plan, self.logprobs and self.logprobs.to_host())

    def lists(self) -> tuple[list[int], list[TokenLogprobs | None]]:
        """Tokens, and what was asked for of log-probabilities: [] where no row asks."""
        tokens = self.tokens_B.tolist()
        if self.logprobs is None:
            return tokens, []
        found: list[TokenLogprobs | None] = [None] * len(tokens)
        for row, one in zip(self.plan.reported_rows, self.logprobs.lists(self.plan.num_top), strict=True):
            found[row] = one
        return tokens, found


class Sampling:
    """The sampling of one runner.

        sampling = Sampling(max_num_seqs, vocab_size, device)
        sampled = sampling(logits_BV, rows, slots_B, positions_B, masks)     # launched
        tokens, logprobs = sampled.to_host().lists()                       # after the device has come so far
        sampling.release(slot)                                             # a sequence has left

    `state.last_tokens_N` has the last drawn token of each slot, for a step that is launched before this one is read.
    library: our own C++ (kernels/cpu_library.py), which draws on a CPU.
    """

    def __init__(
        self, num_slots: int, vocab_size: int, device: torch.device, library: ctypes.CDLL | None = None
    ) -> None:
        self.state = SamplingState(num_slots, vocab_size, device)
        self._native = None if library is None else self._native_draw(library)
        self._warm: set[torch.dtype] = set()

    def _native_draw(self, library: ctypes.CDLL) -> NativeDraw:
        state = self.state
        temperatures_N, top_p_N, min_p_N = state.floats_PN[:3]
        return NativeDraw(
            library,
            temperatures_N=temperatures_N,
            top_p_N=top_p_N,
            min_p_N=min_p_N,
            seeds_N=state.ints_PN[0],
            top_k_N=state.ints_PN[1],
            last_tokens_N=state.last_tokens_N,
        )

    def warm_up(self, dtype: torch.dtype) -> bool:
        """On a GPU, load the kernels of filters, penalties and masks before a request needs them, a dtype a call.

        dtype: of the model's logits; penalties and masks make float32 of them. False where all is loaded.
        """
        state = self.state
        missing = [kind for kind in (dtype, torch.float32) if kind not in self._warm]
        if not is_gpu(state.device) or not missing:
            return False
        self._warm.add(missing[0])
        logits = torch.zeros(1, state.vocab_size, dtype=missing[0], device=state.device)
        one, slot = torch.ones(1, device=state.device), state.tensor([state.padding_slot], torch.int64)
        nothing = Seen(state.counts.prompts_NV, state.counts.answers_NV, slot * 0 - 1, state.floats_PN[3:])
        words = torch.zeros(1, ceil_div(state.vocab_size, 32), dtype=torch.int32, device=state.device)
        for allowed in (None, Allowed(words, slot * 0 - 1)):
            change_logits(logits, slot, nothing, allowed)
        thresholds = find_thresholds(logits, one, slot, one / 2, one / 2)
        choose(logits, state.floats_PN[0], state.ints_PN[0], slot, slot, state.last_tokens_N.clone(), thresholds)
        return True

    def plan(self, rows: Sequence[SampledRow]) -> SamplingPlan:
        """What these rows need: made again only when they are others, or in another order."""
        return self.state.plan(rows)

    def release(self, slot: int) -> None:
        """A sequence has left this slot."""
        self.state.release(slot)

    def __call__(
        self,
        logits_BV: Tensor,
        rows: Sequence[SampledRow],
        slots_B: Tensor,
        positions_B: Tensor,
        masks_MW: Tensor | None = None,
        chosen_B: Tensor | None = None,
    ) -> Sampled:
        """One token for each row.

        Args: logits_BV: any float dtype; not changed. rows: in the order of the logits. slots_B, positions_B: int64
        on the device, each row's slot and the position of the token to be drawn. masks_MW: int32 on the device, bit
        t % 32 of word t // 32 set where token t is allowed, one row for each that has a grammar. chosen_B: tokens
        that a recorded graph has chosen already: used where the plan is plain, and the tables knew all rows then.
        """
        plan = self.plan(rows)
        if chosen_B is not None and plan.is_plain and not self.state.has_new_rows:
            return Sampled(chosen_B, plan)
        logits = logits_BV if plan.is_plain else self._changed(logits_BV, plan, slots_B, positions_B, masks_MW)
        tokens_B = self._choose(logits, plan, slots_B, positions_B)
        if plan.penalised is not None:
            self.state.counts.add(plan.penalised.places, tokens_B.index_select(0, plan.penalised.rows))
        return Sampled(tokens_B, plan, _report(logits_BV, tokens_B, plan))

    def choose_plainly(self, logits_BV: Tensor, slots_B: Tensor, positions_B: Tensor) -> Tensor:
        """The tokens where the plan is plain, kept as last tokens too: what a graph records. Reads tables by slot."""
        return self._draw(logits_BV, slots_B, positions_B, None)

    def _choose(self, logits: Tensor, plan: SamplingPlan, slots_B: Tensor, positions_B: Tensor) -> Tensor:
        if self._native is not None:
            return self._native(logits, slots_B, positions_B)
        if plan.is_greedy and self.state.device.type == "cpu":
            return choose_greedily(logits, slots_B, self.state.last_tokens_N)
        return self._draw(logits, slots_B, positions_B, self._thresholds(logits, plan, slots_B))

    def _draw(self, logits: Tensor, slots_B: Tensor, positions_B: Tensor, thresholds_B: Tensor | None) -> Tensor:
        state = self.state
        temperatures_N, seeds_N = state.floats_PN[0], state.ints_PN[0]
        return choose(logits, temperatures_N, seeds_N, slots_B, positions_B, state.last_tokens_N, thresholds_B)

    def _thresholds(self, logits: Tensor, plan: SamplingPlan, slots_B: Tensor) -> Tensor | None:
        if plan.filtered is None:
            return None
        slots_M = slots_B.index_select(0, plan.filtered)
        temperatures, top_p, min_p = self.state.floats_PN[:3].index_select(1, slots_M)
        top_k = self.state.ints_PN[1].index_select(0, slots_M)
        found_M = find_thresholds(logits.index_select(0, plan.filtered), temperatures, top_k, top_p, min_p)
        thresholds_B = torch.full((logits.shape[0],), -math.inf, device=logits.device)
        return thresholds_B.index_copy_(0, plan.filtered, found_M)

    def _changed(
        self,
        logits_BV: Tensor,
        plan: SamplingPlan,
        slots_B: Tensor,
        positions_B: Tensor,
        masks_MW: Tensor | None,
    ) -> Tensor:
        """The logits after penalties, biases and masks: a float32 copy where there are any."""
        if plan.places_B is None or plan.mask_rows_B is None:
            return logits_BV
        counts = self.state.counts
        seen = Seen(counts.prompts_NV, counts.answers_NV, plan.places_B, self.state.floats_PN[3:])
        allowed = None if masks_MW is None or not plan.has_masks else Allowed(masks_MW, plan.mask_rows_B)
        logits = change_logits(logits_BV, slots_B, seen, allowed)
        if plan.biased is not None:
            biased = plan.biased
            logits.index_put_((biased.rows, biased.tokens), biased.biases, accumulate=True)
        if plan.not_yet is not None:
            self._forbid(logits, plan.not_yet, slots_B, positions_B)
        return logits

    def _forbid(self, logits: Tensor, entries: Entries, slots_B: Tensor, positions_B: Tensor) -> None:
        """Stop tokens of answers that have fewer tokens than they must."""
        num_prompt, min_tokens = self.state.ints_PN[2:].index_select(1, slots_B)
        is_early = (positions_B - num_prompt < min_tokens).index_select(0, entries.rows)
        place = (entries.rows, entries.tokens)
        logits.index_put_(place, torch.where(is_early, entries.biases, logits[place]))


def _report(logits_BV: Tensor, tokens_B: Tensor, plan: SamplingPlan) -> LogprobTensors | None:
    """Log-probabilities of the model's own logits."""
    if plan.reported is None:
        return None
    rows = logits_BV.index_select(0, plan.reported)
    return chosen_and_top(rows, tokens_B.index_select(0, plan.reported), max(plan.num_top))
