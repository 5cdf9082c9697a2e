"""What a decoder looks like: a frozen `ModelConfig` read from a Hugging Face config.json.

Families differ by data only: a family is a function from the raw configuration to a `ModelConfig`.
A model type that is not in `FAMILIES` is not an error here: `read_config` raises UnsupportedModelError,
and the caller may then choose the transformers backend.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from tunesmith.errors import ModelError, UnsupportedModelError

MAX_LAYERS = 10_000  # no model comes near; a corrupted number would keep the machine busy for hours
_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
)


@dataclass(frozen=True)
class RopeConfig:
    """Rotary positions. `scaling`: None, or the parameters of Llama 3's or linear scaling, in Hugging Face's names."""

    theta: float = 10000.0
    scaling: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class MoeConfig:
    """A mixture of experts in place of the MLP, in the layers named by `layers`."""

    num_experts: int
    num_experts_per_tok: int
    intermediate_size: int
    norm_topk_prob: bool
    layers: tuple[int, ...]


@dataclass(frozen=True)
class ModelConfig:
    """A causal decoder. Names are Hugging Face's; `raw` is the configuration it came from, saved back as it was."""

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    norm_eps: float
    norm: Literal["rms", "layer"] = "rms"
    activation: Literal["silu", "gelu_new", "gelu", "gelu_pytorch_tanh", "relu"] = "silu"
    gated_mlp: bool = True
    rope: RopeConfig | None = field(default_factory=RopeConfig)
    learned_positions: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    sliding_window: int | None = None
    sliding_layers: tuple[int, ...] = ()
    moe: MoeConfig | None = None
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    raw: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)

    def window(self, layer: int) -> int | None:
        """How many positions layer `layer` sees, itself included; None for all before it."""
        return self.sliding_window if layer in self.sliding_layers else None

    def is_moe(self, layer: int) -> bool:
        """Whether layer `layer` has experts."""
        return self.moe is not None and layer in self.moe.layers


def read_config(directory: Path) -> ModelConfig:
    """The configuration of the model in `directory`.

    Raises: ModelError when config.json is missing or malformed; UnsupportedModelError for a model type, or a
    feature of one, that the native decoder does not have.
    """
    return config_from_dict(read_raw_config(directory))


def read_raw_config(directory: Path) -> dict[str, Any]:
    """The content of a model's config.json. Raises: ModelError when it is missing or malformed."""
    path = directory / "config.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(_no_model(directory)) from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ModelError(f"{path} is not valid JSON: {error}") from None
    except RecursionError:
        raise ModelError(f"{path} is no model configuration: it is nested too deeply") from None
    except OSError as error:
        raise ModelError(f"{path} can't be read: {error.strerror}") from None
    if not isinstance(raw, dict):
        raise ModelError(f"{path} must hold a JSON object, got {type(raw).__name__}")
    return raw


def _no_model(directory: Path) -> str:
    """What a folder without a config.json is instead, and what to do with it."""
    if (directory / "adapter_config.json").is_file():
        return f"{directory} is an adapter, not a model: name its base model, and beside it --adapter {directory}"
    if (directory / "run.json").is_file():
        return (
            f"{directory} is a run, not a model: make one model of it and its base: tunesmith merge {directory} "
            "--output DIR (a run of a whole model has it in final/)"
        )
    return f"{directory} has no config.json: name a Hugging Face model directory"


def config_from_dict(raw: Mapping[str, Any]) -> ModelConfig:
    """The configuration from the content of a config.json. Raises as `read_config`."""
    model_type = raw.get("model_type")
    family = FAMILIES.get(str(model_type))
    if family is None:
        known = ", ".join(sorted(FAMILIES))
        raise UnsupportedModelError(f"model type {model_type!r} is not known natively (known: {known})")
    try:
        config = family(raw)
    except KeyError as error:
        raise ModelError(f"config.json of a {model_type} model lacks the key {error}") from None
    except (TypeError, ValueError, OverflowError, ZeroDivisionError) as error:
        if isinstance(error, ModelError):
            raise
        raise ModelError(f"config.json of a {model_type} model has a value of the wrong kind: {error}") from None
    _check_sizes(config)
    return config


def _check_sizes(config: ModelConfig) -> None:
    """Refuse sizes that no model has, before anything is built from them. Raises: ModelError."""
    where = f"config.json of a {config.family} model"
    for name in _SIZES:
        if getattr(config, name) < 1:
            raise ModelError(f"{where} must have a positive {name}, got {getattr(config, name)}")
    if config.num_hidden_layers > MAX_LAYERS:
        raise ModelError(f"{where} has {config.num_hidden_layers} layers; at most {MAX_LAYERS} are taken")
    if config.num_attention_heads % config.num_key_value_heads:
        raise ModelError(
            f"{where} has {config.num_attention_heads} heads, which {config.num_key_value_heads} key-value heads "
            f"can't share evenly"
        )
    if not (math.isfinite(config.norm_eps) and config.norm_eps >= 0):
        raise ModelError(f"{where} has a norm epsilon of {config.norm_eps}; it must be a number of at least 0")
    if config.moe is not None and not 0 < config.moe.num_experts_per_tok <= config.moe.num_experts:
        raise ModelError(
            f"{where} sends a token to {config.moe.num_experts_per_tok} of {config.moe.num_experts} experts; "
            f"it must be at least 1 and at most all"
        )


def _eos_ids(raw: Mapping[str, Any]) -> tuple[int, ...]:
    eos = raw.get("eos_token_id")
    if eos is None:
        return ()
    return tuple(eos) if isinstance(eos, list) else (int(eos),)


_SCALING_NUMBERS = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


def _rope(raw: Mapping[str, Any]) -> RopeConfig:
    """Rotary parameters in either spelling: `rope_parameters` (transformers 5) or `rope_theta` + `rope_scaling`."""
    parameters = dict(raw.get("rope_parameters") or {})
    theta = float(parameters.pop("rope_theta", raw.get("rope_theta", 10000.0)))
    scaling = parameters or dict(raw.get("rope_scaling") or {})
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return RopeConfig(theta)
    if kind not in ("llama3", "linear"):
        raise UnsupportedModelError(f"rope scaling {kind!r} is not known natively (known: default, linear, llama3)")
    numbers = {key: float(scaling[key]) for key in _SCALING_NUMBERS[kind]}
    return RopeConfig(theta, {**scaling, **numbers, "rope_type": kind})


def _activation(name: Any) -> Any:
    if name not in ("silu", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu"):
        raise UnsupportedModelError(f"activation {name!r} is not known natively")
    return name


def _llama_like(raw: Mapping[str, Any], **overrides: Any) -> ModelConfig:
    """The common ground of Llama, Mistral, Qwen and their mixtures of experts."""
    num_heads = int(raw["num_attention_heads"])
    hidden_size = int(raw["hidden_size"])
    values: dict[str, Any] = {
        "family": str(raw["model_type"]),
        "vocab_size": int(raw["vocab_size"]),
        "hidden_size": hidden_size,
        "intermediate_size": int(raw["intermediate_size"]),
        "num_hidden_layers": int(raw["num_hidden_layers"]),
        "num_attention_heads": num_heads,
        "num_key_value_heads": int(raw.get("num_key_value_heads") or num_heads),
        "head_dim": int(raw.get("head_dim") or hidden_size // num_heads),
        "max_position_embeddings": int(raw.get("max_position_embeddings", 2048)),
        "norm_eps": float(raw.get("rms_norm_eps", 1e-6)),
        "activation": _activation(raw.get("hidden_act", "silu")),
        "rope": _rope(raw),
        "qkv_bias": bool(raw.get("attention_bias", False)),
        "output_bias": bool(raw.get("attention_bias", False)),
        "mlp_bias": bool(raw.get("mlp_bias", False)),
        "tie_word_embeddings": bool(raw.get("tie_word_embeddings", False)),
        "initializer_range": float(raw.get("initializer_range", 0.02)),
        "bos_token_id": raw.get("bos_token_id"),
        "eos_token_ids": _eos_ids(raw),
        "raw": dict(raw),
    }
    return ModelConfig(**{**values, **overrides})


def _all_layers_slide(raw: Mapping[str, Any], default: int | None = None) -> dict[str, Any]:
    window = raw.get("sliding_window", default)
    layers = tuple(range(int(raw["num_hidden_layers"]))) if window else ()
    return {"sliding_window": window, "sliding_layers": layers}


def _qwen_window(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Qwen slides only when asked to, and only above `max_window_layers` (or as `layer_types` says)."""
    if not raw.get("use_sliding_window") or not raw.get("sliding_window"):
        return {}
    types = raw.get("layer_types")
    if types:
        layers = tuple(i for i, kind in enumerate(types) if kind == "sliding_attention")
    else:
        layers = tuple(range(int(raw.get("max_window_layers", 28)), int(raw["num_hidden_layers"])))
    return {"sliding_window": int(raw["sliding_window"]), "sliding_layers": layers}


def _mixtral(raw: Mapping[str, Any]) -> ModelConfig:
    moe = MoeConfig(
        num_experts=int(raw["num_local_experts"]),
        num_experts_per_tok=int(raw["num_experts_per_tok"]),
        intermediate_size=int(raw["intermediate_size"]),
        norm_topk_prob=True,
        layers=tuple(range(int(raw["num_hidden_layers"]))),
    )
    return _llama_like(raw, moe=moe, qkv_bias=False, output_bias=False, **_all_layers_slide(raw))


def _qwen3_moe(raw: Mapping[str, Any]) -> ModelConfig:
    step = int(raw.get("decoder_sparse_step", 1))
    dense = set(raw.get("mlp_only_layers") or ())
    layers = tuple(i for i in range(int(raw["num_hidden_layers"])) if i not in dense and (i + 1) % step == 0)
    moe = MoeConfig(
        num_experts=int(raw.get("num_experts") or raw["num_local_experts"]),
        num_experts_per_tok=int(raw["num_experts_per_tok"]),
        intermediate_size=int(raw["moe_intermediate_size"]),
        norm_topk_prob=bool(raw.get("norm_topk_prob", False)),
        layers=layers,
    )
    # Unlike the dense Qwens, it slides in every layer or in none.
    window = _all_layers_slide(raw) if raw.get("use_sliding_window") else {}
    return _llama_like(raw, moe=moe, qk_norm=True, **window)


def _gpt2(raw: Mapping[str, Any]) -> ModelConfig:
    if raw.get("scale_attn_by_inverse_layer_idx") or not raw.get("scale_attn_weights", True):
        raise UnsupportedModelError("GPT-2 with a changed attention scale is not known natively")
    if raw.get("add_cross_attention"):
        raise UnsupportedModelError("GPT-2 with cross attention is not known natively")
    hidden_size, num_heads = int(raw["n_embd"]), int(raw["n_head"])
    return ModelConfig(
        family="gpt2",
        vocab_size=int(raw["vocab_size"]),
        hidden_size=hidden_size,
        intermediate_size=int(raw.get("n_inner") or 4 * hidden_size),
        num_hidden_layers=int(raw["n_layer"]),
        num_attention_heads=num_heads,
        num_key_value_heads=num_heads,
        head_dim=hidden_size // num_heads,
        max_position_embeddings=int(raw.get("n_positions", 1024)),
        norm_eps=float(raw.get("layer_norm_epsilon", 1e-5)),
        norm="layer",
        activation=_activation(raw.get("activation_function", "gelu_new")),
        gated_mlp=False,
        rope=None,
        learned_positions=True,
        qkv_bias=True,
        output_bias=True,
        mlp_bias=True,
        tie_word_embeddings=bool(raw.get("tie_word_embeddings", True)),
        initializer_range=float(raw.get("initializer_range", 0.02)),
        bos_token_id=raw.get("bos_token_id"),
        eos_token_ids=_eos_ids(raw),
        raw=dict(raw),
    )


FAMILIES: dict[str, Callable[[Mapping[str, Any]], ModelConfig]] = {
    "llama": _llama_like,
    "mistral": lambda raw: _llama_like(raw, qkv_bias=False, output_bias=False, **_all_layers_slide(raw, 4096)),
    "qwen2": lambda raw: _llama_like(raw, qkv_bias=True, output_bias=False, **_qwen_window(raw)),
    "qwen3": lambda raw: _llama_like(raw, qk_norm=True, **_qwen_window(raw)),
    "mixtral": _mixtral,
    "qwen3_moe": _qwen3_moe,
    "gpt2": _gpt2,
}
