"""FLOPs of a step against cost's arithmetic; what is unknown is None."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from tunesmith.arch import config_from_dict
from tunesmith.cost.flops import training_flops_of_pack
from tunesmith.recipe.load import recipe_from_mapping
from tunesmith.recipe.schema import DataSection
from tunesmith.train.batches import RandomTokens, build_micro_batch
from tunesmith.train.speed import SpeedMeter, peak_flops_per_s

CONFIG = config_from_dict(
    {
        "model_type": "llama",
        "vocab_size": 97,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
)


@dataclass
class _Model:
    config: Any


def _meter(config: Any, kind: str = "lora") -> SpeedMeter:
    recipe = recipe_from_mapping({"method": {"kind": kind, "rank": 4}, "train": {"precision": "float32"}})
    return SpeedMeter(_Model(config), recipe, torch.device("cpu"))


@pytest.mark.parametrize("kind", ["full", "lora", "qlora"])
def test_flops_are_those_of_the_real_documents(kind: str) -> None:
    documents = RandomTokens(5, 20, 97, seed=0)
    batches = [build_micro_batch(documents, part, 70, DataSection(max_length=32), 97) for part in ([0, 1, 2], [3, 4])]
    recipe = recipe_from_mapping({"method": {"kind": kind, "rank": 4}})
    expected = training_flops_of_pack(CONFIG, recipe.method, [20] * 5, trained_tokens=5 * 19).model
    assert _meter(CONFIG, kind).model_flops(batches) == expected
    measured = _meter(CONFIG, kind).measure(batches, duration_s=2.0)
    assert measured["model_flops_per_s"] == expected / 2
    assert measured["mfu_ratio"] is None  # nobody publishes this CPU's peak
    assert measured["host_resident_bytes"] > 10**7


def test_an_unknown_architecture_has_no_flops() -> None:
    assert _meter(object()).measure([], 1.0)["model_flops_per_s"] is None


def test_a_cpu_has_no_published_peak() -> None:
    assert peak_flops_per_s(torch.device("cpu"), "float32") is None
