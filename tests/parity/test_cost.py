"""The cost arithmetic equals counts on the meta device, and FLOPs that torch counts while the model runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tunesmith.arch import ModelConfig, config_from_dict
from tunesmith.cost.flops import attention_flops, training_flops
from tunesmith.cost.params import count_parameters
from tunesmith.cost.shapes import MethodShape, linears
from tunesmith.model.decoder import Decoder
from tunesmith.model.packed import pack_documents

BASE: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
GPT2 = {"model_type": "gpt2", "vocab_size": 96, "n_embd": 32, "n_head": 4, "n_layer": 3, "n_positions": 64}
MIXTRAL = {**BASE, "model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}
QWEN3_MOE = {
    **BASE,
    "model_type": "qwen3_moe",
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "head_dim": 16,
    "decoder_sparse_step": 2,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {**BASE, "model_type": "llama"},
    "llama-tied": {**BASE, "model_type": "llama", "tie_word_embeddings": True},
    "llama-biased": {**BASE, "model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "mistral": {**BASE, "model_type": "mistral", "sliding_window": 8},
    "qwen2": {**BASE, "model_type": "qwen2"},
    "qwen3": {**BASE, "model_type": "qwen3", "head_dim": 16},
    "mixtral": MIXTRAL,
    "qwen3_moe": QWEN3_MOE,
    "gpt2": GPT2,
}


@pytest.fixture(params=FAMILIES)
def config(request: pytest.FixtureRequest) -> ModelConfig:
    return config_from_dict(FAMILIES[request.param])


def test_parameters_equal_the_meta_device(config: ModelConfig) -> None:
    with torch.device("meta"):
        model = Decoder(config)
    counts = count_parameters(config)
    assert counts.total == sum(parameter.numel() for parameter in model.parameters())
    blocks = sum(linear.num_parameters for linear in linears(config))
    assert blocks == sum(p.numel() for n, p in model.blocks.named_parameters() if "norm" not in n)


def products(config: ModelConfig, length: int, backward: int) -> int:
    """Attention's forward operations counted `backward` times more: what torch counts under its own operator."""
    layers = range(config.num_hidden_layers)
    return sum(attention_flops(config, layer, length) for layer in layers) * (1 + backward)


def matrix_flops_of_torch(model: Decoder, length: int) -> int:
    """Operations of every matrix product outside attention, of a forward and a backward pass."""
    pack = pack_documents([[i % 90 for i in range(length)]], torch.device("cpu"))
    with FlopCounterMode(display=False) as counter:
        model.logits(model.hidden(pack)).sum().backward()
    counts = counter.get_flop_counts()["Global"]
    return sum(flops for operator, flops in counts.items() if operator in (torch.ops.aten.mm, torch.ops.aten.addmm))


def frozen(model: Decoder, trained: str) -> Decoder:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trained in name)
    return model


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "mixtral", "qwen3_moe"])
def test_full_training_flops_equal_torch_counts(name: str) -> None:
    config = config_from_dict(FAMILIES[name])
    ours = training_flops(config, MethodShape("full"), 12).model - products(config, 12, backward=2)
    assert ours == matrix_flops_of_torch(Decoder(config), 12)


def test_flops_of_a_trained_last_block_equal_torch_counts() -> None:
    config = config_from_dict(FAMILIES["llama"])
    ours = training_flops(config, MethodShape("freeze", trainable=["last:1"]), 12).model
    attention = 3 * attention_flops(config, 0, 12) + 2 * attention_flops(config, 0, 12)
    assert ours - attention == matrix_flops_of_torch(frozen(Decoder(config), "blocks.2."), 12)


def test_flops_of_a_trained_head_equal_torch_counts() -> None:
    config = config_from_dict(FAMILIES["llama"])
    ours = training_flops(config, MethodShape("freeze", trainable=["head"]), 12).model
    assert ours - products(config, 12, backward=0) == matrix_flops_of_torch(frozen(Decoder(config), "head"), 12)
