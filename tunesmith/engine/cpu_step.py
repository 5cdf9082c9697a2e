"""A decoding step compiled from our own C++ (kernels/cpu_step.cpp): what a decoder's weights are to it, and its call.

It takes up to `MOST_TOKENS` sequences with one new token each, of a dense decoder with RMSNorm and SwiGLU whose weights
are float32, bfloat16, int8 by rows or int4 by groups, and reads keys and values from the pages. Weights are read where
they lie: only scales and norms are copied, and the adapter of one that has one, in the dtype it is computed in. Where
the decoder computes in bfloat16 and has no adapters, on processors with AVX-512 for it, steps of any number of tokens
are taken (cpu_prompt.hpp).
"""

from __future__ import annotations

import ctypes
import sys
import weakref
from typing import Any, cast

import torch
from torch import Tensor, nn

from tunesmith.engine.batch import StepBatch
from tunesmith.engine.pages import PagedCache
from tunesmith.model.block import Block, Mlp
from tunesmith.model.decoder import Decoder
from tunesmith.model.int4 import Int4Linear
from tunesmith.model.int8 import Int8Linear
from tunesmith.model.layers import Linear, RMSNorm
from tunesmith.model.lora import AdaptedLinear

MOST_TOKENS = 16
_MOST_CODES_TOKENS = 8
"""Where there is no matrix unit: for more tokens codes are widened first, by us or, of int8, by torch."""
_FLOAT_KINDS = {torch.float32: 0, torch.bfloat16: 1}
_INT8, _INT4 = 2, 3
_NO_MEMORY = -2
_I64, _POINTER = ctypes.c_int64, ctypes.c_void_p


class Weight(ctypes.Structure):
    """A linear's weight, as it is held."""

    _fields_ = [
        *((name, _I64) for name in ("kind", "rows", "width", "group")),
        *((name, _POINTER) for name in ("data", "scale", "zeros", "bias")),
    ]


class _LowRankPart(ctypes.Structure):
    _fields_ = [*((name, _I64) for name in ("row", "rows", "column", "rank", "is_half")), ("up", _POINTER)]


class _LowRank(ctypes.Structure):
    _fields_ = [("down", Weight), ("num_parts", _I64), ("parts", _POINTER)]


class _Linear(ctypes.Structure):
    _fields_ = [("weight", Weight), ("low", _POINTER)]


class _Layer(ctypes.Structure):
    _fields_ = [
        *((name, _POINTER) for name in ("attention_norm", "mlp_norm", "query_norm", "key_norm")),
        *((name, _Linear) for name in ("qkv", "output", "up", "down")),
        ("keys", _POINTER),
        ("values", _POINTER),
        ("window", _I64),
    ]


class _Model(ctypes.Structure):
    _fields_ = [
        *(
            (name, _I64)
            for name in ("num_layers", "width", "heads", "kv_heads", "head_dim", "inner", "page_slots", "is_half")
        ),
        ("vocab", _I64),
        ("is_half_table", _I64),
        ("eps", ctypes.c_float),
        ("head_eps", ctypes.c_float),
        ("final_norm", _POINTER),
        ("inverse", _POINTER),
        ("table", _POINTER),
        ("layers", _POINTER),
    ]


class _Step(ctypes.Structure):
    _fields_ = [
        *((name, _POINTER) for name in ("ids", "last_ids", "logits", "head")),
        *((name, _POINTER) for name in ("positions", "slots", "contexts", "tables")),
        *((name, _I64) for name in ("table_ld", "tokens", "threads")),
    ]


class _Prompts(ctypes.Structure):
    _fields_ = [
        *((name, _POINTER) for name in ("ids", "hidden", "positions", "slots", "starts", "contexts", "tables")),
        *((name, _I64) for name in ("table_ld", "requests", "tokens", "threads")),
    ]


class CpuStep:
    """The compiled step of one decoder over one cache, whose tensors stay where they are as long as this is used."""

    def __init__(self, library: ctypes.CDLL, decoder: Decoder, cache: PagedCache, dtype: torch.dtype) -> None:
        self.library, self.cache, self.dtype = library, cache, dtype
        self._kept: list[Any] = [decoder, cache]
        config = decoder.config
        blocks = [cast(Block, block) for block in decoder.blocks]
        layers = (_Layer * len(blocks))(*(self._layer(block, index) for index, block in enumerate(blocks)))
        first, table = blocks[0], decoder.embedding.weight.detach()
        self._width = config.hidden_size
        head_norm = first.attention.q_norm
        model = _Model(
            num_layers=len(blocks),
            width=config.hidden_size,
            heads=first.attention.num_heads,
            kv_heads=first.attention.num_kv_heads,
            head_dim=first.attention.head_dim,
            inner=cast(Mlp, first.mlp).down.in_features,
            page_slots=cache.keys[0].shape[1],
            is_half=dtype == torch.bfloat16,
            vocab=len(table),
            is_half_table=table.dtype == torch.bfloat16,
            eps=cast(RMSNorm, decoder.norm).eps,
            head_eps=0.0 if head_norm is None else cast(RMSNorm, head_norm).eps,
            final_norm=self._norm(decoder.norm),
            inverse=None if config.rope is None else self._floats(decoder._inverse(torch.device("cpu"))),
            table=self._keep(table),
            layers=ctypes.cast(layers, _POINTER),
        )
        self._head = self._weight_of_head(decoder)
        self._head_place = ctypes.addressof(self._head)
        self._decoder = library.tunesmith_decoder(ctypes.byref(model))
        if self._decoder is None:
            raise MemoryError("no memory for a decoder's buffers")
        self.takes_prompts = bool(library.tunesmith_takes_prompts(self._decoder))
        self.most_tokens = min(self._most_tokens(layer.up.weight.kind) for layer in layers)
        self.most_logits = sys.maxsize if self.takes_prompts else self._most_tokens(self._head.kind)
        self._ends = weakref.finalize(self, library.tunesmith_forget, self._decoder)
        self._ends.atexit = False

    def __call__(self, batch: StepBatch, last_ids: Tensor) -> Tensor:
        """logits_TV of the batch's tokens; keys and values are in their pages.

        last_ids: int64, by slot, what tokens below zero stand for. Raises: IndexError, MemoryError.
        """
        num = batch.num_tokens
        logits = torch.empty(num, self._head.rows, dtype=self.dtype)
        step = _Step(
            batch.tokens_T.data_ptr(),
            last_ids.data_ptr(),
            logits.data_ptr(),
            self._head_place,
            batch.positions_T.data_ptr(),
            batch.slots_T.data_ptr(),
            batch.context_R.data_ptr(),
            batch.block_tables_RP.data_ptr(),
            batch.block_tables_RP.stride(0),
            num,
            torch.get_num_threads(),
        )
        _check(self.library.tunesmith_step(self._decoder, ctypes.byref(step)), num)
        return logits

    def prompts(self, tokens_T: Tensor, batch: StepBatch) -> Tensor:
        """hidden_TD behind the last norm of a step with any number of new tokens a request, where `takes_prompts`.

        Keys and values are in their pages. Raises: IndexError, MemoryError.
        """
        ids, tables, num = tokens_T.contiguous(), batch.block_tables_RP, len(tokens_T)
        hidden = torch.empty(num, self._width, dtype=self.dtype)
        given = _Prompts(
            ids.data_ptr(),
            hidden.data_ptr(),
            batch.positions_T.data_ptr(),
            batch.slots_T.data_ptr(),
            batch.query_starts_R1.data_ptr(),
            batch.context_R.data_ptr(),
            tables.data_ptr(),
            tables.stride(0),
            len(batch.context_R),
            num,
            torch.get_num_threads(),
        )
        _check(self.library.tunesmith_prompts(self._decoder, ctypes.byref(given)), num)
        return hidden

    def logits(self, hidden_TD: Tensor) -> Tensor:
        """logits_TV in the dtype of the hidden states, of up to `most_logits` tokens. Raises: MemoryError."""
        hidden = hidden_TD.contiguous()
        out = hidden.new_empty(len(hidden), self._head.rows)
        places = hidden.data_ptr(), out.data_ptr()
        threads = torch.get_num_threads()
        status = self.library.tunesmith_multiply(self._decoder, ctypes.byref(self._head), *places, len(hidden), threads)
        _check(status, len(hidden))
        return out

    def _most_tokens(self, kind: int) -> int:
        widened = (_INT8, _INT4) if self.takes_prompts else (_INT8,)
        return _MOST_CODES_TOKENS if kind in widened and not self.library.tunesmith_has_tiles() else MOST_TOKENS

    def _layer(self, block: Block, index: int) -> _Layer:
        attention, mlp = block.attention, cast(Mlp, block.mlp)
        return _Layer(
            attention_norm=self._norm(block.attention_norm),
            mlp_norm=self._norm(block.mlp_norm),
            query_norm=self._norm(attention.q_norm),
            key_norm=self._norm(attention.k_norm),
            qkv=self._linear(attention.qkv),
            output=self._linear(attention.output),
            up=self._linear(mlp.up),
            down=self._linear(mlp.down),
            keys=self.cache.keys[index].data_ptr(),
            values=self.cache.values[index].data_ptr(),
            window=self.cache.config.window(index) or 0,
        )

    def _norm(self, norm: nn.Module | None) -> int | None:
        return None if norm is None else self._floats(cast(RMSNorm, norm).weight)

    def _floats(self, values: Tensor) -> int:
        return self._keep(values.detach().float().contiguous())

    def _keep(self, tensor: Tensor) -> int:
        self._kept.append(tensor)
        return tensor.data_ptr()

    def _weight_of_head(self, decoder: Decoder) -> Weight:
        if decoder.head is not None:
            return self._weight(decoder.head)
        weight = decoder.embedding.weight.detach()
        return Weight(_FLOAT_KINDS[weight.dtype], *weight.shape, 0, self._keep(weight), None, None, None)

    def _linear(self, linear: nn.Module) -> _Linear:
        if not isinstance(linear, AdaptedLinear):
            return _Linear(self._weight(linear), None)
        weight = self._weight(linear.base)
        ratio_F = linear._ratio(*linear._fused_adapters(self.dtype)).detach() if linear.is_dora else None
        if ratio_F is not None:
            weight.scale = self._floats(ratio_F if weight.scale is None else self._scales(linear.base, ratio_F))
        return _Linear(weight, ctypes.addressof(self._low_rank(linear, weight.kind, ratio_F)))

    @staticmethod
    def _scales(base: nn.Module, ratio_F: Tensor) -> Tensor:
        """A quantised weight's scales of its rows, each with its row's factor in it."""
        if isinstance(base, Int8Linear):
            return base.scale.float() * ratio_F.view_as(base.scale)
        return cast(Int4Linear, base).scales.float() * ratio_F[:, None]

    def _low_rank(self, linear: AdaptedLinear, kind: int, ratio_F: Tensor | None) -> _LowRank:
        """A and scale * B of every projection, rounded as torch's pass rounds them. ratio_F: DoRA's factor of rows."""
        downs, parts, column = [], [], 0
        for name, rows in ((name, linear.rows(name)) for name in linear.parts if name in linear.adapters):
            adapter = linear.adapter(name)
            up = (adapter.B * adapter.options.scale).detach().t().to(self.dtype)
            up = (up if ratio_F is None else up.float() * ratio_F[rows]).contiguous()
            rank, num_rows = up.shape
            is_half = up.dtype == torch.bfloat16
            parts.append(_LowRankPart(rows.start, num_rows, column, rank, is_half, self._keep(up)))
            downs.append(adapter.A.detach().to(self.dtype))
            column += rank
        # Beside a weight in codes A reads the input as it is; beside others in the form that the weight reads.
        down = torch.cat(downs).to(torch.bfloat16 if kind == _FLOAT_KINDS[torch.bfloat16] else torch.float32)
        place = Weight(_FLOAT_KINDS[down.dtype], *down.shape, 0, self._keep(down), None, None, None)
        held = (_LowRankPart * len(parts))(*parts)
        low = _LowRank(place, len(parts), ctypes.cast(held, _POINTER))
        self._kept += [held, low]
        return low

    def _weight(self, linear: nn.Module) -> Weight:
        bias = cast("nn.Parameter | None", linear.bias)
        place = None if bias is None else self._floats(bias)
        if isinstance(linear, Int8Linear):
            codes = self._keep(linear.codes)
            return Weight(_INT8, *linear.codes.shape, 0, codes, self._floats(linear.scale), None, place)
        if isinstance(linear, Int4Linear):
            return int4_weight(linear, self._kept)
        weight = cast(Linear, linear).weight.detach()
        return Weight(_FLOAT_KINDS[weight.dtype], *weight.shape, 0, self._keep(weight), None, None, place)


def _check(status: int, num_tokens: int) -> None:
    if status == _NO_MEMORY:
        raise MemoryError(f"no memory for a step of {num_tokens} tokens")
    if status:
        raise IndexError("a token is none of the vocabulary's")


def int4_weight(linear: Int4Linear, kept: list[Any]) -> Weight:
    """An int4 linear's weight. kept: is given what must stay as long as it is used."""
    scales = linear.scales.detach().float().contiguous()
    bias = None if linear.bias is None else linear.bias.detach().float().contiguous()
    tensors = (linear.words, scales, linear.zeros, bias)
    kept += [tensor for tensor in tensors if tensor is not None]
    places = (None if tensor is None else tensor.data_ptr() for tensor in tensors)
    return Weight(_INT4, linear.out_features, linear.in_features, linear.group_size, *places)


def takes(decoder: Decoder, dtype: torch.dtype) -> bool:
    """Whether this decoder in this dtype is of the kind that the compiled step computes."""
    if dtype not in _FLOAT_KINDS or not isinstance(decoder.norm, RMSNorm) or decoder.positions is not None:
        return False
    table = decoder.embedding.weight
    if table.dtype not in _FLOAT_KINDS or not table.is_contiguous():
        return False
    blocks = [block for block in decoder.blocks if isinstance(block, Block)]
    if len(blocks) != len(decoder.blocks) or not all(_takes_block(block, dtype) for block in blocks):
        return False
    if decoder.head is not None:
        return _takes(decoder.head, dtype)
    return table.dtype == dtype


def _takes_block(block: Block, dtype: torch.dtype) -> bool:
    attention, mlp = block.attention, block.mlp
    if not isinstance(mlp, Mlp) or not mlp.is_swiglu or attention.head_dim % 2:
        return False
    norms = (attention.q_norm, attention.k_norm)
    if (norms[0] is None) != (norms[1] is None) or not isinstance(block.attention_norm, RMSNorm):
        return False
    if isinstance(norms[0], RMSNorm) and (not isinstance(norms[1], RMSNorm) or norms[0].eps != norms[1].eps):
        return False
    return all(_takes(_base(linear), dtype) for linear in (attention.qkv, attention.output, mlp.up, mlp.down))


def _base(linear: nn.Module) -> nn.Module:
    """What a linear's adapters are beside, or the linear itself."""
    return linear.base if isinstance(linear, AdaptedLinear) else linear


def _takes(linear: nn.Module, dtype: torch.dtype) -> bool:
    """Plain linears alone: other formats are modules of other classes, or have a shell."""
    if type(linear) is Int8Linear:
        return linear.shell is None and not linear.has_int8_products
    if type(linear) is Int4Linear:
        return linear.shell is None and linear.order is None
    return type(linear) is Linear and linear.weight.dtype == dtype and linear.weight.is_contiguous()
