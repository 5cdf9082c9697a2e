"""Every token of builtin:tiny has an embedding of its own."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    path = ROOT / "scripts" / "spread_unseen_rows.py"
    spec = importlib.util.spec_from_file_location("spread_unseen_rows", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_no_two_tokens_of_the_embedded_model_are_alike(script: ModuleType) -> None:
    """266 tokens ("@", "%", "种", bytes of rare characters) had one and the same row: a fine-tuned model wrote
    "hr\\ufffdsongguo.example", or "verybody" for "@", whatever the number of steps.
    """
    tensors = load_file(ROOT / "tunesmith" / "models" / "tiny" / "model.safetensors")
    assert not script.unseen_rows(tensors[script.EMBEDDING]).any()


def test_only_rows_that_are_alike_change_and_keep_what_they_share(script: ModuleType) -> None:
    draw = torch.Generator().manual_seed(1)
    embedding = torch.randn(400, 64, generator=draw)
    embedding[:150] = torch.ones(64) / 8 + 0.001 * torch.randn(150, 64, generator=draw)  # of length 1
    unseen = script.unseen_rows(embedding)
    assert unseen.tolist() == [True] * 150 + [False] * 250
    changed = script.spread(embedding, unseen)
    assert torch.equal(changed[150:], embedding[150:])
    shared = torch.nn.functional.normalize(torch.ones(64), dim=0)
    torch.testing.assert_close(changed[:150] @ shared, embedding[:150] @ shared, atol=0.01, rtol=0)
    assert not script.unseen_rows(changed).any()
