"""Gradient checkpointing under every kind of linear: the gradients are those without it, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tunesmith.checkpoint.load import load_decoder
from tunesmith.model.methods import adapted_linears, apply_method
from tunesmith.model.packed import pack_documents
from tunesmith.recipe.schema import MethodSection

METHODS: dict[str, dict[str, Any]] = {
    "full": {"kind": "full"},
    "lora": {"kind": "lora"},
    "dora": {"kind": "lora", "dora": True},
    "dropout": {"kind": "lora", "dropout": 0.2},
    "qlora": {"kind": "qlora"},
}


@pytest.mark.parametrize("checkpointing", ["block", "selective"])
@pytest.mark.parametrize("name", list(METHODS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_the_same(
    tiny_model_dir: Callable[..., Path], name: str, checkpointing: Any, dtype: torch.dtype
) -> None:
    def gradients(kind: Any) -> dict[str, Tensor]:
        model = load_decoder(tiny_model_dir("qwen2"))
        apply_method(model, MethodSection(rank=4, **METHODS[name]), seed=0)
        with torch.no_grad():
            for linear in adapted_linears(model).values():
                for adapter in linear.adapters.parameters():
                    adapter.add_(0.05)
        model.compute_dtype, model.checkpointing = dtype, kind
        torch.manual_seed(0)
        pack = pack_documents([[5, 9, 200, 31, 7], [3, 250, 8]])
        model.logits(model.train().hidden(pack)).float().square().mean().backward()  # type: ignore[no-untyped-call]
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    plain, recomputed = gradients("none"), gradients(checkpointing)
    assert plain.keys() == recomputed.keys()
    assert plain
    for parameter, grad in plain.items():
        assert torch.equal(grad, recomputed[parameter]), parameter
