"""What training begins with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tunesmith.checkpoint.adapter import save_adapter
from tunesmith.checkpoint.load import load_decoder
from tunesmith.checkpoint.save import save_decoder
from tunesmith.errors import AdapterError
from tunesmith.model.methods import adapted_linears, apply_method
from tunesmith.recipe.load import recipe_from_mapping
from tunesmith.recipe.schema import MethodSection, Recipe
from tunesmith.train.resolve import resolve_recipe
from tunesmith.train.trainable import load_trainable


def _recipe(base: Path, adapter: Path) -> Recipe:
    return resolve_recipe(
        recipe_from_mapping(
            {
                "model": {"path": str(base), "device": "cpu"},
                "method": {"kind": "lora", "rank": 4, "adapter": str(adapter)},
                "data": {"format": "tokens"},
            }
        )
    )


def test_an_adapter_goes_on_on_its_own_base_only(tiny_model_dir: Callable[..., Path], tmp_path: Path) -> None:
    base = tiny_model_dir("qwen2")
    model = load_decoder(base)
    apply_method(model, MethodSection(kind="lora", rank=4), seed=0)
    save_adapter(model, tmp_path / "adapter", base)
    assert adapted_linears(load_trainable(_recipe(base, tmp_path / "adapter"))[0])
    other = load_decoder(base)
    with torch.no_grad():
        other.norm.get_parameter("weight")[0] += 0.1
    save_decoder(other, tmp_path / "other")
    with pytest.raises(AdapterError, match="another base"):
        load_trainable(_recipe(tmp_path / "other", tmp_path / "adapter"))
