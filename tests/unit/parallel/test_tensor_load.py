"""A decoder loaded in parts must be the one that was loaded whole and cut, bit for bit, adapters included."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from tunesmith.checkpoint.adapter import load_adapter, save_adapter
from tunesmith.checkpoint.load import load_language_model
from tunesmith.errors import UnsupportedModelError
from tunesmith.kernels.nf4 import dequantize_nf4
from tunesmith.model.decoder import Decoder
from tunesmith.model.methods import MethodSummary, apply_method
from tunesmith.model.quant import NF4Linear
from tunesmith.parallel.mesh import Mesh, joined
from tunesmith.parallel.tensor import placements, shard_tensors
from tunesmith.recipe.parallel import ParallelSection
from tunesmith.recipe.schema import MethodSection, ModelSection

SIZES = {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 8}
METHODS: dict[str, dict[str, Any]] = {
    "full": {"kind": "full"},
    "dora": {"kind": "lora", "rank": 4, "dora": True},
    "qlora": {"kind": "qlora", "rank": 4},
    "fp8": {"kind": "lora", "rank": 4, "base": "fp8"},
}


def _load(directory: Path, weights: Any, method: dict[str, Any], mesh: Mesh | None) -> Decoder:
    return _load_and_count(directory, weights, method, mesh)[0]


def _load_and_count(
    directory: Path, weights: Any, method: dict[str, Any], mesh: Mesh | None
) -> tuple[Decoder, MethodSummary]:
    section, settings = ModelSection(path=str(directory), weights=weights), MethodSection(**method)
    model = load_language_model(section, quantize=settings.quantisation, dtype=torch.float32, seed=5, mesh=mesh)
    summary = apply_method(model, settings, seed=1)
    assert isinstance(model, Decoder)
    return model, summary


def _held(decoder: Decoder) -> dict[str, Tensor]:
    held = {name: parameter.detach() for name, parameter in decoder.named_parameters()}
    held |= dict(decoder.named_buffers())
    return held


def _differing(directory: Path, weights: str, methods: list[str]) -> list[str]:
    """What is not the same in a decoder loaded in parts and in one that was cut."""
    out = []
    with joined(ParallelSection(tensor=2), "cpu") as mesh:
        for method in methods:
            parts, of_parts = _load_and_count(directory, weights, METHODS[method], mesh)
            cut, of_whole = _load_and_count(directory, weights, METHODS[method], None)
            assert of_parts == of_whole  # parameters are those of the whole model
            for decoder in (parts, cut):
                shard_tensors(decoder, mesh)
            assert placements(parts) == placements(cut)
            got, expected = _held(parts), _held(cut)
            assert got.keys() == expected.keys()
            out += [f"{method} {n}" for n, tensor in expected.items() if not _is_same(n, got[n], tensor)]
    return out


def _is_same(name: str, got: Tensor, expected: Tensor) -> bool:
    """Bit for bit, but for DoRA's norms of whole rows, whose squares the processes sum in another order."""
    if got.dtype != expected.dtype or got.shape != expected.shape:
        return False
    is_norm = name.endswith("magnitude")
    return torch.allclose(got, expected, rtol=1e-6, atol=0) if is_norm else torch.equal(got, expected)


@pytest.mark.parametrize(
    ("family", "weights"), [("llama", "checkpoint"), ("qwen2", "random"), ("mixtral", "checkpoint"), ("gpt2", "random")]
)
def test_loading_in_parts_is_loading_and_cutting(
    ranks: Callable[..., list[Any]], tiny_model_dir: Callable[..., Path], family: str, weights: str
) -> None:
    changes: dict[str, Any] = {"n_embd": 128} if family == "gpt2" else SIZES
    biases = {"attention_bias": True, "mlp_bias": True} if family == "llama" else {}
    directory = tiny_model_dir(family, **changes, **biases)
    assert ranks(_differing, 2, directory, weights, list(METHODS)) == [[], []]


def _values(directory: Path) -> bool:
    """Whether a shard's dequantised values are those of the whole."""
    with joined(ParallelSection(tensor=2), "cpu") as mesh:
        whole = _load(directory, "checkpoint", METHODS["qlora"], None)
        parts = _load(directory, "checkpoint", METHODS["qlora"], mesh)
        modules = dict(whole.named_modules())
        same = []
        for path, linear in parts.named_modules():
            if isinstance(linear, NF4Linear):
                of_whole, held = modules[path], cast(Any, linear).cut.shard
                assert isinstance(of_whole, NF4Linear) and of_whole.is_double and not linear.is_double
                for part in linear.parts:
                    values = dequantize_nf4(of_whole.part_nf4(part))[:, slice(*held.columns)]
                    rows = torch.cat([values[slice(*span)] for span in held.rows(part)])
                    same.append(torch.equal(linear.part_weight(part), rows))
        return len(same) > 0 and all(same)


def test_nf4_shards_have_the_values_of_the_whole(
    ranks: Callable[..., list[Any]], tiny_model_dir: Callable[..., Path]
) -> None:
    """Though the whole's scales are doubly quantised, and a shard's are plain."""
    assert ranks(_values, 2, tiny_model_dir("llama", **SIZES)) == [True, True]


def _continued(directory: Path, adapters: Path, method: str) -> list[str]:
    """What is not the same after going on from an adapter, in a decoder loaded in parts and in one that was cut."""
    with joined(ParallelSection(tensor=2), "cpu") as mesh:
        whole = _load(directory, "checkpoint", METHODS[method], None)
        generator = torch.Generator().manual_seed(0)
        for parameter in whole.parameters():
            if parameter.requires_grad:
                parameter.data.uniform_(0.1, 1, generator=generator)
        own = adapters / str(mesh.rank)
        save_adapter(whole, own, str(directory))
        parts = _load(directory, "checkpoint", METHODS[method], mesh)
        load_adapter(parts, own, trainable=True, base_directory=directory)
        for decoder in (whole, parts):
            shard_tensors(decoder, mesh)
        got, expected = _held(parts), _held(whole)
        return [name for name, tensor in expected.items() if not torch.equal(got[name], tensor)]


@pytest.mark.parametrize("method", ["dora", "qlora"])
def test_adapters_are_gone_on_from(
    ranks: Callable[..., list[Any]], tiny_model_dir: Callable[..., Path], tmp_path: Path, method: str
) -> None:
    assert ranks(_continued, 2, tiny_model_dir("qwen2", **SIZES), tmp_path, method) == [[], []]


def _foreign(directory: Path) -> str:
    section = ModelSection(path=str(directory), backend="transformers")
    with joined(ParallelSection(tensor=2), "cpu") as mesh, pytest.raises(UnsupportedModelError) as error:
        load_language_model(section, mesh=mesh)
    return str(error.value)


def test_a_foreign_model_is_not_shared(ranks: Callable[..., list[Any]], tiny_model_dir: Callable[..., Path]) -> None:
    for message in ranks(_foreign, 2, tiny_model_dir("llama")):
        assert "parallel.tensor is for the native decoder" in message
