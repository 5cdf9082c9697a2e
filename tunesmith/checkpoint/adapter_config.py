"""PEFT's adapter_config.json: what we write, what we read, and what is refused by name."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tunesmith.checkpoint.module_patterns import matches_end
from tunesmith.errors import AdapterError
from tunesmith.model.lora import AdapterOptions

CONFIG = "adapter_config.json"
# Read by `options_for`, or of no consequence once the tensors exist.
_KNOWN = frozenset(
    {
        "alpha_pattern",
        "auto_mapping",
        "base_model_name_or_path",
        "bias",
        "corda_config",
        "ensure_weight_tying",
        "eva_config",
        "exclude_modules",
        "fan_in_fan_out",
        "inference_mode",
        "init_lora_weights",
        "layers_pattern",
        "layers_to_transform",
        "loftq_config",
        "lora_alpha",
        "lora_dropout",
        "lora_ga_config",
        "megatron_core",
        "peft_type",
        "peft_version",
        "qalora_group_size",
        "r",
        "rank_pattern",
        "revision",
        "target_modules",
        "task_type",
        "use_dora",
        "use_rslora",
    }
)
# Initialisations that change the base itself: the adapter alone doesn't say how.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga", "mica")


def read_adapter_config(directory: Path) -> dict[str, Any]:
    """The content of adapter_config.json. Raises: AdapterError for one that asks for what we don't have, naming it."""
    path = directory / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise AdapterError(f"{directory} has no {CONFIG}: name a directory with an adapter in PEFT's format") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise AdapterError(f"{path} is not valid JSON: {error}") from None
    except RecursionError:
        raise AdapterError(f"{path} is no adapter's configuration: it is nested too deeply") from None
    if not isinstance(config, dict):
        raise AdapterError(f"{path} must hold a JSON object, got {type(config).__name__}")
    _refuse_unsupported(config, path)
    return config


def _refuse_unsupported(config: Mapping[str, Any], path: Path) -> None:
    if config.get("peft_type") != "LORA":
        raise AdapterError(f"{path}: peft_type is {config.get('peft_type')!r}; only LORA adapters are read")
    if config.get("bias", "none") != "none":
        raise AdapterError(f"{path}: bias is {config['bias']!r}; only adapters with bias 'none' are read")
    unsupported = sorted(key for key, value in config.items() if value and key not in _KNOWN)
    if unsupported:
        raise AdapterError(
            f"{path} uses {', '.join(unsupported)}, which tunesmith does not have: merge the adapter into its base "
            f"with PEFT (merge_and_unload) and load the result as a model"
        )
    init = str(config.get("init_lora_weights", True)).lower()
    if init.startswith(_CHANGES_BASE):
        raise AdapterError(
            f"{path}: init_lora_weights {init!r} changed the base as well: convert the adapter to plain LoRA with "
            f"PEFT (save_pretrained with path_initial_model_for_weight_conversion)"
        )
    for key, patterns in (("r", "rank_pattern"), ("lora_alpha", "alpha_pattern")):
        found = config.get(patterns) or {}
        if not isinstance(found, dict):
            raise AdapterError(f"{path}: {patterns} must be a mapping, got {type(found).__name__}")
        for name, value in [(key, config.get(key)), *((f"{patterns} of {module}", v) for module, v in found.items())]:
            _positive(name, value, path)
    dropout = config.get("lora_dropout") or 0
    if not isinstance(dropout, int | float) or not 0 <= dropout < 1:
        raise AdapterError(f"{path}: lora_dropout must be a number from 0 to below 1, got {dropout!r}")


def _positive(name: str, value: Any, path: Path) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise AdapterError(f"{path}: {name} must be a positive number, got {value!r}")


def options_for(config: Mapping[str, Any], module: str) -> AdapterOptions:
    """What the adapter of one module (by Hugging Face's name) is made of, patterns considered."""
    rank = _by_pattern(config.get("rank_pattern"), module, config["r"])
    alpha = _by_pattern(config.get("alpha_pattern"), module, config["lora_alpha"])
    return AdapterOptions(
        rank=int(rank),
        alpha=float(alpha),
        dropout=float(config.get("lora_dropout") or 0.0),
        rslora=bool(config.get("use_rslora")),
        dora=bool(config.get("use_dora")),
    )


def _by_pattern(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """The value of the first pattern that matches the end of the module's name, as PEFT matches them."""
    for pattern, value in (patterns or {}).items():
        if matches_end(pattern, module):
            return value
    return default


def build_adapter_config(
    options: Mapping[str, AdapterOptions],
    all_modules: Iterable[str],
    base_path: str,
    fan_in_fan_out: bool,
    revision: str | None = None,
) -> dict[str, Any]:
    """adapter_config.json for adapters by Hugging Face's module names; `all_modules` are those without one, too."""
    first = next(iter(options.values()))
    rank = Counter(o.rank for o in options.values()).most_common(1)[0][0]
    alpha = Counter(o.alpha for o in options.values()).most_common(1)[0][0]
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_path,
        "revision": revision,
        "r": rank,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": first.dropout,
        "target_modules": _target_modules(list(options), list(all_modules)),
        "rank_pattern": {re.escape(name): o.rank for name, o in options.items() if o.rank != rank},
        "alpha_pattern": {re.escape(name): o.alpha for name, o in options.items() if o.alpha != alpha},
        "use_rslora": first.rslora,
        "use_dora": first.dora,
        "fan_in_fan_out": fan_in_fan_out,
        "bias": "none",
        "init_lora_weights": True,
        "inference_mode": True,
        "modules_to_save": None,
    }


def _target_modules(adapted: list[str], all_modules: list[str]) -> list[str]:
    """Last names where they select exactly the adapted modules, else the full names."""
    short = sorted({name.rsplit(".", 1)[-1] for name in adapted})
    selected = {name for name in all_modules if name.rsplit(".", 1)[-1] in short}
    return short if selected == set(adapted) else sorted(adapted)
