"""FLOPs against sums written out by hand."""

from __future__ import annotations

import pytest

from tunesmith.arch import ModelConfig, config_from_dict
from tunesmith.cost.flops import (
    forward_flops,
    training_flops,
    training_flops_of_pack,
    training_flops_per_token,
    visible_positions,
)
from tunesmith.cost.shapes import MethodShape

RAW = {
    "model_type": "llama",
    "vocab_size": 50,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
BLOCK = 8 * (8 + 4 + 4) + 8 * 8 + 8 * 24 + 12 * 8  # qkv, output, gate and up, down
HEAD = 50 * 8


def config(**changes: object) -> ModelConfig:
    return config_from_dict({**RAW, **changes})


@pytest.mark.parametrize("window", [None, 1, 3, 7, 8, 100])
def test_visible_positions_is_the_written_out_sum(window: int | None) -> None:
    for length in (0, 1, 2, 7, 8, 9):
        expected = sum(i if window is None else min(i, window) for i in range(1, length + 1))
        assert visible_positions(length, window) == expected


def test_forward_counts_two_per_weight_and_causal_attention() -> None:
    pairs = 1 + 2 + 3 + 4 + 5
    attention = 2 * 4 * 2 * 4 * pairs  # layers, 4 per pair, heads, head_dim
    assert forward_flops(config(), 5) == 2 * 5 * (2 * BLOCK + HEAD) + attention


def test_head_is_counted_on_the_trained_tokens_only() -> None:
    assert forward_flops(config(), 5) - forward_flops(config(), 5, head_tokens=2) == 2 * HEAD * 3


def test_full_training_is_three_times_the_forward() -> None:
    flops = training_flops(config(), MethodShape("full"), 5)
    assert flops.model == 3 * forward_flops(config(), 5)
    assert training_flops_per_token(config(), MethodShape("full"), 5) * 5 == flops.model


def test_recompute_is_apart_from_model_flops() -> None:
    plain = training_flops(config(), MethodShape("full"), 5)
    block = training_flops(config(), MethodShape("full"), 5, checkpointing="block")
    assert block.model == plain.model
    assert plain.recompute == 0
    assert block.recompute == forward_flops(config(), 5, head_tokens=0)
    assert block.hardware == block.model + block.recompute
    assert training_flops(config(), MethodShape("full"), 5, checkpointing="selective").recompute == 0
    moved = training_flops(config(), MethodShape("full"), 5, checkpointing="offload").recompute
    with_qkv = training_flops(config(), MethodShape("full"), 5, checkpointing="selective-qkv").recompute
    assert with_qkv - moved == 2 * 5 * 2 * 8 * (8 + 4 + 4)  # both blocks' qkv
    offload = training_flops(config(), MethodShape("full"), 5, checkpointing="offload")
    assert offload.recompute == 2 * 5 * 2 * 8 * 24  # gate and up of two layers


def test_frozen_weights_cost_four_and_adapters_six() -> None:
    """All but the first linear, whose input (the frozen embedding) needs no gradient."""
    method = MethodShape("lora", rank=3)
    adapter_in = 3 * (8 * 3 + 8 + 8 * 2 + 12)
    adapter_out = 3 * (16 + 8 + 24 + 8)
    products = 4 * (2 * BLOCK + HEAD) + 6 * 2 * (adapter_in + adapter_out)
    first = 2 * (8 * 16 + 3 * 8 * 3)
    attention = 3 * 2 * 4 * 2 * 4 * 15
    assert training_flops(config(), method, 5).model == 5 * (products - first) + attention


def test_blocks_below_the_trained_ones_cost_the_forward_only() -> None:
    frozen = training_flops(config(), MethodShape("freeze", trainable=["last:1"]), 5)
    full = training_flops(config(), MethodShape("full"), 5)
    attention = 4 * 2 * 4 * 15
    assert full.model - frozen.model == 5 * 4 * BLOCK + 2 * attention + 5 * 2 * HEAD
    assert training_flops(config(), MethodShape("freeze", trainable=["head"]), 5).backward == 5 * 2 * HEAD


def test_experts_count_only_those_a_token_passes() -> None:
    moe = {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}
    two = forward_flops(config(**moe), 3)
    one = forward_flops(config(**{**moe, "num_experts_per_tok": 1}), 3)
    assert two - one == 2 * 3 * 2 * (8 * 24 + 12 * 8)


def test_pack_is_the_sum_of_its_documents() -> None:
    method = MethodShape("lora", rank=2)
    pack = training_flops_of_pack(config(), method, [3, 5], trained_tokens=4)
    apart = training_flops(config(), method, 3, trained_tokens=1).model
    apart += training_flops(config(), method, 5, trained_tokens=3).model
    assert pack.model == apart
