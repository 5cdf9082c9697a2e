"""The decoder's pass for answers only on a CPU: few calls of torch a block, weights in the layout that is fastest.

    norm | product qkv | rope | pages, held rows | attention | product out + stream
    norm | product gate, up, swiglu              | product down + stream

`Decoder.forward` is the reference. Where a module is no plain one (quantised, with adapters, a mixture of experts) it
is called as it is. Where every sequence has one token, keys are read from `HeldRows`; other steps go over pages. Of
the usual decoders a step of few sequences with one token each is one call of our own C++ (cpu_step.py), and where they
compute in bfloat16 any other step too. What torch needs (weights laid out anew) is made when a step first goes through
it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tunesmith.engine.attend import PagedAttention
from tunesmith.engine.batch import StepBatch
from tunesmith.engine.cpu_held import HeldRows, HeldStep
from tunesmith.engine.cpu_products import gated_of, head_of, product_of
from tunesmith.engine.cpu_step import MOST_TOKENS, CpuStep, takes
from tunesmith.engine.pages import PagedCache
from tunesmith.kernels import torch_threads
from tunesmith.model.block import Attention, Block, Mlp
from tunesmith.model.decoder import Decoder
from tunesmith.model.layers import RMSNorm

_FEW_ROWS = 64
"""Up to so many tokens torch's norm of 16 bits costs more than several calls in float32 (35 us against 12)."""
_MATRIX_ROWS, _MATRIX_HEAD = 32, 64
"""Up to so many tokens with heads up to so wide, rope is one product by a rotation's matrix for each token."""


class CpuPass:
    """hidden_TD after the final norm of a step's new tokens. Called under inference mode, the decoder evaluating.

    packs: the weights never change, and may be laid out anew (model/ sees the same values). library: our own C++
    (kernels/cpu_library.py), for decoders whose weights never change.
    """

    def __init__(
        self,
        decoder: Decoder,
        max_num_seqs: int,
        max_model_len: int,
        *,
        packs: bool,
        library: ctypes.CDLL | None = None,
    ) -> None:
        self.decoder = decoder
        self.limits = (max_num_seqs, max_model_len)
        self.packs = packs
        self.held: HeldRows | None = None
        self._given = library if packs else None
        self._library: ctypes.CDLL | None = None
        self._step: CpuStep | None = None
        self._dtype: torch.dtype | None = None
        self._modules: list[tuple[dict[str, nn.Module | None], str, nn.Module | None]] = []
        self._layers: list[_Layer] = []
        self._final: Callable[[Tensor], Tensor] | None = None
        self._head: Callable[[Tensor], Tensor] | None = None

    def __call__(self, tokens_T: Tensor, positions_T: Tensor, attend: PagedAttention) -> Tensor:
        self._prepare(self.decoder.compute_dtype or self.decoder.embedding.weight.dtype)
        step = None if attend.invariant else self._step_over(attend.cache, attend.batch)
        if step is not None and step.takes_prompts:
            self._forget(attend.batch)
            return step.prompts(tokens_T, attend.batch)
        if self._given is not None:
            torch_threads.bind(self._given)
        stream = self.decoder.embed(tokens_T, positions_T)
        self._prepare(stream.dtype)
        rotate = self._rotation(positions_T, stream.dtype)
        layers, final = self._by_torch(stream.dtype)
        try:
            held = self._held(attend)
            for layer in layers:
                stream = layer(stream, rotate, attend, self.held, held)
        except BaseException:
            self.held = None  # its rows say that they hold what this step would have brought
            raise
        return final(stream)

    def logits(self, hidden_TD: Tensor) -> Tensor:
        """logits_TV in the dtype of the hidden states."""
        if self._dtype != hidden_TD.dtype:
            self._prepare(hidden_TD.dtype)
        if self._step is not None and len(hidden_TD) <= self._step.most_logits:
            return self._step.logits(hidden_TD)
        return self._head_by_torch(hidden_TD.dtype)(hidden_TD)

    def release(self, slot: int) -> None:
        """A sequence has left this slot: its pages may be filled by others before the next one comes."""
        if self.held is not None:
            self.held.forget((slot,))

    def decode(self, batch: StepBatch, cache: PagedCache, last_ids: Tensor) -> Tensor | None:
        """logits_TV of one new token a sequence by the compiled step; None where it does not take this.

        The pages are then all that holds keys and values. last_ids: int64, by slot, for tokens that the host does not
        know yet.
        """
        if self._given is None or not batch.is_decode or not 0 < batch.num_tokens <= MOST_TOKENS:
            return None
        self._prepare(self.decoder.compute_dtype or self.decoder.embedding.weight.dtype)
        step = self._step_over(cache, batch)
        if step is None or batch.num_tokens > step.most_tokens:
            return None
        self._forget(batch)
        return step(batch, last_ids)

    def _step_over(self, cache: PagedCache, batch: StepBatch) -> CpuStep | None:
        """Our own C++ over this cache, where the decoder and the step are of the kind that it computes."""
        if self._library is None or cache.dtype != self._dtype or batch.block_tables_RP.stride(1) != 1:
            return None
        if self._step is None or self._step.cache is not cache:
            with torch.inference_mode(False), torch.no_grad():
                self._step = CpuStep(self._library, self.decoder, cache, cache.dtype)
        return self._step

    def _forget(self, batch: StepBatch) -> None:
        """The pages will be all that holds these sequences' keys and values."""
        if self.held is not None:
            self.held.forget(batch.sequence_slots)

    def _prepare(self, dtype: torch.dtype) -> None:
        """Forget what is made from modules in another dtype, or where one was put in another's place."""
        if self._dtype == dtype:
            for modules, name, module in self._modules:
                if modules[name] is not module:
                    break
            else:
                return
        self._dtype = dtype
        blocks = [cast(Block, block) for block in self.decoder.blocks]
        owners = [owner for block in blocks for owner in (block, block.attention, block.mlp)]
        held = [owner._modules for owner in (*owners, self.decoder)]
        self._modules = [(modules, name, module) for modules in held for name, module in modules.items()]
        self._step, self._library = None, self._given if takes(self.decoder, dtype) else None
        self._layers, self._final, self._head = [], None, None

    def _by_torch(self, dtype: torch.dtype) -> tuple[list[_Layer], Callable[[Tensor], Tensor]]:
        """The blocks and the last norm as torch computes them."""
        if self._final is None:
            # Nothing here may be an inference tensor: a parameter that is laid out anew belongs to everybody.
            with torch.inference_mode(False), torch.no_grad():
                self._layers = [
                    _Layer(
                        cast(Block, block), layer, self.decoder.config.window(layer), dtype, self.packs, self._library
                    )
                    for layer, block in enumerate(self.decoder.blocks)
                ]
                self._final = _norm_of(cast(RMSNorm, self.decoder.norm), dtype, self.packs)
        return self._layers, self._final

    def _head_by_torch(self, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
        if self._head is None:
            with torch.inference_mode(False), torch.no_grad():
                if self.decoder.head is None:
                    self._head = head_of(self.decoder.embedding.weight, dtype, self.packs)
                else:
                    self._head = product_of(self.decoder.head, dtype, self.packs, self._library).plain
        return self._head

    def _held(self, attend: PagedAttention) -> HeldStep | None:
        """The step's places in the held rows, where it is one of single tokens and nothing speaks against them."""
        cache, batch = attend.cache, attend.batch
        if self.held is None or self.held.cache is not cache:
            self.held = HeldRows(cache, *self.limits)
        if not batch.is_decode or attend.has_scales or attend.invariant or cache.dtype != self._dtype:
            self.held.forget(batch.sequence_slots)
            return None
        return self.held.begin(batch)

    def _rotation(self, positions_T: Tensor, dtype: torch.dtype) -> Callable[[Tensor], Tensor] | None:
        """Rope for [T, N, H] of these positions."""
        tables = self.decoder.rope(positions_T, dtype)
        if tables is None:
            return None
        cos, sin = tables
        head_dim = cos.shape[-1]
        half = head_dim // 2
        if dtype == torch.float32 and len(cos) <= _MATRIX_ROWS and head_dim <= _MATRIX_HEAD:
            one = torch.eye(head_dim)
            turned = torch.cat((one[half:], -one[:half]))
            matrices = torch.addcmul(one * cos, turned, sin)
            return lambda x: torch.bmm(x, matrices)

        def rotate(x: Tensor) -> Tensor:
            first, second = x[..., :half], x[..., half:]
            return torch.addcmul(x * cos, torch.cat((-second, first), dim=-1), sin)

        return rotate


class _Layer:
    """One block."""

    def __init__(
        self,
        block: Block,
        layer: int,
        window: int | None,
        dtype: torch.dtype,
        packs: bool,
        library: ctypes.CDLL | None,
    ) -> None:
        attention, mlp = block.attention, block.mlp
        self.layer, self.window = layer, window
        self.heads = (attention.num_heads, attention.num_kv_heads, attention.head_dim)
        self.attention_norm = _norm_of(cast(RMSNorm, block.attention_norm), dtype, packs)
        self.mlp_norm = _norm_of(cast(RMSNorm, block.mlp_norm), dtype, packs)
        self.qkv = product_of(attention.qkv, dtype, packs, library).plain
        self.output = product_of(attention.output, dtype, packs, library).added
        self.head_norm = _head_norm_of(attention, dtype, packs)
        if isinstance(mlp, Mlp) and mlp.is_swiglu:
            gated = gated_of(mlp.up, dtype, packs, library)
            down = product_of(mlp.down, dtype, packs, library).added
            self.mlp: Callable[[Tensor, Tensor], Tensor] = lambda y, stream: down(gated(y), stream)
        else:
            self.mlp = lambda y, stream: stream + mlp(y)

    def __call__(
        self,
        stream: Tensor,
        rotate: Callable[[Tensor], Tensor] | None,
        attend: PagedAttention,
        held: HeldRows | None,
        step: HeldStep | None,
    ) -> Tensor:
        num_heads, num_kv_heads, head_dim = self.heads
        qkv = self.qkv(self.attention_norm(stream)).view(len(stream), -1, head_dim)
        both, value = qkv[:, : num_heads + num_kv_heads], qkv[:, num_heads + num_kv_heads :]
        if self.head_norm is not None:
            both = self.head_norm(both)
        if rotate is not None:
            both = rotate(both)
        query, key = both[:, :num_heads], both[:, num_heads:]
        if held is None or step is None:
            mixed = attend[self.layer](query, key, value).reshape(len(stream), -1)
        else:
            mixed = held.attend(step, self.layer, query, key, value, attend.batch.slots_T, self.window)
        stream = self.output(mixed, stream)
        return self.mlp(self.mlp_norm(stream), stream)


def _norm_of(norm: RMSNorm, dtype: torch.dtype, packs: bool) -> Callable[[Tensor], Tensor]:
    """x / rms(x) * weight over the last dimension."""
    if not packs or norm.weight.dtype != dtype:
        return norm
    return _rms_norm(norm.weight.detach(), norm.eps)


def _head_norm_of(attention: Attention, dtype: torch.dtype, packs: bool) -> Callable[[Tensor], Tensor] | None:
    """The norms of queries and keys, [T, N + K, H] in one."""
    query, key = attention.q_norm, attention.k_norm
    if query is None or key is None:
        return None
    num_heads, num_kv_heads = attention.num_heads, attention.num_kv_heads
    norms = (cast(RMSNorm, query), cast(RMSNorm, key))
    if not packs or norms[0].weight.dtype != dtype or norms[0].eps != norms[1].eps:
        return lambda x: torch.cat((query(x[:, :num_heads]), key(x[:, num_heads:])), dim=1)
    weights = [norm.weight.detach().expand(n, -1) for norm, n in zip(norms, (num_heads, num_kv_heads), strict=True)]
    return _rms_norm(torch.cat(weights), norms[0].eps)


def _rms_norm(weight: Tensor, eps: float) -> Callable[[Tensor], Tensor]:
    width, dtype = weight.shape[-1], weight.dtype
    # sqrt(D) is taken into the weight, so that the sum of squares is not divided.
    scaled, wide_eps = weight.float() * width**0.5, torch.tensor(eps * width)

    def run(x: Tensor) -> Tensor:
        scale = torch.linalg.vecdot(x, x).add_(wide_eps).rsqrt_()
        return x.mul(scale[..., None]).mul_(scaled)

    def run_wide(x: Tensor) -> Tensor:
        if len(x) > _FEW_ROWS:
            return F.rms_norm(x, (width,), None, eps).mul_(weight)
        wide = x.float()
        scale = torch.linalg.vecdot(wide, wide).add_(wide_eps).rsqrt_()
        return wide.mul_(scale[..., None]).mul_(scaled).to(dtype)

    return run if dtype == torch.float32 else run_wide
