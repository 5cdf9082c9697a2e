"""The blocks of a decoder as two CUDA graphs, forward and backward: launched at once instead of kernel by kernel.

A graph repeats what was recorded, at the addresses it was recorded at. So there is one pair of graphs for each shape
of a micro-batch (see `Signature`), inputs are copied to where the graph reads them, and parameters that were moved
since are noticed. What is recorded must not ask the device for numbers: mixtures of experts stay outside.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from tunesmith.model.packed import BoundedPack, PackedTokens
from tunesmith.model.uncompiled import gradients

_log = logging.getLogger(__name__)
Run = Callable[[Tensor, PackedTokens, Tensor | None], Tensor]
"""hidden_TD, the pack it belongs to, and the seed of what is random in the blocks -> hidden_TD after the blocks."""
MOST_GRAPHS = 8
"""Shapes that are recorded; further ones run launch by launch."""
MOST_GRADIENT_BYTES = 2 << 30
"""Gradients that recordings may hold together; the first recording is made whatever it holds."""
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
        self._warm_up(run)
        # thread_local: the backward pass is recorded on autograd's thread, where kernels may still be loaded.
        with torch.cuda.graph(self.forward_graph, pool=pool, capture_error_mode="thread_local"):
            out = run(self.hidden, self.pack, self.seed)
        with torch.cuda.graph(self.backward_graph, pool=pool, capture_error_mode="thread_local"):
            grads = self._backward(out)
        self.out = out.detach()
        self.grads = grads

    def load(self, hidden_TD: Tensor, pack: PackedTokens, seed: Tensor | None) -> None:
        """Put a micro-batch, and the seed of its masks, where the graphs read it."""
        if self.seed is not None and seed is not None:
            self.seed.copy_(seed)
        self.hidden.detach().copy_(hidden_TD)
        self.pack.positions_T.copy_(pack.positions_T)
        num = pack.boundaries.numel()
        self.pack.boundaries[:num].copy_(pack.boundaries)
        self.pack.boundaries[num:].fill_(hidden_TD.shape[0])

    def is_current(self) -> bool:
        """Whether every parameter is where it was when this was recorded."""
        return _addresses(self.parameters) == self.addresses

    def _warm_up(self, run: Run) -> None:
        """What happens at first calls only (compilation, measurements, workspaces) must not be recorded."""
        stream = torch.cuda.Stream()
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
        ctx.recording, ctx.exclusive = recording, exclusive
        recording.forward_graph.replay()
        return recording.out.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        recording: Recording = ctx.recording
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
        recording.load(hidden_TD, pack, seed)
        return cast(Tensor, _Replay.apply(hidden_TD, recording, self.exclusive, *recording.parameters))

    def _recording(
        self,
        run: Run,
        hidden_TD: Tensor,
        pack: PackedTokens,
        kind: str,
        parameters: Sequence[nn.Parameter],
        seed: Tensor | None,
    ) -> Recording | None:
        signature = Signature.of(hidden_TD, pack, f"{kind}, {'random' if seed is not None else 'exact'}")
        known = self._recordings.get(signature)
        if known is not None and known.is_current():
            return known
        if known is not None:
            self._recordings.clear()
        if self.refused is not None or not self._has_room(parameters):
            return None
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        for _ in range(_ATTEMPTS):
            try:
                recording = Recording(run, hidden_TD, pack, signature, parameters, self._pool, seed)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                # An operator that asks the device for a number, say; or a kernel first loaded while recording.
                self.refused = str(error).splitlines()[0]
                _log.debug("a recording failed", exc_info=True)
                self._pool = torch.cuda.graph_pool_handle()
            else:
                self.refused = None
                self._recordings[signature] = recording
                return recording
        return None

    def _has_room(self, parameters: Sequence[nn.Parameter]) -> bool:
        each = sum(parameter.numel() * parameter.element_size() for parameter in parameters)
        num = len(self._recordings)
        return num == 0 or (num < MOST_GRAPHS and (num + 1) * each <= MOST_GRADIENT_BYTES)


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
