"""tunesmith plans, trains, compresses, serves and measures language models.

The stable Python interface; everything is imported when it is first used, so that `import tunesmith` is quick.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_EXPORTS = {
    "LLM": "tunesmith.engine.llm",
    "evaluate": "tunesmith.bench.quality",
    "load_model": "tunesmith.checkpoint.load",
    "logits": "tunesmith.model.language_model",
    "TunesmithError": "tunesmith.errors",
}
_CALLABLE_PACKAGES = ("bench", "train")
__all__ = ["LLM", "TunesmithError", "__version__", "bench", "evaluate", "load_model", "logits", "train"]


def __getattr__(name: str) -> Any:
    if name in _CALLABLE_PACKAGES:
        return importlib.import_module(f"tunesmith.{name}")
    if name not in _EXPORTS:
        raise AttributeError(f"module 'tunesmith' has no attribute {name!r}")
    module = importlib.import_module(_EXPORTS[name])
    return getattr(module, name)


def __dir__() -> list[str]:
    return sorted(__all__)
