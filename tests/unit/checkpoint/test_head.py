"""Which head a model gets: by device, by what the blocks are quantised to, and by what was asked for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tunesmith.checkpoint.inference import load_for_inference
from tunesmith.errors import ModelError, UnsupportedModelError
from tunesmith.kernels.chip import Chip, foreseeing
from tunesmith.kernels.nf4 import kernels_on
from tunesmith.kernels.warm_up import taken_down
from tunesmith.model.decode_linears import DecodeLinear
from tunesmith.model.held import HeldLinear
from tunesmith.model.int8 import Int8Linear

pytest.importorskip("triton")


def on_gpu(directory: Path, **options: Any) -> Any:
    """As a GPU would have it: its tensors on the CPU, its kernels taken down and not run."""
    with foreseeing(Chip((9, 0), 132), "cpu"), kernels_on("cpu"), taken_down():
        return load_for_inference(directory, device="cpu", **{"dtype": "bfloat16", **options})


@pytest.mark.parametrize("quantize", ["fp8", "fp8-inner", "nf4", "nf4-double", "int8", "w8a8", "int4"])
@pytest.mark.parametrize("tied", [False, True])
def test_quantised_blocks_have_a_copy_on_a_gpu(quantize: str, tied: bool, tiny_model_dir: Callable[..., Path]) -> None:
    model = on_gpu(tiny_model_dir("qwen2", tie_word_embeddings=tied), quantize=quantize)
    assert isinstance(model.head_copy, Int8Linear) and model.head_copy.codes.shape == (272, 32)
    assert model.head is None if tied else type(model.head) is DecodeLinear


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"quantize": "fp8", "head": "stored"},
        {"quantize": "fp8", "one_head": True},
        {"quantize": "fp8", "dtype": "float32"},
        {"quantize": "int8", "head": "int8"},
    ],
)
def test_others_have_none(options: dict[str, Any], tiny_model_dir: Callable[..., Path]) -> None:
    model = on_gpu(tiny_model_dir("qwen2"), **options)
    assert model.head_copy is None
    assert isinstance(model.head, HeldLinear) == (options.get("head") == "int8")


@pytest.mark.parametrize("tied", [False, True])
def test_where_a_copy_is_too_much_the_head_is_in_int8_alone(
    tied: bool, tiny_model_dir: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tunesmith.checkpoint.head.keeps_share", lambda *_: False)
    model = on_gpu(tiny_model_dir("qwen2", tie_word_embeddings=tied), quantize="int4")
    assert model.head_copy is None
    assert model.head is None if tied else isinstance(model.head, Int8Linear)


def test_one_may_be_asked_for(tiny_model_dir: Callable[..., Path]) -> None:
    assert on_gpu(tiny_model_dir("qwen2"), head="copy").head_copy is not None


def test_a_checkpoint_that_was_quantised_before_has_one(tiny_model_dir: Callable[..., Path], tmp_path: Path) -> None:
    from tunesmith.compress.quantize import compress_to_directory

    source = tiny_model_dir("qwen2")
    for head, has_copy in (("stored", True), ("int8", False)):
        compress_to_directory(str(source), tmp_path / head, "int8", head=head, dtype="bfloat16", device="cpu")
        model = on_gpu(tmp_path / head)
        assert (model.head_copy is not None) == has_copy
        assert isinstance(model.head, HeldLinear) == (not has_copy)


def test_mistakes_are_refused(tiny_model_dir: Callable[..., Path]) -> None:
    source = tiny_model_dir("qwen2")
    with pytest.raises(ModelError, match="no head 'int9', did you mean 'int8'"):
        load_for_inference(source, device="cpu", head="int9")  # type: ignore[arg-type]
    with pytest.raises(UnsupportedModelError, match="head='copy' can't be had here: its kernel wants a GPU"):
        load_for_inference(source, device="cpu", head="copy")
    with pytest.raises(ModelError, match="two heads, and batch_invariant wants one"):
        on_gpu(source, quantize="fp8", head="copy", one_head=True)
    with pytest.raises(UnsupportedModelError, match="float32 \\[272, 32\\]"):
        on_gpu(source, head="copy", dtype="float32")
    with pytest.raises(UnsupportedModelError, match="native decoder"):
        load_for_inference(source, device="cpu", head="copy", backend="transformers")
