"""Parameter counts against published totals, and the names a freeze method may use."""

from __future__ import annotations

from pathlib import Path

import pytest

from tunesmith.arch import config_from_dict, read_config
from tunesmith.cost.params import count_parameters, trainable_parameters
from tunesmith.cost.shapes import MethodShape
from tunesmith.errors import RecipeError

PUBLISHED = {
    "Qwen2.5-7B-Instruct": 7_615_616_512,
    "Llama-3.2-3B-Instruct": 3_212_749_824,
    "Mistral-7B-Instruct-v0.2": 7_241_732_096,
    "Mixtral-8x7B-v0.1": 46_702_792_704,
    "Qwen3-30B-A3B": 30_532_122_624,
    "gpt2-large": 774_030_080,
}
TINY = {
    "model_type": "llama",
    "vocab_size": 50,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_totals_equal_the_published_ones(name: str, data_dir: Path) -> None:
    directory = data_dir / "model_configs" / name
    if not (directory / "config.json").exists():
        pytest.skip(f"{directory} is absent")
    assert count_parameters(read_config(directory)).total == PUBLISHED[name]


def test_first_and_last_blocks_may_overlap() -> None:
    config = config_from_dict(TINY)
    whole = trainable_parameters(config, MethodShape("freeze", trainable=["first:2", "last:2"]))
    assert whole == trainable_parameters(config, MethodShape("freeze", trainable=["last:9"]))


def test_tied_head_and_embedding_are_one_matrix() -> None:
    config = config_from_dict({**TINY, "tie_word_embeddings": True})
    counts = {
        trainable_parameters(config, MethodShape("freeze", trainable=names))
        for names in (["head"], ["embedding"], ["head", "embedding"])
    }
    assert counts == {50 * 8}


def test_norms_of_trained_blocks_are_not_counted_twice() -> None:
    config = config_from_dict(TINY)
    everything = ["first:3", "norms", "head", "embedding"]
    assert trainable_parameters(config, MethodShape("freeze", trainable=everything)) == count_parameters(config).total


@pytest.mark.parametrize("name", ["last", "last:x", "middle:2", "heads"])
def test_unknown_name_is_refused(name: str) -> None:
    with pytest.raises(RecipeError, match="first:N"):
        trainable_parameters(config_from_dict(TINY), MethodShape("freeze", trainable=[name]))


def test_untargeted_linears_get_no_adapter() -> None:
    config = config_from_dict(TINY)
    assert trainable_parameters(config, MethodShape("lora", rank=2, targets=["q_proj"])) == 3 * 2 * (8 + 8)
    assert trainable_parameters(config, MethodShape("lora", rank=2, targets=["q_proj"], dora=True)) == 3 * (32 + 8)
