"""`train.checkpointing_skip_last` where processes share weights: the same bits, and as many bytes more as it says."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tunesmith.checkpoint.load import load_decoder
from tunesmith.model.decoder import Decoder
from tunesmith.model.methods import apply_method
from tunesmith.parallel.apply import spread_out
from tunesmith.parallel.mesh import Mesh, joined
from tunesmith.recipe.parallel import ParallelSection
from tunesmith.recipe.schema import DataSection, MethodSection, TrainSection
from tunesmith.train.batches import MicroBatch, RandomTokens, build_micro_batch
from tunesmith.train.session import language_model_loss
from tunesmith.train.update import Updater

LAYERS, LENGTH = 3, 20
SPARED = (0, 2)
Outcome = tuple[list[float], dict[str, bytes], int]


def _batch(step: int, rank: int) -> MicroBatch:
    documents = RandomTokens(8, LENGTH, 272, seed=3)
    return build_micro_batch(documents, (2 * step + rank,), LENGTH, DataSection(format="tokens"), 272)


def _saved_bytes(model: Decoder, batch: MicroBatch) -> int:
    """What a forward pass saves for the backward pass, each storage once."""
    saved: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        language_model_loss(model, batch, 64)[0].backward()
    return sum(tensor.untyped_storage().nbytes() for tensor in saved.values())


def spare(model_dir: str, method: str, strategy: str, checkpointing: str) -> list[Outcome]:
    """Losses and this rank's weights after two steps, and what a pass saves; for each number of spared blocks."""
    settings = ParallelSection(strategy=strategy)
    with joined(settings, "cpu") as mesh:
        return [_train(model_dir, method, settings, mesh, checkpointing, spared) for spared in SPARED]


def _train(
    model_dir: str, method: str, settings: ParallelSection, mesh: Mesh, checkpointing: str, spared: int
) -> Outcome:
    section = MethodSection(kind=method, rank=4)
    model = load_decoder(Path(model_dir), quantize=section.quantisation, weights="random")
    apply_method(model, section, seed=0)
    model.is_fused, model.checkpointing, model.skip_last = True, checkpointing, spared  # type: ignore[assignment]
    updater = Updater(model, TrainSection(learning_rate=1e-3), 2, spread_out(model.train(), mesh, settings))
    loss = partial(language_model_loss, chunk_tokens=64)
    losses = []
    for step in range(2):
        batch = _batch(step, mesh.index("dp"))
        count = mesh.size("dp") * batch.num_trained
        losses.append(updater.step(step, [batch], loss, denominator=count, describe=lambda _: "a batch").loss)
    bits = {piece.name: piece.local.detach().numpy().tobytes() for piece in updater.pieces}
    return losses, bits, _saved_bytes(model, _batch(0, 0))


@pytest.mark.parametrize(
    ("method", "strategy", "checkpointing"),
    [
        ("full", "zero3", "selective"),
        ("lora", "ddp", "selective"),
        pytest.param("full", "zero2", "selective", marks=pytest.mark.long),
        pytest.param("qlora", "zero3", "selective", marks=pytest.mark.long),
        pytest.param("full", "zero3", "block", marks=pytest.mark.long),
        pytest.param("full", "ddp", "selective-qkv", marks=pytest.mark.long),
        pytest.param("full", "zero3", "selective-qkv", marks=pytest.mark.long),
    ],
)
def test_spared_blocks_hold_more_and_change_no_bit(
    ranks: Callable[..., list[Any]],
    tiny_model_dir: Callable[..., Path],
    method: str,
    strategy: str,
    checkpointing: str,
) -> None:
    """A block that is spared of selective checkpointing saves gate and up, two times the MLP's width a token."""
    model = str(tiny_model_dir("llama", num_hidden_layers=LAYERS))
    for none_spared, *others in ranks(spare, 2, model, method, strategy, checkpointing):
        for spared, (losses, bits, saved) in zip(SPARED[1:], others, strict=True):
            assert losses == none_spared[0]
            assert bits == none_spared[1]
            if checkpointing == "selective":
                assert saved - none_spared[2] == spared * 2 * 64 * LENGTH * 4
            else:
                assert saved > none_spared[2]
