"""Models in for inference: every weight format there is, by one name."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, cast

import torch

from tunesmith.checkpoint.load import Backend, load_model
from tunesmith.model.language_model import LanguageModel


def load_for_inference(
    path: str | Path,
    *,
    quantize: str | None = None,
    adapter: str | Path | None = None,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "auto",
    revision: str | None = None,
    backend: Backend = "auto",
    weights: Literal["checkpoint", "random"] = "checkpoint",
    seed: int = 0,
) -> LanguageModel:
    """A language model in evaluation mode, its linears in the form that is fastest to decode with."""
    return load_model(
        path,
        adapter=adapter,
        quantize=cast(Any, quantize),
        dtype=dtype,
        device=device,
        backend=backend,
        weights=weights,
        seed=seed,
        revision=revision,
    )
