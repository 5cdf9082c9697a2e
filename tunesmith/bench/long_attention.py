"""Whether attention over one very long document is right: the whole of it beside the formula for its last queries.

Only the last queries have a gradient, so the gradients of all keys and values follow from those few rows of scores,
which fit into memory in float32. Offsets that do not fit into what a kernel counts with show in each of the four.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from tunesmith.arch import ModelConfig
from tunesmith.model.attention import PackedAttention
from tunesmith.model.attention_choice import choices
from tunesmith.model.heads import Heads
from tunesmith.model.packed import packed

# In bfloat16 the kernels' own rounding is some 4e-3; a row that is read from elsewhere is off by its whole length.
TOLERANCE = 0.02
_FILLED_ROWS = 65536
_NAMES = ("output", "grad_query", "grad_key", "grad_value")


@dataclass(frozen=True)
class AttentionCheck:
    """Norms of what was off, each relative to the norm of the truth; kernel: None where there is one only.

    error: why there is no output; the norms are NaN then.
    """

    tokens: int
    kernel: str | None
    output: float
    grad_query: float
    grad_key: float
    grad_value: float
    seconds: float
    error: str | None = None

    @property
    def worst(self) -> float:
        """The largest of the four; NaN where one is."""
        errors = [getattr(self, name) for name in _NAMES]
        return math.nan if any(map(math.isnan, errors)) else max(errors)

    @property
    def is_right(self) -> bool:
        """Whether all are within the rounding of 16 bits (NaN is not)."""
        return self.worst <= TOLERANCE


def check_attention(
    config: ModelConfig, tokens: int, device: torch.device, dtype: torch.dtype, rows: int = 64
) -> AttentionCheck:
    """A pass forward and one back through what training would call, on the views of a fused projection.

    rows: the last queries, which are compared.
    """
    began = time.perf_counter()
    fused, weight = _random(config, tokens, device, dtype), _random_rows(config, rows, device, dtype)
    heads = Heads(config.num_attention_heads, config.num_key_value_heads, config.head_dim)
    query, key, value = heads.split(fused)
    error, errors = None, [math.nan] * len(_NAMES)
    try:
        ours = _attended(config, (query, key, value), weight)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as failure:
        error = str(failure)
    else:
        off, length = _compared(ours, (query, key, value), weight)
        errors = (off / length).sqrt().tolist()
    names = [str(known["kernel"]) for known in choices() if known["num_tokens"] == tokens]
    output, grad_query, grad_key, grad_value = errors
    return AttentionCheck(
        tokens=tokens,
        kernel=names[-1] if names else None,
        output=output,
        grad_query=grad_query,
        grad_key=grad_key,
        grad_value=grad_value,
        seconds=time.perf_counter() - began,
        error=error,
    )


def _attended(config: ModelConfig, held: tuple[Tensor, Tensor, Tensor], weight_RNH: Tensor) -> tuple[Tensor, ...]:
    """The last rows of the output, and the gradients of all queries, keys and values, by training's own attention."""
    rows, tokens = len(weight_RNH), len(held[0])
    tensors = [tensor.detach().requires_grad_() for tensor in held]
    pack = packed(torch.zeros(tokens, dtype=torch.int64, device=weight_RNH.device), (tokens,))
    out = PackedAttention(config, pack)[0](*tensors)
    wanted = torch.zeros_like(out)
    wanted[-rows:] = weight_RNH
    return out[-rows:].detach().clone(), *torch.autograd.grad(out, tensors, wanted)


def _random(config: ModelConfig, tokens: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator(device).manual_seed(0)
    width = (config.num_attention_heads + 2 * config.num_key_value_heads) * config.head_dim
    fused = torch.empty(tokens, width, device=device, dtype=dtype)
    for part in fused.split(_FILLED_ROWS):
        part.normal_(generator=generator)
    return fused


def _random_rows(config: ModelConfig, rows: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator(device).manual_seed(1)
    shape = (rows, config.num_attention_heads, config.head_dim)
    return torch.empty(shape, device=device, dtype=dtype).normal_(generator=generator)


def _compared(
    ours: tuple[Tensor, ...], held: tuple[Tensor, Tensor, Tensor], weight_RNH: Tensor
) -> tuple[Tensor, Tensor]:
    """The squared lengths [4] of what is off and of the truth, in the order of `_NAMES`, a key head at a time."""
    out, dquery, dkey, dvalue = ours
    query, key, value = held
    rows, group = len(weight_RNH), query.shape[1] // key.shape[1]
    off = torch.zeros(len(_NAMES), dtype=torch.float64, device=query.device)
    length = torch.zeros_like(off)
    for head in range(key.shape[1]):
        own = slice(head * group, (head + 1) * group)
        truth = _formula(query[-rows:, own], key[:, head], value[:, head], weight_RNH[:, own])
        found = (out[:, own], dquery[-rows:, own], dkey[:, head], dvalue[:, head])
        for place, (one, other) in enumerate(zip(found, truth, strict=True)):
            off[place] += (one.float() - other).square().sum()
            length[place] += other.square().sum()
    off[1] += sum(part.float().square().sum() for part in dquery[:-rows].split(_FILLED_ROWS))  # these have none
    return off, length


def _formula(query_RGH: Tensor, key_TH: Tensor, value_TH: Tensor, weight_RGH: Tensor) -> tuple[Tensor, ...]:
    """Output and gradients of queries that are the last of T positions, by float32 products."""
    with torch.enable_grad():
        tensors = [tensor.float().requires_grad_() for tensor in (query_RGH, key_TH, value_TH)]
        query, key, value = tensors
        rows, num_keys = query.shape[0], key.shape[0]
        scores = torch.einsum("rgh,th->rgt", query, key) / query.shape[2] ** 0.5
        last = torch.full((rows, rows), -torch.inf, device=scores.device).triu(1)
        masked = torch.cat((scores[..., : num_keys - rows], scores[..., num_keys - rows :] + last[:, None]), dim=-1)
        out = torch.einsum("rgt,th->rgh", masked.softmax(-1), value)
        return (out.detach(), *torch.autograd.grad(out, tensors, weight_RGH.float()))
