"""Offloading and tiles in a recipe: said, refused in one line, or put into the model."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from tunesmith.cost.memory import offloaded_bytes
from tunesmith.errors import DeviceError, RecipeError, UnsupportedModelError
from tunesmith.model.decoder import Decoder
from tunesmith.recipe.load import recipe_from_mapping
from tunesmith.recipe.schema import Recipe
from tunesmith.train import activations
from tunesmith.train import resolve as resolve_module
from tunesmith.train.activations import prepare_activations
from tunesmith.train.resolve import resolve_recipe
from tunesmith.train.session import build_session
from tunesmith.train.trainable import load_trainable

Make = Callable[..., Path]


def _recipe(directory: Path, train: dict[str, Any], **sections: Any) -> Recipe:
    return recipe_from_mapping(
        {
            "model": {"path": str(directory), "device": "cpu"},
            "method": {"rank": 4},
            "data": {"format": "tokens", "max_length": 32, "max_rows": 8},
            "train": {"max_steps": 2, "micro_batch_tokens": 64, **train},
            **sections,
        }
    )


def test_a_cpu_is_refused_before_anything_is_loaded(tiny_model_dir: Make) -> None:
    with pytest.raises(DeviceError, match=r"the device is cpu: use --set train\.checkpointing=selective"):
        build_session(_recipe(tiny_model_dir("llama"), {"checkpointing": "offload"}))


@pytest.mark.parametrize("train", [{"checkpointing": "offload"}, {"mlp_tile_tokens": 8}])
def test_eager_blocks_are_refused_by_the_recipe(train: dict[str, Any], tiny_model_dir: Make) -> None:
    with pytest.raises(RecipeError, match=r"set train\.blocks to fused"):
        _recipe(tiny_model_dir("llama"), {**train, "blocks": "eager"})


@pytest.mark.parametrize(
    ("family", "method"),
    [
        ("gpt2", {"rank": 4}),
        ("mixtral", {"rank": 4}),
        ("llama", {"rank": 4, "dora": True, "dropout": 0.1}),
        ("llama", {"rank": 4, "dropout": 0.1}),
    ],
)
def test_blocks_without_a_written_out_mlp_are_refused(
    family: str, method: dict[str, Any], tiny_model_dir: Make
) -> None:
    recipe = _recipe(tiny_model_dir(family), {"mlp_tile_tokens": 8}, method=method)
    with pytest.raises(UnsupportedModelError, match=r"train\.mlp_tile_tokens needs blocks whose MLP is written out"):
        load_trainable(resolve_recipe(recipe))


def test_another_backend_is_refused(tiny_model_dir: Make) -> None:
    model = {"path": str(tiny_model_dir("llama")), "device": "cpu", "backend": "transformers"}
    recipe = _recipe(tiny_model_dir("llama"), {"mlp_tile_tokens": 8}, model=model)
    with pytest.raises(UnsupportedModelError, match="written out"):
        load_trainable(resolve_recipe(recipe))


def test_blocks_to_spare_are_refused_by_another_backend(tiny_model_dir: Make) -> None:
    """The setting did nothing there."""
    model = {"path": str(tiny_model_dir("llama")), "device": "cpu", "backend": "transformers"}
    train = {"checkpointing": "block", "checkpointing_skip_last": 1}
    with pytest.raises(UnsupportedModelError, match=r"use --set train\.checkpointing_skip_last=0"):
        load_trainable(resolve_recipe(_recipe(tiny_model_dir("llama"), train, model=model)))


@pytest.mark.parametrize(("family", "said"), [("llama", ""), ("mixtral", "is 'selective' in 2 of 2 blocks")])
def test_query_key_and_value_that_are_held_after_all_are_told(
    family: str, said: str, tiny_model_dir: Make, caplog: pytest.LogCaptureFixture
) -> None:
    load_trainable(resolve_recipe(_recipe(tiny_model_dir(family), {"checkpointing": "selective-qkv"})))
    assert said in caplog.text and bool(said) == ("selective-qkv" in caplog.text)


def test_tiles_train_the_same(tiny_model_dir: Make) -> None:
    losses = {}
    for tiles in (None, 24):
        session = build_session(_recipe(tiny_model_dir("llama"), {"mlp_tile_tokens": tiles}))
        assert cast(Decoder, session.model).mlp_tile_tokens == tiles
        losses[tiles] = [session.step().loss for _ in range(2)]
        session.close()
    assert losses[24] == pytest.approx(losses[None], rel=1e-5)


def test_host_memory_is_said_or_refused(
    tiny_model_dir: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """On a machine that says it has a GPU; nothing runs there."""
    monkeypatch.setattr(resolve_module, "pick_device", lambda asked: torch.device("cuda", 0))
    monkeypatch.setattr(resolve_module, "supports_bf16", lambda device: True)
    train = {"checkpointing": "offload", "micro_batch_tokens": 2**20}
    recipe = resolve_recipe(_recipe(tiny_model_dir("llama"), train))
    on_cpu = recipe.model_copy(update={"model": recipe.model.model_copy(update={"device": "cpu"})})
    plain = on_cpu.model_copy(update={"train": recipe.train.model_copy(update={"checkpointing": "none"})})
    model, _ = load_trainable(plain)
    need = offloaded_bytes(cast(Decoder, model).config, recipe.method, 2**20, "bfloat16")
    monkeypatch.setattr(activations, "available_memory_bytes", lambda: need)
    with caplog.at_level(logging.INFO):
        prepare_activations(model, recipe)
    assert "of pinned host memory" in caplog.text
    monkeypatch.setattr(activations, "available_memory_bytes", lambda: need - 1)
    with pytest.raises(DeviceError, match=r"are free: lower train\.micro_batch_tokens \(it is 1048576\)"):
        prepare_activations(model, recipe)
