"""The certificate's look at the blocks: passes as they are, fails when a written-out form is wrong."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tunesmith.kernels.rms_norm import rms_norm_backward
from tunesmith.model import fused
from tunesmith.recipe.load import recipe_from_mapping
from tunesmith.train.resolve import resolve_recipe
from tunesmith.verify.blocks import LIMIT, blocks_written_out
from tunesmith.verify.subject import make_subject

Make = Callable[..., Path]


def _value(directory: Path, method: dict[str, Any], train: dict[str, Any] | None = None) -> float:
    recipe = recipe_from_mapping(
        {
            "model": {"path": str(directory), "device": "cpu"},
            "method": method,
            "data": {"format": "tokens"},
            "train": train or {},
        }
    )
    value = blocks_written_out(make_subject(resolve_recipe(recipe)), torch.device("cpu")).value
    assert value is not None
    return value


@pytest.mark.parametrize("kind", ["full", "lora", "qlora"])
@pytest.mark.parametrize("family", ["qwen2", "qwen3", "mixtral"])
def test_blocks_agree(family: str, kind: str, tiny_model_dir: Make) -> None:
    assert _value(tiny_model_dir(family), {"kind": kind}) < LIMIT


@pytest.mark.parametrize("checkpointing", ["block", "selective"])
def test_checkpointed_blocks_agree(checkpointing: str, tiny_model_dir: Make) -> None:
    assert _value(tiny_model_dir("llama"), {"kind": "lora"}, {"checkpointing": checkpointing}) < LIMIT


def test_a_wrong_backward_pass_is_seen(tiny_model_dir: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    right = rms_norm_backward

    def forgetful(*args: Any) -> Any:
        grad_y, x, weight, rstd, _add, weight_grad = args
        return right(grad_y, x, weight, rstd, None, weight_grad)

    monkeypatch.setattr(fused, "rms_norm_backward", forgetful)
    assert _value(tiny_model_dir("llama"), {"kind": "lora"}) > 100 * LIMIT
