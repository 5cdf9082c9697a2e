"""Decoding as CUDA graphs: a whole step, from embedding to drawn tokens, is launched at once.

    batch of R sequences --load_inputs--> static tensors of B >= R rows --replay--> logits_BV, tokens_B, last tokens

There is a graph for each of a ladder of sizes B. They share one memory pool and one set of inputs, so only one runs at
a time, and what it gives is there until the next one runs. A step that no graph covers runs launch by launch.

Graphs are recorded from the largest to the smallest, so that the smaller ones fit into the memory of the largest. The
coarse sizes (powers of two) come first, at start-up; those between them follow while there is time, or later in idle
moments. Rows of padding write nowhere, see one position, and draw for a slot that nobody has.
"""

from __future__ import annotations

import gc
import logging
import time
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tunesmith.engine.batch import StepBatch
from tunesmith.engine.recorder import CudaRecorder, DryRecorder, Recorder
from tunesmith.engine.sampling import Sampling
from tunesmith.kernels.chip import stands_in
from tunesmith.kernels.decode_inputs import DecodeInputs, load_inputs
from tunesmith.units import ceil_div, format_bytes

log = logging.getLogger(__name__)
Run = Callable[[StepBatch], Tensor]
"""A pass over the model that asks the device for nothing: a batch of single tokens -> logits_BV of all of its rows."""
MOST_ROWS = 512
"""Larger batches keep the device busy longer than the host needs to launch them one by one."""
CONTEXTS = (2048, 8192, 32_768, 131_072)
"""Attention is laid out for the longest context that a graph covers: there is a set of graphs for each of these."""
RECORD_AFTER = 4
"""Steps of a kind (longer contexts, adapters) and a size that run launch by launch, before a graph is recorded."""
SPARE_BYTES = 2**28
"""Memory of the device that is left alone: with less than this free nothing more is recorded."""


@dataclass(frozen=True)
class Kind:
    """What a set of graphs covers, beside its sizes: the longest context, and whether tokens have adapters."""

    max_context: int
    has_adapters: bool = False


@dataclass(frozen=True)
class Decoded:
    """What a graph gave, on the device, until the next one runs: logits_BV, and tokens_B of rows that are plain."""

    logits_BV: Tensor
    tokens_B: Tensor


@dataclass(frozen=True)
class GraphStats:
    """Graphs recorded so far, the seconds it took, and the device's memory that they took.

    num_replays, num_eager: steps that ran as a graph, and decoding steps that did not. num_padding_rows: rows of
    padding in all replays.
    """

    num_graphs: int = 0
    seconds: float = 0.0
    num_bytes: int = 0
    num_replays: int = 0
    num_eager: int = 0
    num_padding_rows: int = 0


@dataclass(frozen=True)
class _Graph:
    num_rows: int
    replay: Callable[[], None]
    decoded: Decoded
    inputs: DecodeInputs


def ladder(max_num_seqs: int) -> list[int]:
    """Sizes of graphs, ascending: 1, 2, 4, then every 8 to 256 and every 32 beyond, up to what runs together."""
    most = min(max_num_seqs, MOST_ROWS)
    sizes = [1, 2, 4, *range(8, 257, 8), *range(288, MOST_ROWS + 1, 32)]
    return [*(size for size in sizes if size < most), most]


def coarse(sizes: Sequence[int]) -> list[int]:
    """Of a ladder, the sizes that are recorded first: powers of two, and the largest."""
    return [size for size in sizes if size & (size - 1) == 0 or size == sizes[-1]]


class DecodeGraphs:
    """The graphs of one runner. Not thread-safe: used by the thread that launches steps.

        graphs = DecodeGraphs(run, sampling, max_num_seqs=256, max_context=max_model_len, ...)
        graphs.record(limit_s=5)                  # at start-up; graphs.record_next() in idle moments
        decoded = graphs(batch)                   # None: run this step launch by launch
        sampling(decoded.logits_BV, rows, batch.sample_slots_B, batch.sample_positions_B, masks, decoded.tokens_B)

    run: must not read from the device; reads weights and pages at addresses that stay.
    report: told (graphs recorded, graphs wanted) while recording.
    """

    def __init__(
        self,
        run: Run,
        sampling: Sampling,
        *,
        max_num_seqs: int,
        max_context: int,
        slots_of_page: int,
        device: torch.device,
        recorder: Recorder | None = None,
        sizes: Sequence[int] | None = None,
        report: Callable[[int, int], None] | None = None,
    ) -> None:
        self.run = run
        self.sampling = sampling
        self.slots_of_page = slots_of_page
        self.recorder: Recorder = recorder_of(device) if recorder is None else recorder
        self.sizes = sorted(sizes or ladder(max_num_seqs))
        self.contexts = [*(bound for bound in CONTEXTS if bound < max_context), max_context]
        self.report = report
        self.stats = GraphStats()
        self.refused: dict[Kind, str] = {}
        padding_slot = sampling.state.padding_slot
        columns = ceil_div(max_context, slots_of_page)
        self._inputs = DecodeInputs.empty(self.sizes[-1], columns, padding_slot, device)
        self._starts = torch.arange(self.sizes[-1] + 1, dtype=torch.int32, device=device)
        self._rows = torch.arange(self.sizes[-1], device=device)
        self._graphs: dict[Kind, dict[int, _Graph]] = {}
        self._wanted: dict[tuple[Kind, int], int] = {}

    @property
    def first_kind(self) -> Kind:
        """What is recorded at start-up: the shorter contexts, no adapters."""
        return Kind(self.contexts[0])

    def __call__(self, batch: StepBatch) -> Decoded | None:
        """Launch a step of single tokens; None where no graph covers it. `tokens_B` counts where the rows are plain.

        The batch's tokens may name last tokens by slot (below zero).
        """
        if not batch.is_decode:
            return None
        graph = self._graph(batch)
        if graph is None:
            self.stats = replace(self.stats, num_eager=self.stats.num_eager + 1)
            return None
        num = batch.num_tokens
        with torch.inference_mode():
            load_inputs(self._source(batch), graph.inputs, self.sampling.state.last_tokens_N, self.slots_of_page)
            graph.replay()
        self.stats = replace(
            self.stats,
            num_replays=self.stats.num_replays + 1,
            num_padding_rows=self.stats.num_padding_rows + graph.num_rows - num,
        )
        return Decoded(graph.decoded.logits_BV[:num], graph.decoded.tokens_B[:num])

    def record(self, limit_s: float | None = None) -> None:
        """Record the coarse sizes, largest first, then the others until `limit_s` seconds have gone in all."""
        started = time.perf_counter()
        kind, first = self.first_kind, coarse(self.sizes)
        log.info(
            "recording %d decode graphs, and %d more while there is time", len(first), len(self.sizes) - len(first)
        )
        with no_collection():
            for size in self._missing(kind):
                is_late = limit_s is not None and time.perf_counter() - started > limit_s
                if size not in first and is_late:
                    break
                if not self._record(kind, size):
                    break
        if kind in self.refused:
            log.warning("decoding runs launch by launch: %s", self.refused[kind])
        stats = self.stats
        log.info("%d decode graphs in %.1f s, %s", stats.num_graphs, stats.seconds, format_bytes(stats.num_bytes))

    def record_next(self) -> bool:
        """Record one more size of what is in use already; False when all are there. For idle moments."""
        for kind in [self.first_kind, *(kind for kind in self._graphs if kind != self.first_kind)]:
            for size in self._missing(kind):
                with no_collection():
                    return self._record(kind, size)
        return False

    def drop(self) -> None:
        """Forget all graphs (weights or pages have moved). They are recorded again by `record`."""
        self._graphs.clear()
        self._wanted.clear()
        self.refused.clear()
        self.recorder.renew()

    def _missing(self, kind: Kind) -> list[int]:
        """Sizes without a graph in the order of recording: coarse before fine, large before small."""
        if kind in self.refused:
            return []
        made, first = self._graphs.get(kind, {}), coarse(self.sizes)
        missing = [size for size in self.sizes if size not in made]
        return sorted(missing, key=lambda size: (size not in first, -size))

    def _graph(self, batch: StepBatch) -> _Graph | None:
        num = batch.num_tokens
        kind = self._kind(batch)
        if kind is None or num > self.sizes[-1]:
            return None
        self._want(kind, coarse(self.sizes)[bisect_left(coarse(self.sizes), num)])
        made = self._graphs.get(kind, {})
        sizes = sorted(made)
        place = bisect_left(sizes, num)
        return made[sizes[place]] if place < len(sizes) else None

    def _want(self, kind: Kind, size: int) -> None:
        """Record a size of a kind that was not recorded at start-up, once it is clear that it is used."""
        if kind in self.refused or kind == self.first_kind or size in self._graphs.get(kind, {}):
            return
        steps = self._wanted[kind, size] = self._wanted.get((kind, size), 0) + 1
        if steps > RECORD_AFTER:
            with no_collection():
                if not self._record(kind, size):
                    log.warning("steps of %s run launch by launch: %s", kind, self.refused[kind])

    def _kind(self, batch: StepBatch) -> Kind | None:
        fitting = [bound for bound in self.contexts if batch.max_context <= bound]
        return Kind(fitting[0], batch.adapter_T is not None) if fitting else None

    def _source(self, batch: StepBatch) -> DecodeInputs:
        num = batch.num_tokens
        return DecodeInputs(
            tokens=batch.tokens_T,
            positions=batch.positions_T,
            slots=batch.slots_T,
            sample_slots=batch.sample_slots_B,
            sample_positions=batch.sample_positions_B,
            contexts=batch.context_R,
            # Never read where the graph has no adapters.
            adapters=self._starts[:num] if batch.adapter_T is None else batch.adapter_T,
            tables=batch.block_tables_RP,
        )

    def _record(self, kind: Kind, size: int) -> bool:
        """One graph more; False where that failed, which is remembered, or where memory is short."""
        return self._has_room(kind) and self._add(kind, size)

    def _has_room(self, kind: Kind) -> bool:
        free = self.recorder.free_bytes()
        if free is None or free >= SPARE_BYTES:
            return True
        self.refused[kind] = f"only {format_bytes(free)} of memory are free, so no more graphs are recorded"
        return False

    def _add(self, kind: Kind, size: int) -> bool:
        free = self.recorder.free_bytes()
        started = time.perf_counter()
        try:
            graph = self._recorded(kind, size)
        except RuntimeError as error:
            # An operator that asks the device for a number (a mixture of experts), or no memory.
            log.debug("recording failed", exc_info=True)
            first = str(first_error(error)).splitlines() or [type(error).__name__]
            self.refused[kind] = first[0]
            return False
        self._graphs.setdefault(kind, {})[size] = graph
        after = self.recorder.free_bytes()
        taken = 0 if free is None or after is None else max(0, free - after)
        self.stats = replace(
            self.stats,
            num_graphs=self.stats.num_graphs + 1,
            seconds=self.stats.seconds + time.perf_counter() - started,
            num_bytes=self.stats.num_bytes + taken,
        )
        if self.report is not None:
            self.report(len(self._graphs[kind]), len(self.sizes))
        return True

    def _recorded(self, kind: Kind, size: int) -> _Graph:
        batch, state = self._static_batch(kind, size), self.sampling.state

        def work() -> tuple[Tensor, Tensor]:
            logits_BV = self.run(batch).contiguous()
            tokens_B = self.sampling.choose_plainly(logits_BV, batch.sample_slots_B, batch.sample_positions_B)
            return logits_BV, tokens_B

        inputs = self._inputs.first(size)
        with torch.inference_mode():
            load_inputs(self._source(batch).first(0), inputs, state.last_tokens_N, self.slots_of_page)
            self.recorder.warm_up(work)
            replay, (logits_BV, tokens_B) = self.recorder.record(work)
            return _Graph(size, replay, Decoded(self.recorder.borrow(logits_BV), tokens_B), inputs)

    def _static_batch(self, kind: Kind, size: int) -> StepBatch:
        """The batch whose tensors are the static inputs."""
        inputs = self._inputs.first(size)
        return StepBatch(
            tokens_T=inputs.tokens,
            positions_T=inputs.positions,
            slots_T=inputs.slots,
            query_starts_R1=self._starts[: size + 1],
            context_R=inputs.contexts,
            block_tables_RP=inputs.tables,
            max_query=1,
            max_context=kind.max_context,
            sample_rows_B=self._rows[:size],
            sample_slots_B=inputs.sample_slots,
            sample_positions_B=inputs.sample_positions,
            sequence_slots=[self.sampling.state.padding_slot] * size,
            is_decode=True,
            adapter_T=inputs.adapters if kind.has_adapters else None,
        )


def recorder_of(device: torch.device) -> Recorder:
    """Of a GPU, or of what stands for one."""
    return DryRecorder() if stands_in(device) else CudaRecorder(device)


@contextmanager
def no_collection() -> Iterator[None]:
    """No garbage collection: what it frees in the middle of a recording may ask the device for something."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def first_error(error: BaseException) -> BaseException:
    """What went wrong first: a recording that has failed fails again when it is ended, and says less then."""
    while isinstance(error.__context__, RuntimeError):
        error = error.__context__
    return error
