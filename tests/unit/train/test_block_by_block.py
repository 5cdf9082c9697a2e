"""Blocks that are sharded as they are loaded: the bits of a model loaded whole, which nobody holds."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from tunesmith.arch import read_config
from tunesmith.errors import ModelError, UnsupportedModelError
from tunesmith.model.block import Block
from tunesmith.model.decoder import Decoder
from tunesmith.model.quant import quantise_blocks
from tunesmith.parallel.full_shard import FullShard
from tunesmith.parallel.mesh import Mesh, Place, joined
from tunesmith.recipe.load import recipe_from_mapping
from tunesmith.recipe.parallel import ParallelSection
from tunesmith.recipe.schema import Recipe
from tunesmith.train import trainable
from tunesmith.train.block_by_block import BlockByBlock
from tunesmith.train.resolve import resolve_recipe
from tunesmith.train.session import build_session
from tunesmith.train.trainable import load_trainable
from tunesmith.watch.memory import LiveStorages

METHODS: dict[str, dict[str, Any]] = {
    "full": {"kind": "full"},
    "lora": {"kind": "lora", "rank": 4},
    "qlora": {"kind": "qlora", "rank": 4},
    "dora": {"kind": "lora", "rank": 4, "dora": True},
    "fp8": {"kind": "lora", "rank": 4, "base": "fp8"},
    "freeze": {"kind": "freeze", "trainable": ["last:2", "head"]},
}


def _recipe(model: str, method: str, strategy: str, weights: str) -> Recipe:
    return recipe_from_mapping(
        {
            "model": {"path": model, "device": "cpu", "weights": weights},
            "method": METHODS[method],
            "data": {"format": "tokens", "max_length": 16, "max_rows": 16, "validation_fraction": 0},
            "train": {"max_steps": 4, "micro_batch_tokens": 32, "learning_rate": 1e-3, "checkpointing": "selective"},
            "parallel": {"strategy": strategy},
        }
    )


def _local(tensor: Tensor) -> Tensor:
    return cast(Any, tensor).to_local() if hasattr(tensor, "to_local") else tensor


def _bits(module: nn.Module) -> dict[str, Tensor]:
    held = {name: _local(parameter.detach()) for name, parameter in module.named_parameters()}
    return {name: tensor.contiguous().reshape(-1).view(torch.uint8).clone() for name, tensor in held.items()}


def _run(recipe: Recipe, mesh: Mesh, steps: int) -> tuple[dict[str, Tensor], list[float], Any, dict[str, Tensor]]:
    """What is held before the first step, the losses, what the method made of the model, what is held in the end."""
    session = build_session(recipe, mesh=mesh)
    try:
        before = _bits(session.module)
        losses = [session.step().loss for _ in range(steps)]
        return before, losses, session.method_summary, _bits(session.module)
    finally:
        session.close()


def compare(model: str, method: str, strategy: str, weights: str) -> None:
    """Every bit that this process holds, loaded block by block and loaded whole; and of two steps."""
    recipe = _recipe(model, method, strategy, weights)
    with joined(recipe.parallel, "cpu") as mesh:
        gradual = _run(recipe, mesh, 2)
        with mock.patch.object(trainable, "block_by_block", lambda recipe, mesh: None):
            whole = _run(recipe, mesh, 2)
    assert gradual[1] == whole[1]
    assert gradual[2] == whole[2]
    for one, other in ((gradual[0], whole[0]), (gradual[3], whole[3])):
        assert list(one) == list(other)
        assert [name for name in one if not torch.equal(one[name], other[name])] == []


@pytest.mark.parametrize(
    ("method", "strategy", "weights"),
    [
        ("full", "zero3", "checkpoint"),
        ("lora", "zero2", "random"),
        ("qlora", "zero3", "random"),
        *(
            pytest.param(*case, marks=pytest.mark.long)
            for case in [
                ("qlora", "zero3", "checkpoint"),
                ("dora", "zero3", "checkpoint"),
                ("fp8", "zero3", "random"),
                ("freeze", "zero1", "checkpoint"),
                ("full", "zero3", "random"),
            ]
        ),
    ],
)
def test_the_same_bits_as_loaded_whole(
    ranks: Callable[..., list[Any]], tiny_model_dir: Callable[..., Path], method: str, strategy: str, weights: str
) -> None:
    ranks(compare, 2, str(tiny_model_dir("llama", tie_word_embeddings=False)), method, strategy, weights)


def watch_loading(model: str, method: str) -> tuple[int, int]:
    """The most bytes that were alive while loading, over what is held then; and the bytes of a block in float32."""
    recipe = _recipe(model, method, "zero3", "random")
    with joined(recipe.parallel, "cpu") as mesh:
        resolved = resolve_recipe(recipe, mesh.world_size)
        with LiveStorages() as watch:
            held, _ = load_trainable(resolved, mesh=mesh)
        share = sum(_local(parameter).nbytes for parameter in held.parameters())
        dense = Block(held.config, 0)  # type: ignore[attr-defined]
        return watch.peak_bytes - share, sum(parameter.nbytes for parameter in dense.parameters())


@pytest.mark.parametrize("method", ["full", "qlora"])
def test_loading_holds_the_share_and_a_block_however_many_there_are(
    ranks: Callable[..., list[Any]], tiny_model_dir: Callable[..., Path], tmp_path: Path, method: str
) -> None:
    """What is outside the blocks is in the share, whole: it is cut when all blocks are."""
    config = json.loads((tiny_model_dir("llama") / "config.json").read_text())
    over = {}
    for layers in (3, 9):
        (folder := tmp_path / str(layers)).mkdir()
        (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": layers}))
        over[layers] = ranks(watch_loading, 2, str(folder), method)
    assert over[3] == over[9]
    for peak, block in over[9]:
        assert 0 < peak <= block


def test_a_watch_of_live_bytes_counts_shards_by_what_is_held(ranks: Callable[..., list[Any]]) -> None:
    """A DTensor's own storage has the size of the whole, with nothing in it: shards were counted twice and more."""
    for held in ranks(count_a_shard, 2):
        assert held == 4 * 8


def count_a_shard() -> int:
    """The live bytes of half of sixteen numbers."""
    with joined(ParallelSection(), "cpu") as mesh:
        linear = nn.Linear(4, 4, bias=False)
        FullShard(mesh, "zero3").block(linear, [])
        return LiveStorages(linear.parameters()).current_bytes


def test_a_method_that_does_not_fit_is_no_reason_for_another_backend(tiny_model_dir: Callable[..., Path]) -> None:
    """Where `model.backend` is auto, an UnsupportedModelError while loading means transformers."""
    recipe = _recipe(str(tiny_model_dir("llama")), "full", "zero3", "random")
    with torch.device("meta"):
        decoder = Decoder(read_config(tiny_model_dir("llama")))
    quantise_blocks(decoder, "nf4")
    with pytest.raises(ModelError, match="can't be trained") as caught:
        BlockByBlock(recipe, FullShard(Mesh(Place(), torch.device("cpu")), "zero3")).prepare(decoder)
    assert not isinstance(caught.value, UnsupportedModelError)
