"""What sparing blocks of selective checkpointing costs a process under zero3: full fine-tuning, by formula.

A block that is checkpointed keeps its two inputs, query, key, value and what attention made of them; one that is spared
keeps gate and up too. Spared are the last blocks, which the backward pass comes to first:

    activations    most when the backward pass begins, then less with every block
    gradients      none when it begins, then this process's share of one block more
    all the time   weights and optimiser states, what is outside the blocks whole, two blocks whole, and what travels

So the most is held at one of the two ends: up to some number of spared blocks the gradients' end needs the room anyway.
"""

from __future__ import annotations

from tunesmith.arch import ModelConfig
from tunesmith.cost.shapes import MethodShape
from tunesmith.cost.shards import Formats, Layout, by_block, held_tensors, rank_states
from tunesmith.formats import FORMATS

_FULL = MethodShape("full")
_OUTSIDE = -1


def block_activations(config: ModelConfig, tokens: int, formats: Formats) -> tuple[int, int]:
    """Bytes that a block keeps of selective checkpointing for `tokens`, and those that it keeps more when spared."""
    width = FORMATS[formats.compute].bytes_for(1) * tokens
    mixed = config.num_attention_heads * config.head_dim
    query_key_value = mixed + 2 * config.num_key_value_heads * config.head_dim
    return width * (2 * config.hidden_size + query_key_value + mixed), width * 2 * config.intermediate_size


def backward_peak(config: ModelConfig, layout: Layout, formats: Formats, *, tokens: int, spared: int) -> int:
    """The most bytes of a process during a backward pass over one micro-batch of `tokens`.

    Dense blocks, a head of its own, nothing but data-parallel zero3; a percent or two under what is measured.
    """
    states = rank_states(config, _FULL, layout, formats)
    tensors = list(held_tensors(config, _FULL, layout))
    weights, gradients = by_block(tensors, formats)
    master = FORMATS[formats.master].bytes_for(1)
    shares = [0] * config.num_hidden_layers
    for tensor in tensors:
        if tensor.block != _OUTSIDE:
            shares[tensor.block] += tensor.share(layout.data).values * master
    kept, more = block_activations(config, tokens, formats)
    outer = gradients.pop(_OUTSIDE)
    at_work = max(gradients.values()) + tokens * FORMATS[formats.compute].bytes_for(3 * config.intermediate_size)
    travelling = max(size for block, size in weights.items() if block != _OUTSIDE)
    always = states.held.weights + states.held.optimizer + states.gathered + travelling
    most = always + outer + sum(shares)  # the embedding's gradient is there, and no block's is waiting
    for layer in range(config.num_hidden_layers):
        saved = kept * (layer + 1) + more * max(0, spared - (config.num_hidden_layers - 1 - layer))
        most = max(most, always + outer // 2 + sum(shares[layer + 1 :]) + saved + at_work)
    return most
