"""Pipeline parallelism of the native decoder: each process holds some consecutive blocks (`stages.py`).

    stage 0   F0 F1 F2 B0 F3 B1 ...        F: forward pass of a micro-batch, B: backward
    stage 1      F0 F1 B0 F2 B1 F3 ...     1F1B: a stage holds the activations of (stages - its number) micro-batches
    stage 2         F0 B0 F1 B1 ...

Every stage sees all packs of its pipeline, so that only the stream and its gradient travel; losses are computed on the
last stage and told to all. torch.distributed.pipelining runs the schedule.
Source: arXiv 2104.04473, section 2.2.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from tunesmith.errors import ParallelError
from tunesmith.model.decoder import Decoder
from tunesmith.model.packed import PackedTokens, packed
from tunesmith.parallel.mesh import Mesh
from tunesmith.parallel.replicas import SharedSums, Summed
from tunesmith.parallel.spread import Batch, Loss, Piece
from tunesmith.parallel.stages import TIED, cut_decoder, holds_two_copies
from tunesmith.parallel.tensor import own_tokens
from tunesmith.parallel.tensor_spread import around


class Packs(Protocol):
    """A micro-batch: a dataclass with the pack, and how many of its tokens are in the loss."""

    @property
    def pack(self) -> PackedTokens: ...

    @property
    def num_trained(self) -> int: ...


class Piped:
    """A decoder's stage, trained through the pipeline; data-parallel pipelines beside it sum their gradients.

    Where a stage's matrices are shared by several processes, each sends and receives the stream of its own tokens, and
    its losses are those of its own tokens.
    """

    def __init__(self, decoder: Decoder, mesh: Mesh, *, shares_states: bool = False) -> None:
        """Cut `decoder` in place, unless it was when it was loaded.

        Args: shares_states: zero1. Raises: ParallelError when there are fewer blocks than stages, or a stage would
        train nothing.
        """
        cut_decoder(decoder, mesh)
        self.module, self.mesh = decoder, mesh
        shares = shares_states and mesh.size("dp") > 1
        self._replicas = SharedSums(decoder, mesh) if shares else Summed(decoder, mesh)
        self._stage = around(self._replicas, decoder)
        self.kind = "zero1" if shares else "ddp" if mesh.size("dp") > 1 else "none"
        self.num_data = mesh.size("dp")
        self._index, self._count = mesh.index("pp"), mesh.size("pp")
        self._is_last = self._index == self._count - 1
        self._turns = _Turns(decoder, is_last=self._is_last)
        self._schedule: tuple[Any, Any] = (None, None)
        self._has_copy = holds_two_copies(decoder, mesh)
        self._pieces = [self._piece(piece) for piece in self._stage.pieces()]
        self._refuse_idle_stages()

    def _refuse_idle_stages(self) -> None:
        """Also the group's first message, which all of it must take part in."""
        idle = torch.tensor([float(not self._replicas.trained)], device=self.mesh.device)
        torch.distributed.all_reduce(idle, group=self.mesh.group("pp"))
        if idle.item():
            raise ParallelError(
                f"{int(idle.item())} of the pipeline's {self._count} stages would train nothing: train something in "
                f"every block, or set parallel.pipeline to 1"
            )

    def pieces(self) -> list[Piece]:
        """This stage's parameters by the names of the whole decoder; the first stage writes what two stages hold."""
        return list(self._pieces)

    def _piece(self, piece: Piece) -> Piece:
        is_second = self._has_copy and self._is_last and piece.name == TIED
        return replace(piece, is_own=False) if is_second else piece

    def backward(self, function: Loss[Batch], window: Sequence[Batch], factor: float) -> tuple[list[Tensor], list[int]]:
        """All micro-batches (`Packs`) through the pipeline. `function` is called on the last stage only."""
        self._refuse_offloading()
        self._replicas.settle()
        packs = cast(Sequence[Packs], window)
        batches = _of_one_length(packs)
        schedule = self._schedule_for(len(batches), self._rows(batches[0].pack))
        with self._turns.taken(function, batches, factor), _causes():
            if self._is_last:
                schedule.step(target=torch.arange(len(batches)))
            else:
                schedule.step()
        return self._told(self._turns.losses, len(batches)), [batch.num_trained for batch in packs]

    def evaluate(self, function: Loss[Batch], window: Sequence[Batch]) -> tuple[list[Tensor], list[int]]:
        """The losses of micro-batches without gradients, and over how many tokens each is: the same on every stage.

        Packs may have any lengths. All stages call it, with the same packs; data-parallel pipelines need not.
        """
        self._replicas.settle()
        packs = cast(Sequence[Packs], window)
        sent: list[Any] = []
        with torch.no_grad(), self._turns.taken(function, packs, 1.0):
            for batch in packs:
                out = self._turns(*self._received(batch.pack))
                if not self._is_last:
                    self._send(out.contiguous(), sent)
        for work, _ in sent:
            work.wait()
        return self._told(self._turns.losses, len(packs)), [batch.num_trained for batch in packs]

    def _received(self, pack: PackedTokens) -> tuple[Tensor, ...]:
        if self._index == 0:
            return ()
        stream = self._wire(self._rows(pack)).buffer(self.mesh.device)
        torch.distributed.recv(stream, group=self.mesh.group("pp"), group_src=self._index - 1)
        return (stream,)

    def _send(self, stream: Tensor, sent: list[Any]) -> None:
        """While it travels the next one is computed; two are under way at most."""
        work = torch.distributed.isend(stream, group=self.mesh.group("pp"), group_dst=self._index + 1)
        sent.append((work, stream))
        if len(sent) > 1:
            sent.pop(0)[0].wait()

    def _rows(self, pack: PackedTokens) -> int:
        """The rows of the stream that travel."""
        return len(own_tokens(pack.tokens_T.numel(), self.mesh))

    def _wire(self, rows: int) -> Any:
        from tunesmith.parallel.pipeline_stage import Wire

        return Wire(rows, self.module.config.hidden_size, cast(torch.dtype, self.module.compute_dtype))

    def _schedule_for(self, num_micro_batches: int, rows: int) -> Any:
        """Made anew when the shape of a step changes, and only the latest is kept: it holds buffers."""
        from tunesmith.parallel.pipeline_stage import make_schedule

        key = (num_micro_batches, self._wire(rows))
        if self._schedule[0] != key:
            self._schedule = (None, None)
            self._schedule = (key, make_schedule(self._turns, self.mesh, *key))
        return self._schedule[1]

    def _told(self, losses: list[Tensor], count: int) -> list[Tensor]:
        """The last stage's losses, on every stage."""
        told = torch.stack(losses) if self._is_last else torch.zeros(count, device=self.mesh.device)
        torch.distributed.all_reduce(told, group=self.mesh.group("pp"))
        return list(told.unbind())

    def _refuse_offloading(self) -> None:
        if self.module.checkpointing.startswith("offload"):
            raise ParallelError(
                f"train.checkpointing '{self.module.checkpointing}' moves one micro-batch at a time, and a pipeline "
                f"has several under way: use --set train.checkpointing=selective"
            )

    def collect(self) -> None:
        """Sum gradients over the data-parallel pipelines, and at last those of both copies of a tied embedding."""
        self._stage.collect()
        for piece in self._copies:
            self._add_other_copy(piece.local)

    @property
    def _copies(self) -> list[Piece]:
        """What another stage holds too."""
        return [piece for piece in self._pieces if self._has_copy and piece.name == TIED]

    def _add_other_copy(self, weight: nn.Parameter) -> None:
        """Both ends add the same two numbers, and so stay equal bit by bit."""
        from torch.distributed import P2POp, batch_isend_irecv, irecv, isend

        mine = torch.zeros_like(weight) if weight.grad is None else weight.grad.contiguous()
        other, group, peer = torch.empty_like(mine), self.mesh.group("pp"), self._count - 1 - self._index
        messages = [P2POp(isend, mine, group=group, group_peer=peer), P2POp(irecv, other, group=group, group_peer=peer)]
        for work in batch_isend_irecv(messages):
            work.wait()
        weight.grad = other.add_(mine)

    def clear(self) -> None:
        """Let the gradients go."""
        self._stage.clear()

    def norm(self, pieces: Sequence[nn.Parameter]) -> Tensor:
        """Squares are summed over the stages; what two of them hold counts once."""
        second = {id(piece.local) for piece in self._copies if self._is_last}
        squares = self._stage.norm([piece for piece in pieces if id(piece) not in second]).square()
        torch.distributed.all_reduce(squares, group=self.mesh.group("pp"))
        return squares.sqrt()

    def total(self, value: Tensor) -> Tensor:
        """The sum over the data-parallel pipelines, and over the processes that share matrices."""
        return self._stage.total(value)

    def count(self, items: int) -> int:
        """The sum over the data-parallel pipelines."""
        return self._stage.count(items)

    def settle(self) -> None:
        """Before the module's weights are read elsewhere (export): all that other processes updated is here."""
        self._replicas.settle()

    @property
    def device(self) -> torch.device:
        """This process's own."""
        return self.mesh.device


class _Turns(nn.Module):
    """A stage as torch's schedule calls it: the n-th forward pass is that of the n-th micro-batch."""

    def __init__(self, decoder: Decoder, *, is_last: bool) -> None:
        super().__init__()
        self.decoder, self.is_last = decoder, is_last
        self.losses: list[Tensor] = []
        self._next: Iterator[Any] = iter(())
        self._function: Any = None
        self._factor = 1.0

    @contextmanager
    def taken(self, function: Any, window: Sequence[Any], factor: float) -> Iterator[None]:
        """While it lasts, forward passes are those of `window`, and no weight changes between them."""
        self.losses, self._next = [], iter(window)
        self._function, self._factor = function, factor
        promised = self.decoder.has_same_weights
        try:
            yield
        finally:
            self.decoder.has_same_weights = promised
            self._next, self._function = iter(()), None

    def forward(self, *incoming: Tensor) -> Tensor:
        """The stream, or on the last stage the loss times the factor, [1]."""
        batch = next(self._next)
        self.decoder.incoming = incoming[0] if incoming else None
        try:
            out = self._loss(batch) if self.is_last else self._stream(batch)
        finally:
            self.decoder.incoming = None
        self.decoder.has_same_weights = True
        return out

    def _stream(self, batch: Any) -> Tensor:
        out = self.decoder.hidden(batch.pack)
        # The stages behind send a gradient, also where nothing before this point is trained.
        return out if out.requires_grad or not torch.is_grad_enabled() else out.requires_grad_()

    def _loss(self, batch: Any) -> Tensor:
        loss_sum, _ = self._function(self.decoder, batch)
        self.losses.append(loss_sum.detach().float())
        return torch.stack((loss_sum * self._factor,))


def _of_one_length(window: Sequence[Packs]) -> Sequence[Packs]:
    """With an untrained document at the end of packs that are shorter than others: what is sent has one shape."""
    longest = max(batch.pack.tokens_T.numel() for batch in window)
    return [_lengthened(batch, longest - batch.pack.tokens_T.numel()) for batch in window]


def _lengthened(batch: Packs, missing: int) -> Packs:
    if not missing:
        return batch
    tokens = batch.pack.tokens_T
    pack = packed(torch.cat((tokens, tokens.new_zeros(missing))), (*batch.pack.lengths, missing))
    return cast(Packs, replace(cast(Any, batch), pack=pack))


@contextmanager
def _causes() -> Iterator[None]:
    """torch wraps what a stage raises, and a person should read what that was."""
    try:
        yield
    except RuntimeError as error:
        if error.__cause__ is None:
            raise
        raise error.__cause__ from None
