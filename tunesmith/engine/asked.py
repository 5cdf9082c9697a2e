"""What decides which kernels an engine launches, as plain data, known before anything is imported or loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal


@dataclass(frozen=True)
class Asked:
    """What decides which kernels an engine launches; the names are those of `tunesmith.LLM`."""

    model: str
    adapter: str | None = None
    quantize: str | None = None
    head: str = "auto"
    dtype: str = "auto"
    device: str = "auto"
    backend: str = "auto"
    revision: str | None = None
    max_model_len: int | None = None
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    kv_cache_dtype: str = "auto"
    tensor_parallel_size: int = 1
    enforce_eager: bool = False
    batch_invariant: bool = False
    weights: Literal["checkpoint", "random"] = "checkpoint"

    @staticmethod
    def of(arguments: Mapping[str, Any]) -> Asked:
        """Of the arguments of `LLM`, or some of them; others are left aside."""
        known = {field.name for field in fields(Asked)}
        plain = {name: _plain(value) for name, value in arguments.items() if name in known}
        return Asked(**plain)


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    return value if isinstance(value, str | int | bool | None) else str(value).removeprefix("torch.")
