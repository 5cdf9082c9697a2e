"""Which attention kernel is fastest for a shape on this GPU: measured once, forward and backward, then kept on disk.

varlen        FlashAttention 2's variable-length kernel, any packing
dense-cudnn   documents of one length as a batch, through cuDNN
dense-flash   the same through FlashAttention 2
each-cudnn    one document after the other through cuDNN: few long documents of different lengths
flex          torch's FlexAttention, documents of different lengths; compiled first, so only where `offer` allows it

Documents whose lengths only the device knows (packs that are recorded as graphs) have no choice: `varlen` alone takes
their bounds from the device.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cache

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from tunesmith.model.attention_store import store_choice, stored_choice
from tunesmith.model.uncompiled import gradients

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
LONG = 1024
"""A mean document length, in tokens, from which one launch for each document may pay."""
MOST_MEASURED = 65536
"""Tokens from which nothing is measured: it would take minutes and as much memory as a block does. What was fastest
for fewer tokens is taken."""
_ROUNDS = 5


@dataclass(frozen=True)
class AttentionShape:
    """What decides which kernel is fastest. `length`: of every document, or a power of two near the mean."""

    device: str
    dtype: str
    num_heads: int
    num_kv_heads: int
    head_dim: int
    num_tokens: int
    length: int
    is_even: bool
    has_window: bool

    @property
    def candidates(self) -> tuple[str, ...]:
        """The kernels that are right for this shape."""
        more = () if self.is_even else tuple(sorted(_offered))
        if self.has_window:
            return ("varlen", *more)
        if self.is_even:
            return ("varlen", "dense-cudnn", "dense-flash")
        return ("varlen", "each-cudnn", *more) if self.length >= LONG else ("varlen", *more)


_chosen: dict[AttentionShape, tuple[str, dict[str, float]]] = {}
_left_out: set[str] = set()
_offered: set[str] = set()


def offer(kernel: str, wanted: bool) -> None:
    """Whether shapes that are not known yet are measured with this kernel too."""
    (_offered.add if wanted else _offered.discard)(kernel)


def shape_of(query_TNH: Tensor, num_kv_heads: int, lengths: tuple[int, ...], has_window: bool) -> AttentionShape:
    """The shape of an attention over packed documents of these lengths."""
    num_tokens, num_heads, head_dim = query_TNH.shape
    is_even = len(set(lengths)) == 1
    mean = max(1, num_tokens // len(lengths))
    length = lengths[0] if is_even else 1 << (mean.bit_length() - 1)
    return AttentionShape(
        device=_device_name(query_TNH.device),
        dtype=str(query_TNH.dtype).removeprefix("torch."),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        num_tokens=num_tokens,
        length=length,
        is_even=is_even,
        has_window=has_window,
    )


def choose(
    shape: AttentionShape, kernels: Mapping[str, Attention], query: Tensor, key: Tensor, value: Tensor
) -> Attention:
    """The fastest of `kernels` for this shape; measured on copies of these tensors where it is not known yet.

    A kernel that fails on the shape is left out; the first candidate is the one that always runs. Where determinism is
    asked for nothing is measured: a clock may choose otherwise the next time.
    """
    known_right = [name for name in shape.candidates if name in kernels and name not in _left_out]
    candidates = known_right or [name for name in shape.candidates if name in kernels]
    if len(candidates) == 1 or torch.are_deterministic_algorithms_enabled():
        _chosen.setdefault(shape, (candidates[0], {}))
        return kernels[candidates[0]]
    if shape not in _chosen and shape.num_tokens > MOST_MEASURED:
        _chosen[shape] = (_of_fewer_tokens(shape) or candidates[0], {})
    if shape not in _chosen:
        if torch.cuda.is_current_stream_capturing():
            return kernels[candidates[0]]
        _chosen[shape] = stored_choice(asdict(shape), tuple(candidates)) or _measured(
            shape, {name: kernels[name] for name in candidates}, query, key, value
        )
    return kernels[_chosen[shape][0]]


def _measured(
    shape: AttentionShape, kernels: Mapping[str, Attention], query: Tensor, key: Tensor, value: Tensor
) -> tuple[str, dict[str, float]]:
    times = {name: _time(kernel, query, key, value) for name, kernel in kernels.items()}
    known = {name: duration for name, duration in times.items() if duration is not None}
    if not known:
        return next(iter(kernels)), {}
    fastest = min(known, key=lambda name: known[name])
    store_choice(asdict(shape), tuple(kernels), fastest, known)
    return fastest, known


def leave_out(kernel: str) -> bool:
    """Choose this kernel no more in this process, since it was found to be wrong for a shape. False: it was out.

    Where it was chosen, the fastest that was measured beside it stands in.
    """
    was_in = kernel not in _left_out
    _left_out.add(kernel)
    for shape, (chosen, times) in list(_chosen.items()):
        others = {name: duration for name, duration in times.items() if name not in _left_out}
        if chosen != kernel:
            continue
        if others:
            _chosen[shape] = (min(others, key=lambda name: others[name]), others)
        else:
            del _chosen[shape]
    return was_in


def _of_fewer_tokens(shape: AttentionShape) -> str | None:
    """What was chosen for the longest shape that is otherwise the same."""
    alike = [
        known for known in _chosen if replace(known, num_tokens=0, length=0) == replace(shape, num_tokens=0, length=0)
    ]
    return _chosen[max(alike, key=lambda known: known.num_tokens)][0] if alike else None


def choices() -> list[dict[str, object]]:
    """What was chosen in this process: the shape, the kernel, and the milliseconds of every candidate."""
    return [{**asdict(shape), "kernel": kernel, "milliseconds": times} for shape, (kernel, times) in _chosen.items()]


def describe_choices() -> str:
    """The choices as JSON text, for the run directory."""
    return json.dumps(choices(), indent=1)


def _time(kernel: Attention, query: Tensor, key: Tensor, value: Tensor) -> float | None:
    """Milliseconds of one forward and backward pass, the least of a few; None where the kernel fails."""
    tensors = [tensor.detach().clone().requires_grad_() for tensor in (query, key, value)]
    try:
        # Whatever watches the surrounding graph (gradient checkpointing, say) must not see these tensors.
        with torch.enable_grad(), saved_tensors_hooks(_as_it_is, _as_it_is):
            return min(_time_once(kernel, tensors) for _ in range(_ROUNDS))
    except RuntimeError:
        return None


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


def _time_once(kernel: Attention, tensors: list[Tensor]) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    out = kernel(*tensors)
    gradients(out, tensors, torch.ones_like(out))
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))


@cache
def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
