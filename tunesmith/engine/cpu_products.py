"""A linear's product on a CPU in the layout that is fastest there, made once from its weight.

float32     the weight itself is laid out by columns (its parameter keeps shape and values): no second copy
bfloat16    a second copy in oneDNN's own blocks, which its matrix instructions read without rearranging anything

Measured on one core of a Xeon with AMX, [9728, 896]: bfloat16 as it lies 1.3 ms for 1 to 16 rows, in blocks 0.75 ms;
float32 for 4 rows 2.5 ms by rows and 1.6 ms by columns. A module that is no plain linear is called as it is.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import psutil
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tunesmith.engine.cpu_int4 import Int4Table
from tunesmith.engine.cpu_int8 import int8_of
from tunesmith.kernels.gemv import CPU_TOKENS, dense_product
from tunesmith.model.held import HeldLinear
from tunesmith.model.int4 import Int4Linear
from tunesmith.model.int8 import Int8Linear
from tunesmith.model.layers import Linear

_PACKED_FOR_ROWS = 16
_WIDE_HEAD_ROWS = 3
_HEAD_SHARE = 0.25
"""A second copy of a float32 head may take this share of the memory that is free."""


@dataclass(frozen=True)
class Product:
    """plain: y = x @ weight.T + bias; added: the same added to a stream, which may be written over."""

    plain: Callable[[Tensor], Tensor]
    added: Callable[[Tensor, Tensor], Tensor]


def product_of(linear: nn.Module, dtype: torch.dtype, packs: bool, library: ctypes.CDLL | None = None) -> Product:
    """How to multiply by this linear.

    packs: its weight never changes, and may be laid out anew: in float32 where there is no library, which reads weights
    as they lie. library: our own C++ (kernels/cpu_library.py).
    """
    if packs and type(linear) is Int8Linear and not linear.has_int8_products:
        int8 = int8_of(linear)
        return Product(int8, lambda x, stream: stream.add_(int8(x)))
    if packs and library is not None and type(linear) is Int4Linear and linear.shell is None and linear.order is None:
        int4 = _int4_of(linear, library)
        return Product(int4, lambda x, stream: stream.add_(int4(x)))
    if packs and isinstance(linear, HeldLinear) and linear.shell is None:
        held = linear.product  # without the function that gradients need
        return Product(held, lambda x, stream: stream + held(x))
    if type(linear) is not Linear or not packs or linear.weight.dtype != dtype:
        return _as_it_is(linear)
    if dtype == torch.float32:
        return _by_columns(linear) if library is None else _as_it_is(linear)
    if dtype == torch.bfloat16 and can_pack():
        return _packed(pack(linear.weight), linear.bias)
    return _as_it_is(linear)


def gated_of(
    linear: nn.Module, dtype: torch.dtype, packs: bool, library: ctypes.CDLL | None = None
) -> Callable[[Tensor], Tensor]:
    """silu(gate) * up of a fused gate-up linear."""
    if type(linear) is Linear and packs and linear.weight.dtype == dtype == torch.bfloat16 and can_pack():
        gate, up = (pack(half) for half in linear.weight.detach().chunk(2))
        gate_bias, up_bias = (None, None) if linear.bias is None else linear.bias.detach().chunk(2)
        ops: Any = torch.ops.mkldnn._linear_pointwise

        def fused(x: Tensor) -> Tensor:
            return ops.binary(x, ops(x, gate, gate_bias, "swish", [], ""), up, up_bias, "mul")

        return fused
    product = product_of(linear, dtype, packs, library).plain

    def gated(x: Tensor) -> Tensor:
        gate, up = product(x).chunk(2, dim=-1)
        return F.silu(gate, inplace=True).mul_(up)

    return gated


def head_of(weight_VD: Tensor, dtype: torch.dtype, packs: bool) -> Callable[[Tensor], Tensor]:
    """The product by an embedding that is the head too, which must stay as it lies: rows are looked up in it."""
    weight_VD = weight_VD.detach()
    if not packs or weight_VD.dtype != dtype or not can_pack():
        return lambda x: F.linear(x, weight_VD.to(x.dtype))
    if dtype == torch.bfloat16:
        return _packed(pack(weight_VD), None).plain
    if dtype != torch.float32 or weight_VD.nbytes > _HEAD_SHARE * psutil.virtual_memory().available:
        return lambda x: F.linear(x, weight_VD.to(x.dtype))
    packed = _packed(pack(weight_VD), None).plain
    return lambda x: F.linear(x, weight_VD) if x.shape[0] < _WIDE_HEAD_ROWS else packed(x)


def _as_it_is(linear: nn.Module) -> Product:
    return Product(linear, lambda x, stream: stream + linear(x))


def _int4_of(linear: Int4Linear, library: ctypes.CDLL) -> Callable[[Tensor], Tensor]:
    """y_TF = x @ weight.T + bias: of many tokens by the weight in bfloat16, which is made for each product."""
    weight = Int4Table(linear)

    def run(x: Tensor) -> Tensor:
        if x.shape[0] <= CPU_TOKENS["int4"]:
            return linear.product(x)
        return dense_product(x, weight.widened(library), linear.bias)

    return run


def _by_columns(linear: Linear) -> Product:
    linear.weight.data = linear.weight.data.t().contiguous().t()
    weight_DF = linear.weight.detach().t()
    bias = None if linear.bias is None else linear.bias.detach()
    if bias is None:
        return Product(lambda x: torch.mm(x, weight_DF), lambda x, stream: stream.addmm_(x, weight_DF))
    return Product(lambda x: torch.addmm(bias, x, weight_DF), lambda x, stream: stream.addmm_(x, weight_DF).add_(bias))


def _packed(weight: Tensor, bias: Tensor | None) -> Product:
    ops: Any = torch.ops.mkldnn._linear_pointwise
    bias = None if bias is None else bias.detach()
    return Product(
        lambda x: ops(x, weight, bias, "none", [], ""), lambda x, stream: ops.binary(x, stream, weight, bias, "add")
    )


def pack(weight_FD: Tensor) -> Tensor:
    """The weight in oneDNN's blocks."""
    return torch.ops.mkldnn._reorder_linear_weight(weight_FD.detach().contiguous(), _PACKED_FOR_ROWS)


@cache
def can_pack() -> bool:
    """Whether this build of torch packs weights for oneDNN and multiplies by them, in float32 and bfloat16."""
    try:
        for dtype in (torch.float32, torch.bfloat16):
            x, weight = torch.ones(2, 8, dtype=dtype), torch.ones(4, 8, dtype=dtype)
            y = _packed(pack(weight), None)
            if not torch.equal(y.plain(x), torch.full((2, 4), 8.0, dtype=dtype)):
                return False
    except (AttributeError, RuntimeError):
        return False
    return True
