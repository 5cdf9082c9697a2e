"""The decoder's pass for answers only, with as few launches a block as the products leave: what a GPU runs.

    product qkv | heads_to_pages | attention | product out | add_rms_norm
    product gate, up | swiglu | product down | add_rms_norm

Of few tokens the product of gate and up is SwiGLU's launch too (`model/decode_linears.py`, swiglu_product).
A product in fp8 has its input quantised before; of the MLP's second, swiglu does that. Few tokens meet int4 as bytes
(`model/decode_int4.py`), which norms and swiglu write, and a launch of its own for attention's output.
It calls the decoder's own linears, whatever stands in their place (quantised, with adapters), and holds no weights.
`Decoder.forward` is the reference. Mixtures of experts, and MLPs other than SwiGLU, run as the block has them.
"""

from __future__ import annotations

from typing import TypeGuard, cast

from torch import Tensor, nn

from tunesmith.engine.attend import PagedAttention
from tunesmith.kernels.direct import direct
from tunesmith.kernels.heads_to_pages import HeadsLayout, heads_to_pages
from tunesmith.kernels.launch import overlapped
from tunesmith.kernels.nf4 import use_kernel
from tunesmith.kernels.rms_norm import rms_norm
from tunesmith.kernels.rope import rope_tables_half
from tunesmith.kernels.swiglu import swiglu
from tunesmith.kernels.swiglu_fp8 import swiglu_rows_fp8
from tunesmith.model.block import Block, Mlp
from tunesmith.model.decode_int4 import InBytes, normed_for, product_of, swiglu_for
from tunesmith.model.decode_linears import DecodeFp8Linear, swiglu_product
from tunesmith.model.decoder import Decoder
from tunesmith.model.heads import HalfRope, Heads
from tunesmith.model.layers import RMSNorm

# What a norm leaves to the linear that reads it.
Normed = Tensor | InBytes


def has_fused_pass(decoder: Decoder) -> bool:
    """Whether every norm is RMSNorm, and all blocks are here."""
    blocks = list(decoder.blocks)
    return all(isinstance(block, Block) and _has_rms(block) for block in blocks) and type(decoder.norm) is RMSNorm


class FusedPass:
    """hidden_TD after the final norm of a step's new tokens. Called under inference mode, the decoder evaluating."""

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder
        config = decoder.config
        self.heads = Heads(config.num_attention_heads, config.num_key_value_heads, config.head_dim)

    def __call__(self, tokens_T: Tensor, positions_T: Tensor, attend: PagedAttention) -> Tensor:
        with overlapped():
            return self._hidden(tokens_T, positions_T, attend)

    def _hidden(self, tokens_T: Tensor, positions_T: Tensor, attend: PagedAttention) -> Tensor:
        decoder = self.decoder
        stream = decoder.stream.own(decoder.embed(tokens_T, positions_T))
        rope = None
        if decoder.config.rope is not None:
            rope = rope_tables_half(decoder._inverse(positions_T.device), positions_T)
        blocks = [cast(Block, block) for block in decoder.blocks]
        norms = [*(cast(RMSNorm, block.attention_norm) for block in blocks[1:]), cast(RMSNorm, decoder.norm)]
        first = cast(RMSNorm, blocks[0].attention_norm)
        y: Normed = rms_norm(stream, first.weight, first.eps)[0]
        for layer, (block, following) in enumerate(zip(blocks, norms, strict=True)):
            mlp_norm, output, mlp = cast(RMSNorm, block.mlp_norm), block.attention.output, cast(Mlp, block.mlp)
            mixed = self._attend(block, layer, _product(block.attention.qkv, y), rope, attend)
            # Where processes share the model, their parts are summed.
            mixed, reader = block.stream.summed(output(mixed)), mlp.up if _is_swiglu(mlp) else None
            y = normed_for(reader, stream, mixed, mlp_norm.weight, mlp_norm.eps)
            reader = blocks[layer + 1].attention.qkv if layer + 1 < len(blocks) else None
            y = normed_for(reader, stream, block.stream.summed(_mlp(mlp, y)), following.weight, following.eps)
        assert isinstance(y, Tensor)  # the last norm is read by no linear
        return y

    def _attend(
        self, block: Block, layer: int, qkv_TF: Tensor, rope: HalfRope | None, attend: PagedAttention
    ) -> Tensor:
        attention = block.attention
        norms = (attention.q_norm, attention.k_norm)
        query_norm, key_norm = (norm if isinstance(norm, RMSNorm) else None for norm in norms)
        weights = (None if query_norm is None else query_norm.weight, None if key_norm is None else key_norm.weight)
        eps = 0.0 if query_norm is None else query_norm.eps
        if attend.has_scales:
            self.heads.eps = eps
            query, key, value, _ = self.heads.prepare(qkv_TF, weights, rope)
            return attend[layer](query, key, value).flatten(1)
        cos, sin = (None, None) if rope is None else rope
        numbers = self.heads.num_heads, self.heads.num_kv_heads
        has_fresh = attend.has_fresh(layer)
        layout = HeadsLayout(*numbers, *weights, eps, cos, sin, attend.invariant, keeps_keys=has_fresh)
        prepared = heads_to_pages(qkv_TF, layout, *attend.pages(layer), attend.batch.slots_T)
        if not has_fresh:
            return attend.over_pages(layer, prepared).flatten(1)
        query, key = prepared.split((layout.num_heads, layout.num_kv_heads), dim=1)
        value = qkv_TF.unflatten(1, (-1, query.shape[2]))[:, -layout.num_kv_heads :]
        return attend.over_new(layer, query, key, value).flatten(1)


def _product(linear: nn.Module, y_TD: Normed) -> Tensor:
    return product_of(linear, y_TD) if isinstance(y_TD, InBytes) else cast(Tensor, linear(y_TD))


def _mlp(mlp: nn.Module, y_TD: Normed) -> Tensor:
    if _is_swiglu(mlp):
        h_TI = None if isinstance(y_TD, InBytes) else swiglu_product(mlp.up, y_TD)
        if h_TI is not None:
            return cast(Tensor, mlp.down(h_TI))
        gate_up_TF = _product(mlp.up, y_TD)
        down: nn.Module = mlp.down
        in_bytes = swiglu_for(down, gate_up_TF)
        if in_bytes is not None:
            return product_of(down, in_bytes)
        # Not a subclass: one that holds columns of a whole rounds as all its processes agree.
        if type(down) is DecodeFp8Linear and down.wants_codes(len(gate_up_TF)):
            return down.product_of_codes(*swiglu_rows_fp8(gate_up_TF), gate_up_TF.dtype)
        return mlp.down(_swiglu(gate_up_TF))
    return cast(Tensor, mlp(y_TD))


def _is_swiglu(mlp: nn.Module) -> TypeGuard[Mlp]:
    return isinstance(mlp, Mlp) and mlp.is_swiglu


def _swiglu(gate_up_TF: Tensor) -> Tensor:
    if not use_kernel(gate_up_TF.device):
        return swiglu(gate_up_TF)
    from tunesmith.kernels.swiglu_triton import swiglu_operator

    h_TI: Tensor = direct(swiglu_operator, gate_up_TF)(gate_up_TF)
    return h_TI


def _has_rms(block: Block) -> bool:
    attention = block.attention
    norms = [
        block.attention_norm,
        block.mlp_norm,
        attention.q_norm or block.mlp_norm,
        attention.k_norm or block.mlp_norm,
    ]
    return all(type(norm) is RMSNorm for norm in norms)
