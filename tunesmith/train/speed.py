"""What a step did to the machine: model FLOP/s, MFU, memory. What is not known is None."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch

from tunesmith.arch import ModelConfig
from tunesmith.cost.flops import training_flops
from tunesmith.hardware import describe_device
from tunesmith.model.language_model import LanguageModel
from tunesmith.recipe.schema import Recipe
from tunesmith.train.batches import MicroBatch
from tunesmith.watch.memory import resident_bytes


class SpeedMeter:
    """Measures one session's steps."""

    def __init__(self, model: LanguageModel, recipe: Recipe, device: torch.device) -> None:
        config = getattr(model, "config", None)
        self._config = config if isinstance(config, ModelConfig) else None
        self._method = recipe.method
        self._device = device
        self._peak_flops_per_s = peak_flops_per_s(device, recipe.train.precision)
        self._document_flops = lru_cache(maxsize=65536)(self._count)

    def measure(self, batches: Sequence[MicroBatch], duration_s: float) -> dict[str, Any]:
        """The machine's part of StepMetrics."""
        return self.with_rates(self.look(batches), duration_s)

    def look(self, batches: Sequence[MicroBatch]) -> dict[str, Any]:
        """What is known before a step's duration is: its operations, and the memory as it is now."""
        return {
            "model_flops": self.model_flops(batches),
            "host_resident_bytes": resident_bytes(),
            **self._device_memory(),
        }

    def with_rates(self, facts: Mapping[str, Any], duration_s: float) -> dict[str, Any]:
        """What `look` saw, and the rates that a duration makes of it."""
        flops, peak = facts["model_flops"], self._peak_flops_per_s
        rate = None if flops is None else flops / duration_s
        return {**facts, "model_flops_per_s": rate, "mfu_ratio": rate / peak if rate and peak else None}

    def model_flops(self, batches: Sequence[MicroBatch]) -> int | None:
        """Forward and backward operations of the real tokens; None for an architecture that is not counted."""
        if self._config is None:
            return None
        documents = sum(self._document_flops(length, 0) for batch in batches for length in batch.lengths)
        head_each = self._document_flops(1, 1) - self._document_flops(1, 0)
        return documents + head_each * sum(batch.num_trained for batch in batches)

    def _count(self, length: int, trained_tokens: int) -> int:
        assert self._config is not None
        return training_flops(self._config, self._method, length, trained_tokens=trained_tokens).model

    def _device_memory(self) -> dict[str, int]:
        if self._device.type != "cuda":
            return {}
        return {
            "device_allocated_bytes": torch.cuda.memory_allocated(self._device),
            "device_peak_bytes": torch.cuda.max_memory_allocated(self._device),
        }


def peak_flops_per_s(device: torch.device, precision: str) -> float | None:
    """The device's published dense peak in this precision, or None."""
    return describe_device(device).peak(precision)
