"""AWQ and GPTQ checkpoints give the values of an independent dequantisation, word by word as their layouts say."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tunesmith.checkpoint.inference import load_for_inference
from tunesmith.errors import ModelError, UnsupportedModelError
from tunesmith.model.int4 import Int4Linear

GROUP = 32
AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]


def signed(word: int) -> int:
    return word - 2**32 if word >= 2**31 else word


def pack_columns(values: list[list[int]], order: list[int]) -> torch.Tensor:
    """int32 [rows, columns / 8]: nibble i of word c is column 8 c + order[i]."""
    return torch.tensor(
        [
            [signed(sum(row[8 * c + order[i]] << 4 * i for i in range(8))) for c in range(len(row) // 8)]
            for row in values
        ],
        dtype=torch.int32,
    )


def quantised(weight_FD: torch.Tensor, method: str, order: torch.Tensor | None) -> tuple[dict[str, Any], torch.Tensor]:
    """The tensors of a checkpoint, and the weight that they stand for, float32 [F, D]."""
    rows, width = weight_FD.shape
    generator = torch.Generator().manual_seed(rows * 1000 + width)
    codes = torch.randint(0, 16, (width, rows), generator=generator)
    zeros = torch.randint(1, 16, (width // GROUP, rows), generator=generator)
    scales = (torch.rand(width // GROUP, rows, generator=generator) * 0.02 + 0.01).half()
    groups = torch.arange(width) // GROUP
    g_idx = groups if order is None else groups[order]
    truth = ((codes - zeros[g_idx]).float() * scales.float()[g_idx]).t()
    if method == "awq":
        packed = {"qweight": pack_columns(codes.tolist(), AWQ_ORDER), "qzeros": pack_columns(zeros.tolist(), AWQ_ORDER)}
    else:
        straight = list(range(8))
        packed = {
            "qweight": pack_columns(codes.t().tolist(), straight).t().contiguous(),
            "qzeros": pack_columns((zeros - 1).tolist(), straight),
            "g_idx": g_idx.to(torch.int32),
        }
    return {**packed, "scales": scales}, truth


def make_checkpoint(source: Path, target: Path, method: str, ordered: bool = False, **section: Any) -> dict[str, Any]:
    """Quantise the linears of the blocks of `source`; returns the true weights by name."""
    shutil.copytree(source, target)
    tensors, truth = load_file(target / "model.safetensors"), {}
    orders: dict[int, torch.Tensor] = {}
    for name in sorted(tensors):
        if "_proj.weight" not in name:
            continue
        weight = tensors.pop(name)
        width = weight.shape[1]
        order = None
        if ordered:
            order = orders.setdefault(width, torch.randperm(width, generator=torch.Generator().manual_seed(width)))
        parts, truth[name] = quantised(weight, method, order)
        tensors |= {f"{name.removesuffix('weight')}{part}": value.contiguous() for part, value in parts.items()}
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((target / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method, "bits": 4, "group_size": GROUP, **section}
    (target / "config.json").write_text(json.dumps(config))
    return truth


@pytest.mark.parametrize(("method", "ordered"), [("awq", False), ("gptq", False), ("gptq", True)])
def test_values_are_those_of_the_layout(method: str, ordered: bool, tmp_path: Path, tiny_model_dir: Any) -> None:
    truth = make_checkpoint(
        tiny_model_dir("qwen2", hidden_size=64), tmp_path / "model", method, ordered, desc_act=ordered
    )
    model: Any = load_for_inference(tmp_path / "model", dtype="float32", device="cpu")
    block = model.blocks[1]
    for linear, module in ((block.attention.qkv, "self_attn"), (block.mlp.down, "mlp"), (block.mlp.up, "mlp")):
        assert isinstance(linear, Int4Linear)
        assert (linear.order is not None) == ordered
        for part in linear.parts:
            assert torch.equal(linear.part_weight(part), truth[f"model.layers.1.{module}.{part}.weight"]), part
        x = torch.randn(3, linear.in_features)
        assert torch.allclose(linear.product(x), linear.dense_product(x), atol=0.05, rtol=0.05)


@pytest.mark.parametrize(
    ("method", "section", "message"),
    [
        ("awq", {"version": "gemv"}, "version 'gemm'.*quantize='int4'"),
        ("gptq", {"bits": 8}, "bits=8.*quantize='int8'"),
        ("gptq", {"group_size": 48}, "groups of 48 columns"),
    ],
)
def test_what_is_not_read_is_refused_with_what_to_do(
    method: str, section: dict[str, Any], message: str, tmp_path: Path, tiny_model_dir: Any
) -> None:
    make_checkpoint(tiny_model_dir("qwen2", hidden_size=64), tmp_path / "model", method, **section)
    with pytest.raises(UnsupportedModelError, match=message):
        load_for_inference(tmp_path / "model", device="cpu")


def test_parts_that_sort_their_columns_differently_are_refused(tmp_path: Path, tiny_model_dir: Any) -> None:
    make_checkpoint(tiny_model_dir("qwen2", hidden_size=64), tmp_path / "model", "gptq", True)
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    name = "model.layers.0.self_attn.k_proj.g_idx"
    tensors[name] = tensors[name].flip(0).contiguous()
    save_file(tensors, tmp_path / "model" / "model.safetensors")
    with pytest.raises(UnsupportedModelError, match="share an input but sort its columns differently"):
        load_for_inference(tmp_path / "model", device="cpu")


def test_a_quantised_checkpoint_is_not_quantised_again(tmp_path: Path, tiny_model_dir: Any) -> None:
    make_checkpoint(tiny_model_dir("qwen2", hidden_size=64), tmp_path / "model", "awq")
    with pytest.raises(ModelError, match=r"quantised already \(awq\)"):
        load_for_inference(tmp_path / "model", quantize="int8", device="cpu")
