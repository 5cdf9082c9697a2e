"""Small steps with prompts as CUDA graphs: from embedding to final norm they are launched at once.

    T tokens, R requests --load_prompt_inputs--> static tensors --replay--> hidden_TD --> sampled rows, head, draw

A graph is of a number of tokens, a number of requests and a longest context; a step takes the least that holds it. Its
other tokens are padding: they are written nowhere and belong to no request, so what attention gives for them is
anything, and stays in their own rows. Prompts, pieces of them behind a cached beginning, decoding beside them, and
guesses that are verified are all the same here.

Such a step costs the device little, and the host a launch for every kernel of every block. Where the padding would cost
more than those launches, as both were measured when the graph was recorded, the step is launched one by one. So are
steps with adapters, and whatever the runner does not give to `PromptGraphs`.
Graphs share the memory of decoding's (`graphs.py`): what one gives is there until the next of either kind runs.
"""

from __future__ import annotations

import logging
import time
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tunesmith.engine.batch import StepBatch
from tunesmith.engine.graphs import (
    CONTEXTS,
    RECORD_AFTER,
    SPARE_BYTES,
    GraphStats,
    first_error,
    no_collection,
    recorder_of,
)
from tunesmith.engine.recorder import Recorder
from tunesmith.engine.sampling_state import SamplingState
from tunesmith.kernels.prompt_inputs import PromptInputs, load_prompt_inputs
from tunesmith.units import ceil_div, format_bytes

log = logging.getLogger(__name__)
Run = Callable[[StepBatch], Tensor]
"""A pass over the model that asks the device for nothing: a batch of known tokens -> hidden_TD of all of them."""
# 0: every step with prompts is launched one by one again.
MOST_TOKENS = 2048
TOKENS = (8, 16, 32, 64, 128, 256, 384, 512, 768, 1024, 1536, 2048)
REQUESTS = (8, 64)
FIRST_TOKENS = (128, 256, 512, 1024)
"""Recorded at start-up, for the fewest requests; the others in idle moments, or once they are used."""
IMPROVE_AFTER = 64
"""Steps that run in a graph of more tokens or requests than they need, before one of their own is recorded."""
PADDED = 0.95
"""Of a graph's tokens: with more that are a step's own, padding is not worth a thought."""


@dataclass(frozen=True, order=True)
class Size:
    """Tokens and requests that a graph has room for."""

    num_tokens: int
    num_requests: int

    def holds(self, other: Size) -> bool:
        """Whether both are enough."""
        return self.num_tokens >= other.num_tokens and self.num_requests >= other.num_requests


@dataclass(frozen=True)
class _Graph:
    """device_s: what a replay takes the device, but for attention; 0 where that is not known."""

    size: Size
    replay: Callable[[], None]
    hidden_TD: Tensor
    inputs: PromptInputs
    device_s: float


def ladder(max_num_batched_tokens: int, max_num_seqs: int) -> list[Size]:
    """Sizes of graphs, ascending: each number of tokens with each of requests that so many tokens can have."""
    most = min(max_num_batched_tokens, MOST_TOKENS)
    if most <= 0:
        return []
    tokens = [*(number for number in TOKENS if number < most), most]
    requests = [*(number for number in REQUESTS if number < max_num_seqs), max_num_seqs]
    return sorted({Size(number, min(number, few)) for number in tokens for few in requests})


def first_sizes(sizes: Sequence[Size]) -> list[Size]:
    """Of a ladder, the sizes that are recorded first: of some tokens, for the fewest requests."""
    first = {*FIRST_TOKENS, min(sizes[-1].num_tokens, FIRST_TOKENS[-1])}
    few: dict[int, Size] = {}
    for size in sizes:
        if size.num_tokens in first:
            few.setdefault(size.num_tokens, size)
    return list(few.values())


class PromptGraphs:
    """The graphs of one runner. Not thread-safe: used by the thread that launches steps.

        graphs = PromptGraphs(run, state, sizes=ladder(8192, 256), max_context=max_model_len, recorder=..., ...)
        graphs.record(limit_s=0)                  # at start-up; graphs.record_next() in idle moments
        hidden_TD = graphs(batch)                 # None: run this step launch by launch

    run: must not read from the device; reads weights and pages at addresses that stay.
    state: last tokens, by slot.
    """

    def __init__(
        self,
        run: Run,
        state: SamplingState,
        *,
        sizes: Sequence[Size],
        max_context: int,
        slots_of_page: int,
        device: torch.device,
        recorder: Recorder | None = None,
    ) -> None:
        self.run = run
        self.state = state
        self.slots_of_page = slots_of_page
        self.device = device
        self.recorder: Recorder = recorder_of(device) if recorder is None else recorder
        self.sizes = sorted(sizes)
        self.contexts = [*(bound for bound in CONTEXTS if bound < max_context), max_context]
        self.stats = GraphStats()
        self.refused: dict[int, str] = {}
        self.host_s = float("inf")
        columns, requests = ceil_div(max_context, slots_of_page), max(size.num_requests for size in sizes)
        self._inputs = PromptInputs.empty(self.sizes[-1].num_tokens, requests, columns, device)
        self._none = torch.zeros(0, dtype=torch.int64, device=device)
        self._graphs: dict[int, dict[Size, _Graph]] = {}
        self._wanted: dict[tuple[int, Size], int] = {}

    def __call__(self, batch: StepBatch) -> Tensor | None:
        """hidden_TD of a step, until the next graph runs; None where none covers it.

        The batch's tokens may name last tokens by slot (below zero).
        """
        graph = self._graph(batch)
        if graph is None:
            self.stats = replace(self.stats, num_eager=self.stats.num_eager + 1)
            return None
        with torch.inference_mode():
            load_prompt_inputs(_source(batch), graph.inputs, self.state.last_tokens_N, self.slots_of_page)
            graph.replay()
        padding = graph.size.num_tokens - batch.num_tokens
        self.stats = replace(
            self.stats,
            num_replays=self.stats.num_replays + 1,
            num_padding_rows=self.stats.num_padding_rows + padding,
        )
        return graph.hidden_TD[: batch.num_tokens]

    def record(self, limit_s: float | None = None) -> None:
        """Record the first sizes, largest first, then the others until `limit_s` seconds have gone in all."""
        started = time.perf_counter()
        context, first = self.contexts[0], first_sizes(self.sizes)
        with no_collection():
            for size in self._missing(context):
                is_late = limit_s is not None and time.perf_counter() - started > limit_s
                if size not in first and is_late:
                    break
                if not self._record(context, size):
                    break
        if context in self.refused:
            log.warning("small steps with prompts run launch by launch: %s", self.refused[context])
        stats = self.stats
        log.info(
            "%d graphs of small steps with prompts in %.1f s, %s",
            stats.num_graphs,
            stats.seconds,
            format_bytes(stats.num_bytes),
        )

    def record_next(self) -> bool:
        """Record one more size of what is in use already; False when all are there. For idle moments."""
        for context in sorted({self.contexts[0], *self._graphs}):
            for size in self._missing(context):
                with no_collection():
                    return self._record(context, size)
        return False

    def drop(self) -> None:
        """Forget all graphs (weights or pages have moved). Who renews the recorder gives their memory back."""
        self._graphs.clear()
        self._wanted.clear()
        self.refused.clear()

    def _missing(self, context: int) -> list[Size]:
        """Sizes without a graph in the order of recording: the first ones before others, large before small."""
        if context in self.refused:
            return []
        made, first = self._graphs.get(context, {}), first_sizes(self.sizes)
        missing = [size for size in reversed(self.sizes) if size not in made]
        others = [size for size in missing if size not in first and self._may_pay(context, size)]
        return [size for size in missing if size in first] + others

    def _graph(self, batch: StepBatch) -> _Graph | None:
        asked = Size(batch.num_tokens, batch.num_requests)
        place = bisect_left(self.contexts, batch.max_context)
        fitting = [size for size in self.sizes if size.holds(asked)]
        if batch.adapter_T is not None or place == len(self.contexts) or not fitting:
            return None
        context = self.contexts[place]
        found = self._made(context, asked)
        if found is None or found.size != fitting[0]:
            self._want(context, fitting[0], RECORD_AFTER if found is None else IMPROVE_AFTER)
            found = self._made(context, asked)
        return found

    def _made(self, context: int, asked: Size) -> _Graph | None:
        """The least graph that holds a step, where that takes no longer than launching it."""
        fitting = [size for size in self._graphs.get(context, {}) if size.holds(asked)]
        if not fitting:
            return None
        graph = self._graphs[context][min(fitting)]
        own = asked.num_tokens / graph.size.num_tokens
        return graph if own >= PADDED or graph.device_s <= max(self.host_s, own * graph.device_s) else None

    def _may_pay(self, context: int, size: Size) -> bool:
        """Whether a graph of this size may take the device less than launches take the host, by those that are made."""
        made = self._graphs.get(context, {}).values()
        shares = (graph.device_s * min(1.0, size.num_tokens / graph.size.num_tokens) for graph in made)
        return all(share <= self.host_s for share in shares)

    def _want(self, context: int, size: Size, after: int) -> None:
        """Record a size once it is clear that it is used."""
        if context in self.refused or size in self._graphs.get(context, {}) or not self._may_pay(context, size):
            return
        steps = self._wanted[context, size] = self._wanted.get((context, size), 0) + 1
        if steps > after:
            with no_collection():
                if not self._record(context, size):
                    log.warning("small steps with prompts run launch by launch: %s", self.refused[context])

    def _record(self, context: int, size: Size) -> bool:
        """One graph more; False where that failed, which is remembered, or where memory is short."""
        free = self.recorder.free_bytes()
        if free is not None and free < SPARE_BYTES:
            self.refused[context] = f"only {format_bytes(free)} of memory are free, so no more graphs are recorded"
            return False
        started = time.perf_counter()
        try:
            graph = self._recorded(context, size)
        except RuntimeError as error:
            # An operator that asks the device for a number (a mixture of experts), or no memory.
            log.debug("recording failed", exc_info=True)
            first = str(first_error(error)).splitlines() or [type(error).__name__]
            self.refused[context] = first[0]
            return False
        self._graphs.setdefault(context, {})[size] = graph
        after = self.recorder.free_bytes()
        taken = 0 if free is None or after is None else max(0, free - after)
        self.stats = replace(
            self.stats,
            num_graphs=self.stats.num_graphs + 1,
            seconds=self.stats.seconds + time.perf_counter() - started,
            num_bytes=self.stats.num_bytes + taken,
        )
        return True

    def _recorded(self, context: int, size: Size) -> _Graph:
        inputs = self._inputs.first(size.num_tokens, size.num_requests)
        batch = self._static_batch(inputs, size, context)

        def work() -> tuple[Tensor]:
            return (self.run(batch).contiguous(),)

        with torch.inference_mode():
            load_prompt_inputs(inputs.first(0, 0), inputs, self.state.last_tokens_N, self.slots_of_page)
            started = time.perf_counter()
            self.recorder.warm_up(work)  # which only launches
            self.host_s = min(self.host_s, time.perf_counter() - started)
            replay, (hidden_TD,) = self.recorder.record(work)
            return _Graph(size, replay, self.recorder.borrow(hidden_TD), inputs, self._device_s(replay))

    def _device_s(self, replay: Callable[[], None]) -> float:
        """Seconds of a replay; 0 where there is no GPU to wait for."""
        if self.device.type != "cuda":
            return 0.0
        torch.cuda.synchronize(self.device)
        started = time.perf_counter()
        replay()
        torch.cuda.synchronize(self.device)
        return time.perf_counter() - started

    def _static_batch(self, inputs: PromptInputs, size: Size, context: int) -> StepBatch:
        """The batch whose tensors are the static inputs. Nothing of it is drawn here."""
        return StepBatch(
            tokens_T=inputs.tokens,
            positions_T=inputs.positions,
            slots_T=inputs.slots,
            query_starts_R1=inputs.starts,
            context_R=inputs.contexts,
            block_tables_RP=inputs.tables,
            max_query=size.num_tokens,
            max_context=context,
            sample_rows_B=self._none,
            sample_slots_B=self._none,
            sample_positions_B=self._none,
            sequence_slots=[],
            is_decode=False,
        )


def _source(batch: StepBatch) -> PromptInputs:
    return PromptInputs(
        tokens=batch.tokens_T,
        positions=batch.positions_T,
        slots=batch.slots_T,
        starts=batch.query_starts_R1,
        contexts=batch.context_R,
        tables=batch.block_tables_RP,
    )
