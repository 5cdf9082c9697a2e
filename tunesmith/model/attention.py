"""The seam between the decoder and whoever knows which keys a query may see.

    attend[layer](query_TNH, key_TKH, value_TKH) -> out_TNH

The decoder calls `attend[layer]`; training passes `PackedAttention` (each document sees itself), the inference
engine passes an object that owns pages. The layer's identity is bound in the object, never an argument.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from tunesmith.arch import ModelConfig
from tunesmith.model.attention_choice import choose, shape_of
from tunesmith.model.checkpointing import goes_by_operators
from tunesmith.model.cpu_attention import attend_compiled, attend_held, fits_compiled, fits_held
from tunesmith.model.flex_attention import attend_flex
from tunesmith.model.packed import BoundedPack, PackedTokens
from tunesmith.model.uncompiled import import_uncompiled

AttendLayer = Callable[[Tensor, Tensor, Tensor], Tensor]

REACH = 2**31 - 1
"""Elements that one tensor may span for a kernel that is not ours. cuDNN does not say that its offsets have more than
32 bits, and FlashAttention 2's sums of the queries' gradient have none in versions that torch has shipped."""

MASKED = 1024
"""Queries that go through at a time where they need a mask."""


class Attend(Protocol):
    """Attention for every layer of a decoder."""

    def __getitem__(self, layer: int) -> AttendLayer:
        """The attention of one layer: (query_TNH, key_TKH, value_TKH) -> out_TNH."""


def causal_mask(num_queries: int, num_keys: int, window: int | None, device: torch.device) -> Tensor:
    """Boolean [num_queries, num_keys]: the queries are the last positions; a window counts the query itself."""
    query = torch.arange(num_keys - num_queries, num_keys, device=device)[:, None]
    key = torch.arange(num_keys, device=device)[None, :]
    mask = key <= query
    return mask if window is None else mask & (key > query - window)


def attend_one(query_TNH: Tensor, key_SKH: Tensor, value_SKH: Tensor, window: int | None) -> Tensor:
    """Causal attention of one document: T queries, the last of S >= T positions. Returns out_TNH.

    Of many queries within a window `MASKED` go through at a time, with the keys they see: the mask stays small.
    """
    num_queries, num_heads, _ = query_TNH.shape
    if window is not None and window < key_SKH.shape[0] and num_queries > MASKED:
        first = key_SKH.shape[0] - num_queries
        outs = []
        for start in range(0, num_queries, MASKED):
            end = min(start + MASKED, num_queries)
            seen = slice(max(0, first + start - window + 1), first + end)
            outs.append(attend_one(query_TNH[start:end], key_SKH[seen], value_SKH[seen], window))
        return torch.cat(outs)
    num_keys, num_kv_heads, _ = key_SKH.shape
    plain = num_queries == num_keys and (window is None or window >= num_keys)
    # A lone query sees every key that is in reach, so it needs no mask at all.
    if num_queries == 1 and window is not None:
        key_SKH, value_SKH = key_SKH[-window:], value_SKH[-window:]
    mask = None if plain or num_queries == 1 else causal_mask(num_queries, num_keys, window, query_TNH.device)
    out = F.scaled_dot_product_attention(
        query_TNH.transpose(0, 1)[None],
        key_SKH.transpose(0, 1)[None],
        value_SKH.transpose(0, 1)[None],
        attn_mask=mask,
        is_causal=plain and num_queries > 1,
        enable_gqa=num_heads != num_kv_heads,
    )
    return out[0].transpose(0, 1)


class PackedAttention:
    """Attention over packed documents: every document sees itself only, causally, within the layer's window."""

    def __init__(self, config: ModelConfig, pack: PackedTokens) -> None:
        self.config = config
        self.pack = pack

    def __getitem__(self, layer: int) -> AttendLayer:
        window = self.config.window(layer)

        def attend(query_TNH: Tensor, key_TKH: Tensor, value_TKH: Tensor) -> Tensor:
            if query_TNH.is_cuda and fits_varlen(query_TNH, _capability(query_TNH.device)):
                return self._attend_fastest(query_TNH, key_TKH, value_TKH, window)
            lengths = self.pack.lengths
            sees_all = query_TNH.device.type == "cpu" and (window is None or window >= max(lengths))
            if sees_all and fits_compiled(query_TNH, key_TKH, value_TKH):
                return attend_compiled(query_TNH, key_TKH, value_TKH, lengths)
            if sees_all and len(set(lengths)) == 1:
                holds = fits_held(query_TNH, key_TKH, value_TKH, lengths[0]) and not goes_by_operators()
                attend_even = attend_held if holds else _attend_dense
                return attend_even(query_TNH, key_TKH, value_TKH, lengths[0])
            return _attend_each(query_TNH, key_TKH, value_TKH, lengths, window)

        return attend

    def _attend_fastest(self, query: Tensor, key: Tensor, value: Tensor, window: int | None) -> Tensor:
        """Through the kernel that was measured to be fastest for this shape on this GPU."""
        lengths = self.pack.lengths
        window = None if window is None or window >= self.pack.max_length else window
        if isinstance(self.pack, BoundedPack):
            return within_reach(lambda q, k, v: _attend_varlen(q, k, v, self.pack, window), query, key, value)
        kernels = {
            "varlen": lambda q, k, v: _attend_varlen(q, k, v, self.pack, window),
            "dense-cudnn": lambda q, k, v: _attend_dense(q, k, v, lengths[0], SDPBackend.CUDNN_ATTENTION),
            "dense-flash": lambda q, k, v: _attend_dense(q, k, v, lengths[0], SDPBackend.FLASH_ATTENTION),
            "each-cudnn": lambda q, k, v: _attend_each_dense(q, k, v, lengths, SDPBackend.CUDNN_ATTENTION),
            "flex": lambda q, k, v: attend_flex(q, k, v, self.pack, window),
        }
        shape = shape_of(query, key.shape[1], lengths, window is not None)
        return within_reach(choose(shape, kernels, query, key, value), query, key, value)


def within_reach(kernel: AttendLayer, query: Tensor, key: Tensor, value: Tensor, most: int | None = None) -> Tensor:
    """kernel(query_TNH, key_TKH, value_TKH), given no tensor that spans more than `most` elements (None: REACH).

    A view of a wider activation becomes a tensor of its own; where that is not enough, heads go through in groups,
    each with the keys it reads.
    """
    most = REACH if most is None else most
    tensors = (query, key, value)
    if all(_span(tensor) <= most for tensor in tensors):
        return kernel(query, key, value)
    num_kv_heads = key.shape[1]
    divisors = (n for n in range(1, num_kv_heads + 1) if num_kv_heads % n == 0)
    parts = next((n for n in divisors if query.numel() // n <= most), num_kv_heads)
    groups = zip(*(tensor.chunk(parts, dim=1) for tensor in tensors), strict=True)
    outs = [kernel(*(tensor.contiguous() for tensor in group)) for group in groups]
    return outs[0] if parts == 1 else torch.cat(outs, dim=1)


def _span(tensor: Tensor) -> int:
    """Elements from the first to the last that a tensor reads."""
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def _attend_dense(query: Tensor, key: Tensor, value: Tensor, length: int, backend: SDPBackend | None = None) -> Tensor:
    """Documents of one length, as a batch; `backend` None: torch chooses."""
    num_tokens, num_heads, head_dim = query.shape
    q, k, v = (t.view(num_tokens // length, length, t.shape[1], head_dim).transpose(1, 2) for t in (query, key, value))
    with nullcontext() if backend is None else sdpa_kernel(backend):
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=num_heads != key.shape[1])
    return out.transpose(1, 2).reshape(num_tokens, num_heads, head_dim)


def _attend_each_dense(
    query: Tensor, key: Tensor, value: Tensor, lengths: tuple[int, ...], backend: SDPBackend
) -> Tensor:
    """One document after the other, each through a dense kernel."""
    parts = zip(query.split(lengths), key.split(lengths), value.split(lengths), strict=True)
    return torch.cat([_attend_dense(q, k, v, q.shape[0], backend) for q, k, v in parts])


def _attend_each(query: Tensor, key: Tensor, value: Tensor, lengths: tuple[int, ...], window: int | None) -> Tensor:
    """One document after the other: the reference, and the path of devices without a variable-length kernel."""
    parts = zip(query.split(lengths), key.split(lengths), value.split(lengths), strict=True)
    return torch.cat([attend_one(q, k, v, window) for q, k, v in parts])


def fits_varlen(query_TNH: Tensor, capability: tuple[int, int]) -> bool:
    """Whether the variable-length kernel takes these heads on a GPU of this capability: FlashAttention 2's limits."""
    head_dim = query_TNH.shape[-1]
    in_16_bits = query_TNH.dtype in (torch.float16, torch.bfloat16)
    return in_16_bits and capability >= (8, 0) and head_dim % 8 == 0 and head_dim <= 256


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


@cache
def _varlen_asks_for_gqa() -> bool:
    """Torch 2.11 and 2.12 take fewer key heads as they are; later versions want a flag."""
    return "enable_gqa" in inspect.signature(_varlen().varlen_attn).parameters


@cache
def _varlen() -> Any:
    """The module of FlashAttention's variable-length kernel."""
    return import_uncompiled("torch.nn.attention.varlen")


def _attend_varlen(query: Tensor, key: Tensor, value: Tensor, pack: PackedTokens, window: int | None) -> Tensor:
    """FlashAttention's variable-length kernel through torch."""
    left = -1 if window is None else window - 1
    grouped = query.shape[1] != key.shape[1]
    options: dict[str, Any] = {"enable_gqa": True} if grouped and _varlen_asks_for_gqa() else {}
    out = _varlen().varlen_attn(
        query,
        key,
        value,
        pack.boundaries,
        pack.boundaries,
        pack.max_length,
        pack.max_length,
        window_size=(left, 0),
        **options,
    )
    assert isinstance(out, Tensor)
    return out
