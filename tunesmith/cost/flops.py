"""Floating-point operations of matrix products and attention, counted for one document (everything else is left out).

A product with a weight costs 2 operations per weight and token forward, 2 more where its input needs a gradient
and 2 more where it is trained itself: 4 for a frozen weight in the gradient's way, 6 for a trained one.
Attention is causal: position i sees min(i, window) positions. Model FLOPs, which MFU is made of, leave recomputation
out.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from tunesmith.arch import ModelConfig
from tunesmith.cost.params import TrainedParts, trained_parts
from tunesmith.cost.shapes import LinearShape, Method, block_linears

Checkpointing = Literal["none", "block", "selective", "selective-qkv", "offload", "offload-block"]


@dataclass(frozen=True)
class TrainingFlops:
    """Operations of a forward and a backward pass; `recompute` is what gradient checkpointing adds."""

    forward: int
    backward: int
    recompute: int

    @property
    def model(self) -> int:
        """Forward and backward without recomputation: what MFU counts."""
        return self.forward + self.backward

    @property
    def hardware(self) -> int:
        """What the device does, recomputation included."""
        return self.model + self.recompute


def visible_positions(length: int, window: int | None) -> int:
    """The sum of min(i, window) over i = 1..length: query-key pairs of one causal document."""
    reach = length if window is None else min(window, length)
    return reach * (reach + 1) // 2 + (length - reach) * reach


def attention_flops(config: ModelConfig, layer: int, length: int) -> int:
    """Forward operations of scores and weighted values in one layer: 4 * N * H for each visible pair."""
    pairs = visible_positions(length, config.window(layer))
    return 4 * config.num_attention_heads * config.head_dim * pairs


def head_flops(config: ModelConfig, num_tokens: int) -> int:
    """Forward operations of the head on `num_tokens` tokens."""
    return 2 * config.vocab_size * config.hidden_size * num_tokens


def linear_flops(linear: LinearShape, num_tokens: int) -> int:
    """Forward operations of one fused linear, through the experts that a token passes."""
    return 2 * linear.active * linear.weight_size * num_tokens


def forward_flops(config: ModelConfig, length: int, head_tokens: int | None = None) -> int:
    """Forward operations for one document of `length` tokens, the head on `head_tokens` of them (None: all)."""
    blocks = sum(block_forward_flops(config, layer, length) for layer in range(config.num_hidden_layers))
    return blocks + head_flops(config, length if head_tokens is None else head_tokens)


def block_forward_flops(config: ModelConfig, layer: int, length: int) -> int:
    """Forward operations of one block, adapters left out."""
    products = sum(linear_flops(linear, length) for linear in block_linears(config, layer))
    return products + attention_flops(config, layer, length)


def training_flops(
    config: ModelConfig,
    method: Method,
    length: int,
    *,
    trained_tokens: int | None = None,
    checkpointing: Checkpointing = "none",
) -> TrainingFlops:
    """Operations of training on one document of `length` tokens.

    The head is applied to `trained_tokens` only (None: all), as the loss does. "block" recomputes every block that the
    gradient passes; "selective" holds products and attention, so it recomputes nothing that is counted here;
    "offload" recomputes the product into a dense MLP, "selective-qkv" that and query, key and value; "offload-block" is
    as "block".
    """
    head_tokens = length if trained_tokens is None else trained_tokens
    parts = trained_parts(config, method)
    forward = backward = recompute = 0
    reached = parts.embedding
    for layer in range(config.num_hidden_layers):
        reached = reached or _norms_reach(parts, layer)
        block = _Block(config, method, layer, length, layer in parts.blocks, reached)
        forward, backward = forward + block.forward, backward + block.backward
        if block.reached:
            recompute += _recomputed(config, layer, length, checkpointing, block.forward)
        reached = block.reached
    head = head_flops(config, head_tokens)
    trains_head = parts.head or (parts.embedding and config.tie_word_embeddings)
    backward += head * (int(reached or parts.norms) + int(trains_head))
    return TrainingFlops(forward + head, backward, recompute)


def _recomputed(config: ModelConfig, layer: int, length: int, checkpointing: Checkpointing, whole: int) -> int:
    """Operations that one block computes twice; adapters are left out with "offload" and "selective-qkv"."""
    if checkpointing not in ("offload", "selective-qkv"):
        return whole if checkpointing in ("block", "offload-block") else 0
    linears = block_linears(config, layer)
    first = [linear for linear in linears if linear.owner == "mlp"][:1]
    again = [*first, *(linears[:1] if checkpointing == "selective-qkv" else [])]
    return sum(linear_flops(linear, length) for linear in again)


def _norms_reach(parts: TrainedParts, layer: int) -> bool:
    """Whether a norm before this block's first linear is trained, so that its output needs a gradient."""
    return parts.norms or layer in parts.blocks


class _Block:
    """One block's operations; `reached`: whether what it is given, and then what it returns, needs a gradient."""

    def __init__(
        self, config: ModelConfig, method: Method, layer: int, length: int, trained: bool, reached: bool
    ) -> None:
        self.forward = self.backward = 0
        self.reached = reached
        for index, linear in enumerate(block_linears(config, layer)):
            self._add_linear(linear, method, length, trained)
            if index == 0:
                self._add_attention(attention_flops(config, layer, length))

    def _add_linear(self, linear: LinearShape, method: Method, length: int, trained: bool) -> None:
        base = linear_flops(linear, length)
        targeted = linear.targeted(method)
        adapters_in = 2 * linear.active * method.rank * linear.in_features * len(targeted) * length
        adapters_out = 2 * linear.active * method.rank * sum(linear.parts[part] for part in targeted) * length
        self.forward += base + adapters_in + adapters_out
        self.backward += base * (int(self.reached) + int(trained))
        self.backward += adapters_in * (1 + int(self.reached)) + adapters_out * 2
        self.reached = self.reached or trained or bool(targeted)

    def _add_attention(self, forward: int) -> None:
        self.forward += forward
        self.backward += 2 * forward if self.reached else 0


def training_flops_of_pack(
    config: ModelConfig, method: Method, lengths: Iterable[int], *, trained_tokens: int
) -> TrainingFlops:
    """Operations of training on packed documents of these lengths (fillers left out by the caller)."""
    parts = list(_per_document(config, method, lengths, trained_tokens))
    return TrainingFlops(sum(p.forward for p in parts), sum(p.backward for p in parts), 0)


def _per_document(
    config: ModelConfig, method: Method, lengths: Iterable[int], trained_tokens: int
) -> Iterator[TrainingFlops]:
    """The head's share is counted once, with the first document: it is linear in the trained tokens."""
    for index, length in enumerate(lengths):
        yield training_flops(config, method, length, trained_tokens=trained_tokens if index == 0 else 0)


def training_flops_per_token(config: ModelConfig, method: Method, length: int) -> float:
    """Model FLOPs per token of training on documents of `length` tokens that are trained whole."""
    return training_flops(config, method, length).model / length
