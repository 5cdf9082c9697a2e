"""What the transformers backend writes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tunesmith.checkpoint.load import load_model
from tunesmith.model.language_model import logits
from tunesmith.model.transformers_backend import TransformersModel
from tunesmith.recipe.load import recipe_from_mapping
from tunesmith.train.export import write_outcome

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
DOCUMENTS = [[5, 9, 31, 7], [3, 8, 14]]


@pytest.mark.parametrize("family", ["qwen2", "gpt2", "mixtral"])
@pytest.mark.parametrize("precision", ["bfloat16", "float16", "float32"])
def test_float32_masters_are_stored_in_the_compute_dtype(
    tiny_model_dir: Callable[..., Path], tmp_path: Path, family: str, precision: str
) -> None:
    """They were written as they were held: twice the size of what the native decoder writes."""
    base = tiny_model_dir(family)
    recipe = recipe_from_mapping(
        {"model": {"path": str(base)}, "method": {"kind": "full"}, "train": {"precision": precision}}
    )
    model = load_model(base, backend="transformers", dtype="float32", device="cpu")
    assert isinstance(model, TransformersModel)
    write_outcome(recipe, model, base, None, tmp_path / "out")
    stored = torch.bfloat16 if precision == "bfloat16" else torch.float32  # masters may lie outside float16's range
    files = list((tmp_path / "out").glob("*.safetensors"))
    assert {tensor.dtype for file in files for tensor in load_file(file).values()} == {stored}
    config = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))
    assert config["dtype"] == str(stored).removeprefix("torch.")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}  # training could go on

    again = load_model(tmp_path / "out", backend="native", device="cpu", dtype="float32")
    expected = load_model(base, device="cpu", dtype="float32")
    for mine, theirs in zip(logits(again, DOCUMENTS), logits(expected, DOCUMENTS), strict=True):
        torch.testing.assert_close(mine, theirs, atol=0.05 if stored == torch.bfloat16 else 1e-5, rtol=0.05)


def test_tied_weights_are_stored_once(tiny_model_dir: Callable[..., Path], tmp_path: Path) -> None:
    base = tiny_model_dir("qwen2", tie_word_embeddings=True)
    model = load_model(base, backend="transformers", dtype="float32", device="cpu")
    assert isinstance(model, TransformersModel)
    model.save(tmp_path / "narrow", dtype=torch.bfloat16)
    model.save(tmp_path / "as held")
    names = [set(load_file(tmp_path / kind / "model.safetensors")) for kind in ("narrow", "as held")]
    assert names[0] == names[1]
