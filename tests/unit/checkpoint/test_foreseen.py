"""A decoder that is foreseen has the forms of the one that is loaded, its dtypes and widths, and no storage."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tunesmith.arch import read_config
from tunesmith.checkpoint.foreseen import LAYERS, few_layers, foreseen_for_inference
from tunesmith.checkpoint.held_save import save_held
from tunesmith.checkpoint.inference import load_for_inference
from tunesmith.errors import ModelError
from tunesmith.kernels.chip import Chip, foreseeing
from tunesmith.kernels.nf4 import kernels_on
from tunesmith.kernels.warm_up import taken_down
from tunesmith.model.weight_formats import check_format

pytest.importorskip("triton")
H200 = Chip((9, 0), 132)


def _foreseen(directory: Path, **options: Any) -> Any:
    with foreseeing(H200), kernels_on("meta"), taken_down():
        return foreseen_for_inference(directory, **options)


def _loaded(directory: Path, **options: Any) -> Any:
    with foreseeing(H200, "cpu"), kernels_on("cpu"), taken_down():
        return load_for_inference(directory, device="cpu", **options)


def _form(module: torch.nn.Module) -> dict[str, Any]:
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    shapes = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    kinds = {name: (type(child), getattr(child, "compute", None)) for name, child in module.named_modules()}
    return {"shapes": shapes, "kinds": kinds, "training": module.training}


@pytest.mark.parametrize("quantize", [None, "fp8", "fp8-inner", "nf4", "nf4-double", "int8", "w8a8", "int4-g64-sym"])
@pytest.mark.parametrize("weights", ["checkpoint", "random"])
def test_it_is_the_one_that_is_loaded(quantize: str | None, weights: Any, tiny_model_dir: Callable[..., Path]) -> None:
    directory = tiny_model_dir("qwen2", num_hidden_layers=3)
    foreseen = _foreseen(directory, quantize=quantize, weights=weights)
    assert _form(foreseen) == _form(_loaded(directory, quantize=quantize, weights=weights))
    assert all(tensor.is_meta for tensor in [*foreseen.parameters(), *foreseen.buffers()])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"head": "stored"},
        {"head": "int8"},
        {"one_head": True},
        {"quantize": None},
        {"quantize": None, "head": "copy"},
    ],
)
def test_and_so_is_its_head(options: dict[str, Any], tiny_model_dir: Callable[..., Path]) -> None:
    """In 16 bits, where there may be a copy."""
    directory = tiny_model_dir("qwen2", num_hidden_layers=5)
    asked: dict[str, Any] = {"quantize": "fp8", "dtype": torch.bfloat16, **options}
    foreseen, loaded = _foreseen(directory, **asked), _loaded(directory, **asked)
    has_copy = options in ({}, {"quantize": None, "head": "copy"})
    assert (foreseen.head_copy is not None) == has_copy == (loaded.head_copy is not None)
    assert type(foreseen.head) is type(loaded.head)


def test_a_dtype_may_be_asked_for(tiny_model_dir: Callable[..., Path]) -> None:
    foreseen = _foreseen(tiny_model_dir("llama"), dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in foreseen.parameters()} == {torch.bfloat16}


def test_it_has_few_layers_of_every_kind(tiny_model_dir: Callable[..., Path]) -> None:
    config = read_config(tiny_model_dir("qwen2"))
    deep = few_layers(_changed(config, num_hidden_layers=40))
    assert (deep.num_hidden_layers, deep.sliding_layers) == (LAYERS, ())
    mixed = few_layers(_changed(config, num_hidden_layers=40, sliding_window=8, sliding_layers=tuple(range(1, 40))))
    assert {mixed.window(layer) for layer in range(LAYERS)} == {8, None}
    sliding = few_layers(_changed(config, num_hidden_layers=40, sliding_window=8, sliding_layers=tuple(range(40))))
    assert {sliding.window(layer) for layer in range(LAYERS)} == {8}


def _changed(config: Any, **changes: Any) -> Any:
    return replace(config, **changes)


@pytest.mark.parametrize("name", ["int4-g32", "w8a8"])
@pytest.mark.parametrize("head", ["stored", "int8"])
@pytest.mark.parametrize("tied", [False, True])
def test_codes_of_a_checkpoint_are_held_as_they_are(
    name: str, head: Any, tied: bool, tiny_model_dir: Callable[..., Path], tmp_path: Path
) -> None:
    directory = tiny_model_dir("qwen2", num_hidden_layers=3, tie_word_embeddings=tied)
    compressed: Any = load_for_inference(directory, device="cpu", quantize=name, head=head)
    save_held(compressed, tmp_path, check_format(name))
    assert _form(_foreseen(tmp_path)) == _form(_loaded(tmp_path))


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({}))
    with pytest.raises(ModelError):
        _foreseen(tmp_path)
