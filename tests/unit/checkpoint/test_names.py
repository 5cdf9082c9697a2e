"""Names: every family's checkpoint is described whole."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from tunesmith.arch import FAMILIES, read_config
from tunesmith.checkpoint.names import LAYOUTS, module_name, tensor_names
from tunesmith.model.decoder import Decoder


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_names_and_shapes_are_transformers(family: str, tiny_model_dir: Callable[..., Path]) -> None:
    directory = tiny_model_dir(family)
    with torch.device("meta"):
        decoder = Decoder(read_config(directory))
    ours = {item.name: item.shape for item in tensor_names(decoder)}
    with safe_open(directory / "model.safetensors", framework="pt") as file:
        theirs = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    assert ours == theirs


def test_every_family_has_a_layout() -> None:
    assert set(LAYOUTS) == set(FAMILIES)


def test_the_name_of_a_projection() -> None:
    assert module_name("llama", "blocks.3.attention.qkv", "q_proj") == "model.layers.3.self_attn.q_proj"
    assert module_name("gpt2", "blocks.0.mlp.down", "c_proj") == "transformer.h.0.mlp.c_proj"
    assert module_name("mixtral", "blocks.1.mlp.experts.7.up", "up_proj") == (
        "model.layers.1.block_sparse_moe.experts.7.w3"
    )
    assert module_name("qwen2", "head", "lm_head") == "lm_head"
    with pytest.raises(KeyError):
        module_name("llama", "blocks.3.attention.nothing", "q_proj")
