"""The gradient of a global batch does not depend on how it is cut into micro-batches, packed or padded."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from tunesmith.checkpoint.load import load_language_model
from tunesmith.recipe.schema import DataSection, ModelSection
from tunesmith.text.dataset import Document
from tunesmith.text.packing import plan_epoch
from tunesmith.train.batches import build_micro_batch
from tunesmith.train.session import language_model_loss

LENGTHS = (40, 7, 64, 23, 11, 5, 58, 30, 2, 49, 17, 33, 12, 61, 9, 26, 20)  # 17 documents: every window is ragged
MAX_LENGTH = 64
# Float32 sums in another order: observed below 2e-6.
TOLERANCE = 1e-5


class _Documents:
    """Documents with a prompt that is not trained, of very different lengths."""

    def __init__(self) -> None:
        generator = np.random.default_rng(7)
        self.lengths = np.array(LENGTHS, dtype=np.int64)
        self.hashes = np.zeros(len(LENGTHS), dtype=np.uint64)
        self._tokens = [generator.integers(0, 272, length).astype(np.int32) for length in LENGTHS]
        self._trained = [np.arange(length) >= max(1, length // 3) for length in LENGTHS]

    def __len__(self) -> int:
        return len(LENGTHS)

    def arrays(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        return self._tokens[index], self._trained[index]

    def __getitem__(self, index: int) -> Document:
        return Document(*self.arrays(index), f"row:{index}")


def _gradient(model: torch.nn.Module, micro_batches: int, packing: bool) -> tuple[torch.Tensor, float]:
    """The gradient of all documents as one global batch, cut into about so many micro-batches."""
    data = DataSection(max_length=MAX_LENGTH, packing=packing)
    documents = _Documents()
    tokens = max(MAX_LENGTH, -(-sum(LENGTHS) // micro_batches))
    if not packing:
        tokens = MAX_LENGTH * (len(LENGTHS) // micro_batches)  # slots: the last micro-batch is ragged
    plan = plan_epoch(LENGTHS, tokens, seed=1, epoch=0, packing=packing, max_length=MAX_LENGTH)
    assert len(plan) >= micro_batches
    batches = [build_micro_batch(documents, indices, tokens, data, 272) for indices in plan]
    denominator = sum(batch.num_trained for batch in batches)
    model.zero_grad()
    total = 0.0
    for batch in batches:
        loss, _ = language_model_loss(model, batch, chunk_tokens=50)
        (loss / denominator).backward()
        total += loss.item()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    return gradient.clone(), total / denominator


@pytest.mark.parametrize("family", ["qwen2", "gpt2", "mixtral"])
@pytest.mark.parametrize("packing", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("micro_batches", [1, 2, 8])
def test_gradient_is_that_of_the_documents_one_by_one(
    tiny_model_dir: Callable[..., Path], family: str, packing: bool, micro_batches: int
) -> None:
    model = load_language_model(ModelSection(path=str(tiny_model_dir(family))), dtype=torch.float32, device="cpu")
    model.train()
    expected, expected_loss = _one_by_one(model)
    gradient, loss = _gradient(model, micro_batches, packing)
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    assert ((gradient - expected).norm() / expected.norm()).item() < TOLERANCE


def _one_by_one(model: torch.nn.Module) -> tuple[torch.Tensor, float]:
    """Each document alone in its pack, without any filler: the truth."""
    documents = _Documents()
    build = partial(build_micro_batch, documents, data=DataSection(max_length=MAX_LENGTH), vocab_size=272)
    batches = [build([index], micro_batch_tokens=length) for index, length in enumerate(LENGTHS)]
    denominator = sum(batch.num_trained for batch in batches)
    model.zero_grad()
    total = 0.0
    for batch in batches:
        loss, _ = language_model_loss(model, batch, chunk_tokens=10_000)
        (loss / denominator).backward()
        total += loss.item()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).clone(), total / denominator
