"""ModelConfig against released configurations, and the refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tunesmith.arch import config_from_dict, read_config
from tunesmith.errors import ModelError, UnsupportedModelError
from tunesmith.model.decoder import Decoder

_LLAMA = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
RELEASED = [
    "Llama-3.2-3B-Instruct/config.json",
    "Meta-Llama-3.1-8B/config.json",
    "Mistral-7B-Instruct-v0.2/config.json",
    "Mixtral-8x7B-v0.1/config.json",
    "Qwen2.5-0.5B-Instruct/config.json",
    "Qwen2.5-1.5B-Instruct/config.json",
    "Qwen2.5-7B-Instruct/config.json",
    "Qwen3-0.6B/config.json",
    "Qwen3-30B-A3B/config.json",
    "Qwen3-8B/config.json",
    "gpt2-large/config.json",
    "_extracted/Llama-3.2-1B.config.json",
    "_extracted/Llama-3.2-1B.hfdict.config.json",
    "_extracted/Qwen2-0.5B.config.json",
    "_extracted/Qwen2.5-3B.config.json",
    "_extracted/gpt2-medium.config.json",
    "_extracted/gpt2.config.json",
]


@pytest.mark.parametrize("name", RELEASED)
def test_released_models_have_transformers_parameter_count(name: str, data_dir: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    path = data_dir / "model_configs" / name
    if not path.is_file():
        pytest.skip(f"{name} is absent")
    raw = json.loads(path.read_text(encoding="utf-8"))
    with torch.device("meta"):
        ours = Decoder(config_from_dict(raw))
        theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(**raw))
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"model_type": "mystery"}, "'mystery' is not known natively"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope scaling 'dynamic'"),
        ({"hidden_act": "mish"}, "activation 'mish'"),
    ],
)
def test_what_the_decoder_lacks_is_unsupported(change: dict[str, Any], problem: str) -> None:
    with pytest.raises(UnsupportedModelError, match=problem):
        config_from_dict({**_LLAMA, **change})


def test_an_activation_of_gpt2_that_the_decoder_lacks() -> None:
    """It passed, and building the decoder ended in a KeyError instead of on the transformers backend."""
    gpt2 = {"model_type": "gpt2", "vocab_size": 64, "n_embd": 32, "n_head": 4, "n_layer": 2}
    with pytest.raises(UnsupportedModelError, match="activation 'swish'"):
        config_from_dict({**gpt2, "activation_function": "swish"})


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"hidden_size": None}, "wrong kind"),
        ({"num_attention_heads": 0}, "wrong kind"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor"),
        ({"rope_scaling": {"rope_type": "linear", "factor": "two"}}, "wrong kind"),
    ],
)
def test_a_value_of_the_wrong_kind_is_a_model_error(change: dict[str, Any], problem: str) -> None:
    """Such values ended in a TypeError, ValueError or KeyError, the rope's only in the first forward pass."""
    with pytest.raises(ModelError, match=problem):
        config_from_dict({**_LLAMA, **change})


def test_a_folder_that_is_no_model_says_what_it_is(tmp_path: Path) -> None:
    """It was "has no config.json" for an adapter, and for a run."""
    with pytest.raises(ModelError, match=r"has no config\.json"):
        read_config(tmp_path)
    (tmp_path / "run.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ModelError, match=rf"is a run, not a model: .*tunesmith merge {tmp_path} --output DIR"):
        read_config(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ModelError, match=rf"is an adapter, not a model: .*--adapter {tmp_path}$"):
        read_config(tmp_path)


def test_a_missing_key_is_named() -> None:
    with pytest.raises(ModelError, match="vocab_size"):
        config_from_dict({key: value for key, value in _LLAMA.items() if key != "vocab_size"})


@pytest.mark.parametrize(
    ("content", "problem"), [("{", "not valid JSON"), ("[]", "JSON object"), (None, "config.json")]
)
def test_a_malformed_file_is_named(content: str | None, problem: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content, encoding="utf-8")
    with pytest.raises(ModelError, match=problem):
        read_config(tmp_path)


def test_sliding_windows_by_layer() -> None:
    qwen = {**_LLAMA, "model_type": "qwen2", "sliding_window": 4, "max_window_layers": 1}
    assert config_from_dict(qwen).window(1) is None
    config = config_from_dict({**qwen, "use_sliding_window": True})
    assert [config.window(0), config.window(1)] == [None, 4]
    mistral = config_from_dict({**_LLAMA, "model_type": "mistral", "sliding_window": 7})
    assert [mistral.window(0), mistral.window(1)] == [7, 7]


def test_end_of_text_may_be_a_list() -> None:
    assert config_from_dict({**_LLAMA, "eos_token_id": [5, 6]}).eos_token_ids == (5, 6)
    assert config_from_dict({**_LLAMA, "eos_token_id": 5}).eos_token_ids == (5,)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"hidden_size": -32, "head_dim": 8}, "positive hidden_size, got -32"),
        ({"num_hidden_layers": 0}, "positive num_hidden_layers, got 0"),
        ({"num_hidden_layers": 10**7}, "10000000 layers; at most"),
        ({"num_attention_heads": -4}, "positive num_attention_heads"),
        ({"num_key_value_heads": 3}, "3 key-value heads can't share evenly"),
        ({"max_position_embeddings": 0}, "positive max_position_embeddings"),
        ({"rms_norm_eps": float("nan")}, "norm epsilon of nan"),
        ({"model_type": "mixtral", "num_local_experts": 2, "num_experts_per_tok": 3}, "3 of 2 experts"),
    ],
)
def test_impossible_sizes_are_refused_before_anything_is_built(change: dict[str, Any], problem: str) -> None:
    """Was: a negative size escaped as torch's RuntimeError, and ten million layers were built for hours."""
    with pytest.raises(ModelError, match=problem):
        config_from_dict({**_LLAMA, **change})


def test_a_configuration_nested_too_deeply_is_refused(tmp_path: Path) -> None:
    """Was: a RecursionError escaped."""
    (tmp_path / "config.json").write_text("[" * 100_000)
    with pytest.raises(ModelError, match="nested too deeply"):
        read_config(tmp_path)


def test_a_window_left_out_is_the_familys_default() -> None:
    """Mistral without the key was once taken to have no window, where transformers gives it one of 4096 tokens."""
    common = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2}
    mistral = {"model_type": "mistral", "num_hidden_layers": 2, **common}
    assert config_from_dict(mistral).window(1) == 4096
    assert config_from_dict({**mistral, "sliding_window": None}).window(1) is None
    qwen = {"model_type": "qwen2", "num_hidden_layers": 29, "use_sliding_window": True, "sliding_window": 16, **common}
    assert [layer for layer in range(29) if config_from_dict(qwen).window(layer)] == [28]
