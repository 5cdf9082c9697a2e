"""The random generators of every kind: seeded, captured, restored."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor


def seed_everything(seed: int) -> None:
    """Seed Python's, NumPy's and torch's generators (the GPU's too)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def capture(device: torch.device) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state of every generator: tensors by name, and plain values."""
    tensors = {"torch": torch.get_rng_state()}
    if device.type == "cuda":
        tensors["cuda"] = torch.cuda.get_rng_state(device)
    version, words, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    tensors["python"] = torch.tensor(words, dtype=torch.int64)
    tensors["numpy"] = torch.from_numpy(np.asarray(keys).astype(np.int64))
    facts = {
        "python": {"version": version, "gauss": gauss},
        "numpy": {"kind": kind, "position": int(position), "has_gauss": int(has_gauss), "cached": float(cached)},
    }
    return tensors, facts


def restore(tensors: Mapping[str, Tensor], facts: Mapping[str, Any], device: torch.device) -> None:
    """Put every generator back to what `capture` saw. A GPU's is left alone when the state was taken without one."""
    torch.set_rng_state(tensors["torch"].cpu())
    if device.type == "cuda" and "cuda" in tensors:
        torch.cuda.set_rng_state(tensors["cuda"].cpu(), device)
    python, numpy = facts["python"], facts["numpy"]
    random.setstate((python["version"], tuple(tensors["python"].tolist()), python["gauss"]))
    keys = tensors["numpy"].numpy().astype(np.uint32)
    np.random.set_state((numpy["kind"], keys, numpy["position"], numpy["has_gauss"], numpy["cached"]))


@contextlib.contextmanager
def seeded(device: torch.device, *numbers: int) -> Iterator[None]:
    """Every generator seeded by `numbers` (at least 0) within the block, and as it was before after it."""
    generators, facts = capture(device)
    seed_everything(int(np.random.SeedSequence(numbers).generate_state(1)[0]))
    try:
        yield
    finally:
        restore(generators, facts, device)
