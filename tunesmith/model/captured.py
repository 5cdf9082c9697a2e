"""The blocks of a decoder as two CUDA graphs, forward and backward: launched at once instead of kernel by kernel.

A graph repeats what was recorded, at the addresses it was recorded at. So there is one pair of graphs for each shape
of a micro-batch (see `Signature`), inputs are copied to where the graph reads them, and parameters that were moved
since are noticed. What is recorded must not ask the device for numbers: mixtures of experts stay outside.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from operator import is_
from typing import Any, cast

import torch
from torch import Tensor, nn

from tunesmith.model.autograd_threads import renew_accumulators, wake_autograd
from tunesmith.model.packed import BoundedPack, PackedTokens
from tunesmith.model.uncompiled import gradients

_log = logging.getLogger(__name__)
Run = Callable[[Tensor, PackedTokens, Tensor | None], Tensor]
"""hidden_TD, the pack it belongs to, and the seed of what is random in the blocks -> hidden_TD after the blocks."""
MOST_GRAPHS = 8
"""Shapes that are recorded; further ones run launch by launch."""
SPARE_MEMORY = 1.1
"""Memory that must be free before another shape is recorded, as a share of what the recordings hold."""
_WARM_UPS = 2
_ATTEMPTS = 2


@dataclass(frozen=True)
class Signature:
    """What a pair of graphs is recorded for.

    lengths: of every document, where all have the same (their attention may run as a batch); else none, and
    `num_documents` and `max_length` are upper bounds, powers of two.
    """

    num_tokens: int
    dtype: torch.dtype
    kind: str
    wants_input_grad: bool
    lengths: tuple[int, ...]
    num_documents: int
    max_length: int

    def bounded(self, num_documents: int, max_length: int) -> Signature:
        """This signature with other bounds."""
        return replace(self, num_documents=num_documents, max_length=max_length)

    def is_like(self, other: Signature) -> bool:
        """Whether two signatures of uneven packs differ by their bounds at most."""
        return not self.lengths and self.bounded(other.num_documents, other.max_length) == other

    def covers(self, other: Signature) -> bool:
        """Whether graphs of this signature run micro-batches of the other one, too."""
        within = self.num_documents >= other.num_documents and self.max_length >= other.max_length
        return self == other or (self.is_like(other) and within)

    def grown(self, others: Iterable[Signature]) -> Signature:
        """The least signature that covers this one and those of the others that differ by their bounds alone."""
        like = [self, *(other for other in others if self.is_like(other))]
        return self.bounded(max(one.num_documents for one in like), max(one.max_length for one in like))

    @classmethod
    def of(cls, hidden_TD: Tensor, pack: PackedTokens, kind: str) -> Signature:
        """The signature of a micro-batch."""
        is_even = len(set(pack.lengths)) == 1
        bounds = (len(pack.lengths), pack.max_length)
        num_documents, max_length = bounds if is_even else (_power_of_two(bound) for bound in bounds)
        return cls(
            hidden_TD.shape[0],
            hidden_TD.dtype,
            kind,
            hidden_TD.requires_grad,
            pack.lengths if is_even else (),
            num_documents,
            min(max_length, hidden_TD.shape[0]),
        )


class Recording:
    """One pair of graphs and the tensors they read and write."""

    def __init__(
        self,
        run: Run,
        hidden_TD: Tensor,
        pack: PackedTokens,
        signature: Signature,
        parameters: Sequence[nn.Parameter],
        pool: Any,
        seed: Tensor | None,
    ) -> None:
        self.parameters = list(parameters)
        self.addresses = _addresses(self.parameters)
        self.hidden = hidden_TD.detach().clone().requires_grad_(signature.wants_input_grad)
        self.pack = _static_pack(pack, signature)
        self.seed = None if seed is None else seed.clone()
        self.grad_out = torch.zeros_like(hidden_TD)
        self.inputs = [*([self.hidden] if signature.wants_input_grad else []), *self.parameters]
        self.forward_graph, self.backward_graph = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        self.generation = 0
        wake_autograd(hidden_TD.device)
        renew_accumulators(self.parameters)
        self._warm_up(run)
        before = torch.cuda.memory_reserved()
        renew_accumulators(self.parameters)
        with _recorded(self.forward_graph, pool, _stream(hidden_TD.device)):
            out = run(self.hidden, self.pack, self.seed)
        with _recorded(self.backward_graph, pool, _stream(hidden_TD.device)):
            grads = self._backward(out)
        self.out = out.detach()
        self.grads = grads
        self.num_bytes = torch.cuda.memory_reserved() - before

    def load(self, hidden_TD: Tensor, pack: PackedTokens, seed: Tensor | None) -> None:
        """Put a micro-batch, and the seed of its masks, where the graphs read it."""
        if self.seed is not None and seed is not None:
            self.seed.copy_(seed)
        self.hidden.detach().copy_(hidden_TD)
        self.pack.positions_T.copy_(pack.positions_T)
        num = pack.boundaries.numel()
        self.pack.boundaries[:num].copy_(pack.boundaries)
        self.pack.boundaries[num:].fill_(hidden_TD.shape[0])

    def is_current(self, parameters: Sequence[nn.Parameter]) -> bool:
        """Whether these, which are trained now, are the parameters that were when this was recorded, and where."""
        same = len(parameters) == len(self.parameters) and all(map(is_, parameters, self.parameters))
        return same and _addresses(self.parameters) == self.addresses

    def _warm_up(self, run: Run) -> None:
        """What happens at first calls only (compilation, measurements, workspaces) must not be recorded."""
        stream = _stream(self.hidden.device)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UPS):
                self._backward(run(self.hidden, self.pack, self.seed))
        torch.cuda.current_stream().wait_stream(stream)
        # The recording allocates all of it once more, in memory of its own.
        torch.cuda.synchronize()
        torch.cuda.empty_cache()

    def _backward(self, out: Tensor) -> tuple[Tensor | None, ...]:
        return gradients(out, self.inputs, self.grad_out)


class _Replay(torch.autograd.Function):
    """A recording as one operation of the surrounding graph."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, recording: Recording, exclusive: bool, *parameters: Tensor) -> Tensor:
        ctx.recording, ctx.exclusive, ctx.generation = recording, exclusive, recording.generation
        recording.forward_graph.replay()
        return recording.out.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        recording: Recording = ctx.recording
        if ctx.generation != recording.generation:
            raise RuntimeError(
                "the blocks' CUDA graphs hold one micro-batch: go backward through it before the next goes forward, "
                "or set train.graphs to off"
            )
        recording.grad_out.copy_(grads[0])
        recording.backward_graph.replay()
        # Gradients that wait for the next micro-batch must not lie where its activations will be written.
        out = [g if g is None else g.detach() if ctx.exclusive else g.clone() for g in recording.grads]
        if len(recording.inputs) == len(recording.parameters):
            return None, None, None, *out
        return out[0], None, None, *out[1:]


class CapturedBlocks:
    """The recordings of one decoder, by signature.

    exclusive: gradients are used up before the next micro-batch (no accumulation), so they need not be copied.
    """

    def __init__(self) -> None:
        self.exclusive = False
        self.refused: str | None = None
        self._recordings: dict[Signature, Recording] = {}
        self._pool: Any = None
        self._blocks: object = None

    @property
    def num_graphs(self) -> int:
        """Pairs of graphs recorded so far."""
        return len(self._recordings)

    def __call__(
        self,
        run: Run,
        hidden_TD: Tensor,
        pack: PackedTokens,
        kind: str,
        parameters: Sequence[nn.Parameter],
        seed: Tensor | None = None,
    ) -> Tensor:
        """run(hidden, pack, seed), by a recording where there is or can be one."""
        recording = self._recording(run, hidden_TD, pack, kind, parameters, seed)
        if recording is None:
            return run(hidden_TD, pack, seed)
        for made in self._recordings.values():
            made.generation += 1  # they share one memory, so the micro-batch of any of them is gone
        recording.load(hidden_TD, pack, seed)
        return cast(Tensor, _Replay.apply(hidden_TD, recording, self.exclusive, *recording.parameters))

    def belong_to(self, blocks: object) -> None:
        """Drop what was recorded of blocks that have been made again since: `blocks` is what they are now."""
        if blocks is not self._blocks and self._recordings:
            self._drop()
        self._blocks = blocks

    def give_up(self, reason: str) -> None:
        """Drop every recording and record no more: the blocks run launch by launch from now on."""
        self.refused = reason
        self._drop()

    def _drop(self) -> None:
        self._recordings.clear()
        self._pool = None
        torch.cuda.empty_cache()

    def _recording(
        self,
        run: Run,
        hidden_TD: Tensor,
        pack: PackedTokens,
        kind: str,
        parameters: Sequence[nn.Parameter],
        seed: Tensor | None,
    ) -> Recording | None:
        wanted = Signature.of(hidden_TD, pack, f"{kind}, {'random' if seed is not None else 'exact'}")
        known = next((made for held, made in self._recordings.items() if held.covers(wanted)), None)
        if known is not None and known.is_current(parameters):
            return known
        if known is not None:
            self._drop()
        if self.refused is not None or len(self._recordings) >= MOST_GRAPHS:
            return None
        if not self._has_room():
            self.give_up("documents come in shapes that take more memory to record than is free")
            return None
        signature = wanted.grown(self._recordings)
        self._recordings = {held: made for held, made in self._recordings.items() if not signature.covers(held)}
        return self._record(run, hidden_TD, pack, signature, parameters, seed)

    def _record(
        self,
        run: Run,
        hidden_TD: Tensor,
        pack: PackedTokens,
        signature: Signature,
        parameters: Sequence[nn.Parameter],
        seed: Tensor | None,
    ) -> Recording | None:
        for _ in range(_ATTEMPTS):
            self._pool = self._pool or torch.cuda.graph_pool_handle()
            try:
                recording = Recording(run, hidden_TD, pack, signature, parameters, self._pool, seed)
            except RuntimeError as error:
                # An operator that asks the device for a number, say; or a kernel first loaded while recording.
                _log.debug("a recording failed", exc_info=True)
                first = _first(error)
                if isinstance(first, torch.OutOfMemoryError):
                    self.give_up("recording takes more memory than there is")
                    return None
                self.give_up(str(first).splitlines()[0])
            else:
                self.refused = None
                self._recordings[signature] = recording
                return recording
        return None

    def _has_room(self) -> bool:
        """Whether as much is free as the recordings hold: another shape is first run beside them, to warm up."""
        if not self._recordings:
            return True
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info()
        return free >= SPARE_MEMORY * sum(recording.num_bytes for recording in self._recordings.values())


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """The one stream of a GPU for warming up and recording: of each, and of each thread, cuBLAS keeps 32 MiB."""
    return torch.cuda.Stream(device)


@contextmanager
def _recorded(graph: torch.cuda.CUDAGraph, pool: Any, stream: torch.cuda.Stream) -> Iterator[None]:
    """What is queued inside is recorded, on `stream`.

    Where that fails torch (2.11) leaves `stream` as the current one, for all that the process does later.
    """
    before = torch.cuda.current_stream()
    try:
        # thread_local: the backward pass is recorded on autograd's thread, where kernels may still be loaded.
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            yield
    finally:
        torch.cuda.set_stream(before)


def _first(error: BaseException) -> BaseException:
    """What went wrong first: a recording that has failed fails again when it is ended, and says less then."""
    while isinstance(error.__context__, RuntimeError):
        error = error.__context__
    return error


def _static_pack(pack: PackedTokens, signature: Signature) -> PackedTokens:
    positions = pack.positions_T.clone()
    if signature.lengths:
        return PackedTokens(pack.tokens_T, positions, pack.lengths, pack.boundaries.clone())
    room = signature.num_documents + 1
    boundaries = pack.boundaries.new_full((room,), pack.positions_T.numel())
    boundaries[: pack.boundaries.numel()].copy_(pack.boundaries)
    return BoundedPack(pack.tokens_T, positions, pack.lengths, boundaries, signature.max_length)


def _power_of_two(bound: int) -> int:
    return 1 << (bound - 1).bit_length()


def _addresses(parameters: Sequence[nn.Parameter]) -> list[int]:
    return [parameter.data_ptr() for parameter in parameters]
