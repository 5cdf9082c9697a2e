"""Optimiser states in host memory: they come to the device piece by piece for the update, and go back.

    to the device   1 | 2 | 3 | 4 | ...
    update              1 | 2 | 3 | ...
    to the host             1 | 2 | ...

Copies of the two directions have a stream each, so that an update lasts as long as its states take one way. It is the
ordinary optimiser that updates, on the device, handed views of the parameters: the same bits come out. What is small,
and every step counter, stays on the device.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tunesmith.cost.memory import LEAST_MOVED_BYTES
from tunesmith.kernels.adam8bit_moments import BLOCK
from tunesmith.model.transfer import Transfer
from tunesmith.train.optimizers import guarded_step, initial_state
from tunesmith.units import MIB, ceil_div

PIECE_BYTES = 256 * MIB
"""Of states that travel together. A part of a weight has an eighth of so many bytes at least, which must stay above
`adamw.LARGE_BYTES`: what is smaller another kernel updates, to other bits."""
AHEAD = 6
"""Pieces that may be under way in a direction where parameters are updated one by one: gradients come several at a
time, with products between them."""
_STEP_OF_PARTS = 2048
"""Parts begin at multiples of so many values: at blocks of 8-bit states, and where kernels load widest."""


@dataclass(frozen=True, eq=False)
class _Part:
    """Values [start, stop) of a parameter, as the optimiser is handed them."""

    parameter: Tensor
    start: int
    stop: int
    is_moved: bool

    @property
    def is_whole(self) -> bool:
        return self.stop - self.start == self.parameter.numel()

    @property
    def is_last(self) -> bool:
        return self.stop == self.parameter.numel()

    def is_same(self, other: _Part) -> bool:
        return self.parameter is other.parameter and (self.start, self.stop) == (other.start, other.stop)

    def view(self) -> Tensor:
        """What is updated; its gradient is the part's."""
        if self.is_whole:
            return self.parameter
        assert self.parameter.grad is not None
        view = self.parameter.detach().view(-1)[self.start : self.stop]
        view.grad = self.parameter.grad.reshape(-1)[self.start : self.stop]
        return view

    def of(self, state: Tensor) -> Tensor:
        """The part's values of one of the parameter's states, or its blocks of them."""
        if self.is_whole:
            return state
        flat = state.view(-1)
        if flat.numel() == self.parameter.numel():
            return flat[self.start : self.stop]
        return flat[self.start // BLOCK : ceil_div(self.stop, BLOCK)]


_Piece = Sequence[_Part]


@dataclass
class _Flight:
    """A piece on its way to the device, there, or on its way back. arriving: of each part, its states there by name."""

    parts: _Piece
    arriving: list[dict[str, Tensor]] = field(default_factory=list)
    ticket: Any = None

    def is_of(self, piece: _Piece) -> bool:
        return len(self.parts) == len(piece) and all(map(_Part.is_same, self.parts, piece))

    def touches(self, piece: _Piece) -> bool:
        """Whether they have a parameter in common."""
        own = {id(part.parameter) for part in self.parts}
        return any(id(part.parameter) in own for part in piece)


class HostStates(torch.optim.Optimizer):
    """`inner`, with its states on the host: `state` and `param_groups` are what they would be but for the place.

    Takes `grad_scale` and `found_inf` as `inner` does. The host does not wait for the device: call `settle` before
    states are read.

    Args:
        incoming, outgoing: copies to the device, and from it. allocate: host memory for them, uint8 [num_bytes].
        one_by_one: `step` is called for one parameter after the other, in the same order every time: states are on
            their way while the gradients they are for are still computed.
    """

    def __init__(
        self,
        inner: torch.optim.Optimizer,
        incoming: Transfer,
        outgoing: Transfer,
        allocate: Callable[[int], Tensor],
        *,
        one_by_one: bool = False,
        piece_bytes: int = PIECE_BYTES,
        least_bytes: int = LEAST_MOVED_BYTES,
    ) -> None:
        super().__init__(inner.param_groups, inner.defaults)
        self.inner = inner
        self._incoming, self._outgoing, self._allocate = incoming, outgoing, allocate
        self._one_by_one = one_by_one
        self._piece_bytes, self._least_bytes = piece_bytes, least_bytes
        self._coming: list[_Flight] = []
        self._leaving: deque[_Flight] = deque()
        self._after: dict[Tensor, Tensor] = {}
        self._before: Tensor | None = None
        self._buffers: list[Tensor] = []

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        groups = {id(p): group for group in self.param_groups for p in group["params"] if p.grad is not None}
        trained = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        pieces = list(self._pieces(trained))
        try:
            for number, piece in enumerate(pieces):
                self._note_order(piece)
                flight = self._arrived(piece)
                self._release(keep=AHEAD if self._one_by_one else 1)
                self._fetch_ahead(piece, pieces[number + 1 :])
                self._update(flight, groups)
                if flight.ticket is not None:
                    self._leaving.append(flight)
            if not self._one_by_one:
                self._release(keep=0)
        except BaseException:
            self._land()
            raise

    def settle(self) -> None:
        """Wait, on the host, until the states there are those after all updates, and nothing is under way."""
        self._land()
        for device in {parameter.device for parameter in self.state}:
            if device.type == "cuda":
                torch.cuda.synchronize(device)

    def forget(self) -> None:
        """There are no states any more: others will be set, of what `placed` returns."""
        self.settle()
        self.state.clear()
        self._buffers.clear()

    @torch.no_grad()
    def placed(self, parameter: Tensor, value: Any) -> Any:
        """A value of a parameter's state, where it waits."""
        if not isinstance(value, Tensor):
            return value
        if not self.is_on_host(parameter, value):
            return value.to(parameter.device)
        buffer = self._allocate(value.nbytes)
        self._buffers.append(buffer)  # memory is pinned for as long as the buffer itself is there: not for its views
        return buffer.view(value.dtype).view(value.shape).copy_(value)

    def is_moved(self, parameter: Tensor) -> bool:
        """Whether the states of a parameter wait on the host."""
        return parameter.nbytes >= self._least_bytes

    def is_on_host(self, parameter: Tensor, value: Any) -> bool:
        """Whether a value of the parameter's state waits there: no step counter does."""
        return self.is_moved(parameter) and isinstance(value, Tensor) and value.ndim > 0

    @property
    def host_bytes(self) -> int:
        """Host memory that the states have taken."""
        return sum(buffer.numel() for buffer in self._buffers)

    def _pieces(self, parameters: Sequence[Tensor]) -> Iterator[list[_Part]]:
        """All parts of parameters, in pieces of about `piece_bytes`; what stays on the device weighs nothing."""
        piece: list[_Part] = []
        weight = 0
        for part in (part for parameter in parameters for part in self._parts(parameter)):
            added = self._moved_bytes(part)
            if piece and weight + added > self._piece_bytes:
                yield piece
                piece, weight = [], 0
            piece.append(part)
            weight += added
        if piece:
            yield piece

    def _parts(self, parameter: Tensor) -> list[_Part]:
        count = parameter.numel()
        whole = _Part(parameter, 0, count, self.is_moved(parameter))
        wanted = ceil_div(self._moved_bytes(whole), self._piece_bytes)
        if wanted < 2 or not parameter.is_contiguous():
            return [whole]
        size = _STEP_OF_PARTS * ceil_div(count, wanted * _STEP_OF_PARTS)
        starts = list(range(0, count, size))
        if 2 * (count - starts[-1]) < size:
            starts.pop()  # the optimiser may update a short part otherwise than a long one
        return [_Part(parameter, start, stop, True) for start, stop in zip(starts, [*starts[1:], count], strict=True)]

    def _moved_bytes(self, part: _Part) -> int:
        """Two moments in the parameter's dtype, or less."""
        return 2 * (part.stop - part.start) * part.parameter.element_size() if part.is_moved else 0

    def _note_order(self, piece: _Piece) -> None:
        """Which parameter follows which, where they come one by one."""
        for parameter in [part.parameter for part in piece if part.is_moved] if self._one_by_one else ():
            if self._before is not None and self._before is not parameter:
                self._after[self._before] = parameter
            self._before = parameter

    def _fetch_ahead(self, piece: _Piece, rest: Sequence[_Piece]) -> None:
        """Fetch what follows `piece`: the next of this step, or a few where the next call is foreseen."""
        if not self._one_by_one:
            self._coming += [self._fetch(following) for following in rest[:1]]
            return
        for following in (*rest, *self._foreseen(piece[-1].parameter)):
            if len(self._coming) >= AHEAD:
                return
            if not any(flight.is_of(following) for flight in self._coming):
                self._coming.append(self._fetch(following))

    def _foreseen(self, parameter: Tensor) -> Iterator[_Piece]:
        """The pieces of the parameters that followed this one the last time, until it comes again."""
        following = self._after.get(parameter)
        for _ in range(AHEAD):
            if following is None or following is parameter:
                return
            yield from self._pieces([following])
            following = self._after.get(following)

    def _arrived(self, piece: _Piece) -> _Flight:
        """The piece, which was fetched ahead or is fetched now; updates that are queued from now on find it there."""
        flight = next((flight for flight in self._coming if flight.is_of(piece)), None)
        if flight is None:
            flight = self._fetch(piece)
        else:
            self._coming.remove(flight)
        self._wait(self._incoming, flight)
        return flight

    def _fetch(self, piece: _Piece) -> _Flight:
        """Queue the copies of a piece's states to the device."""
        while any(flight.touches(piece) for flight in self._leaving):
            self._release(keep=len(self._leaving) - 1)
        flight, pairs = _Flight(piece), []
        for part in piece:
            held = self._held(part.parameter)
            moved = {name: part.of(value) for name, value in held.items() if self.is_on_host(part.parameter, value)}
            arriving = {name: torch.empty_like(value, device=part.parameter.device) for name, value in moved.items()}
            pairs += [(arriving[name], value) for name, value in moved.items()]
            flight.arriving.append(arriving)
        flight.ticket = self._incoming.copy(pairs) if pairs else None
        return flight

    def _update(self, flight: _Flight, groups: dict[int, dict[str, Any]]) -> None:
        """The ordinary update of what is there; then queue the copies back."""
        chosen: dict[int, tuple[dict[str, Any], list[Tensor]]] = {}
        counted = []
        for part, arriving in zip(flight.parts, flight.arriving, strict=True):
            view, states = part.view(), self._states_of(part, arriving)
            counted.append(states)
            self.inner.state[view] = states
            group = groups[id(part.parameter)]
            chosen.setdefault(id(group), (group, []))[1].append(view)
        own = self.inner.param_groups
        self.inner.param_groups = [{**group, "params": views} for group, views in chosen.values()]
        try:
            self._step_inner()
        finally:
            self.inner.param_groups = own
            self.inner.state.clear()
        pairs = []
        for part, arriving, states in zip(flight.parts, flight.arriving, counted, strict=True):
            held = self.state[part.parameter]
            pairs += [(part.of(held[name]), value) for name, value in arriving.items()]
            if part.is_last:
                held.update({name: value for name, value in states.items() if name not in arriving})
        flight.ticket = self._outgoing.copy(pairs) if pairs else None

    def _states_of(self, part: _Part, arriving: dict[str, Tensor]) -> dict[str, Any]:
        """What the optimiser finds as the part's states. Every part counts the step by itself; the last one's stays."""
        held = self.state[part.parameter]
        counters = {name: value for name, value in held.items() if name not in arriving}
        if not part.is_whole:
            counters = {n: value.clone() if isinstance(value, Tensor) else value for n, value in counters.items()}
        return {**counters, **arriving}

    def _step_inner(self) -> None:
        divisor, stopped = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        if divisor is None or stopped is None:
            self.inner.step()
        else:
            guarded_step(self.inner, divisor, stopped)

    def _release(self, keep: int) -> None:
        """Let the device's copies go but those of the last `keep` pieces, once they are on the host."""
        while len(self._leaving) > keep:
            self._wait(self._outgoing, self._leaving.popleft())

    def _land(self) -> None:
        """No copy is under way any more, for whatever the device is given from now on."""
        for flight in self._coming:
            self._wait(self._incoming, flight)
        self._coming.clear()
        self._release(keep=0)

    def _wait(self, transfer: Transfer, flight: _Flight) -> None:
        if flight.ticket is not None:
            transfer.wait(flight.ticket)
            flight.ticket = None

    def _held(self, parameter: Tensor) -> dict[str, Any]:
        """The states of a parameter where they wait; those that it begins with, where it has none yet."""
        if not self.state[parameter]:
            like = torch.empty_like(parameter, device="cpu") if self.is_moved(parameter) else parameter
            begun = initial_state(self.inner, like)
            self.state[parameter] = {name: self.placed(parameter, value) for name, value in begun.items()}
        return self.state[parameter]
