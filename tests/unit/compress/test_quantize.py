"""`compress_to_directory`: what is written loads back as it was, calibration helps, and mistakes are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tunesmith.checkpoint.inference import load_for_inference
from tunesmith.compress.calibrate import Inputs, calibrate_awq, calibrate_gptq, gptq, nearest, output_error
from tunesmith.compress.divergence import divergence, prompt_logits
from tunesmith.compress.quantize import compress_to_directory
from tunesmith.errors import ModelError, RunDirError
from tunesmith.kernels.int4 import dequantize_int4
from tunesmith.model.weight_formats import WeightFormat, hold_linears

INT4 = WeightFormat("int4", 32)


@pytest.mark.parametrize(
    ("format_name", "head"), [("int8", "stored"), ("w8a8", "int8"), ("int4", "int8"), ("int4-g32-sym", "stored")]
)
def test_what_is_written_loads_back_as_it_was(format_name: str, head: Any, tmp_path: Path, tiny_model_dir: Any) -> None:
    source = tiny_model_dir("qwen2")
    report = compress_to_directory(source, tmp_path / "out", format_name, head=head, device="cpu")
    assert report.bytes_after < report.bytes_before
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    loaded = load_for_inference(tmp_path / "out", device="cpu", head="stored")
    direct = load_for_inference(source, quantize=format_name, device="cpu", head=head)
    prompts = [[1, 2, 3, 4, 5], list(range(40))]
    for mine, theirs in zip(prompt_logits(loaded, prompts), prompt_logits(direct, prompts), strict=True):
        assert torch.equal(mine, theirs)


def test_mistakes_are_refused_and_leave_nothing(tmp_path: Path, tiny_model_dir: Any) -> None:
    source = tiny_model_dir("qwen2")
    with pytest.raises(ModelError, match=r"no weight format 'int5', did you mean 'int"):
        compress_to_directory(source, tmp_path / "out", "int5")
    with pytest.raises(ModelError, match="gptq calibrates int4; int8 needs none"):
        compress_to_directory(source, tmp_path / "out", "int8", calibration="gptq", documents=[[1]])
    with pytest.raises(ModelError, match="awq wants text"):
        compress_to_directory(source, tmp_path / "out", "int4", calibration="awq")
    compress_to_directory(source, tmp_path / "out", "int8", device="cpu")
    with pytest.raises(ModelError, match=r"quantised already \(tunesmith\)"):
        compress_to_directory(tmp_path / "out", tmp_path / "again", "int4")
    with pytest.raises(RunDirError, match="exists already"):
        compress_to_directory(source, tmp_path / "out", "int4", device="cpu")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_gptq_makes_a_smaller_output_error_than_rounding() -> None:
    """On inputs whose columns go together, which is what the method uses."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(24, 96, generator=generator) * 0.1
    x = torch.randn(400, 12, generator=generator) @ torch.randn(12, 96, generator=generator)
    x += 0.1 * torch.randn(400, 96, generator=generator)
    inputs = Inputs(torch.zeros(96, 96), torch.zeros(96))
    inputs.add(x)
    errors = [output_error(weight, dequantize_int4(make(weight, inputs, INT4)), inputs) for make in (gptq, nearest)]
    assert errors[0] < 0.5 * errors[1], errors


def test_gptq_without_tokens_rounds() -> None:
    weight, inputs = torch.randn(8, 64), Inputs(torch.zeros(64, 64), torch.zeros(64))
    assert torch.equal(gptq(weight, inputs, INT4).words, nearest(weight, inputs, INT4).words)


def test_scaling_columns_changes_nothing_by_itself(tiny_model_dir: Any) -> None:
    """AWQ's folding, with the rounding left out, is the identity."""
    from tunesmith.compress import calibrate

    model: Any = load_for_inference(tiny_model_dir("qwen3"), dtype="float32", device="cpu")
    prompts = [list(range(50)), list(range(100, 140))]
    before = prompt_logits(model, prompts)
    weights = {name: p.clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        for block, inputs in calibrate._block_by_block(model, prompts):
            calibrate._scale_block(block, inputs, INT4)
    changed = [name for name, p in model.named_parameters() if not torch.equal(p, weights[name])]
    assert any("attention_norm" in name for name in changed) and any("down" in name for name in changed)
    assert divergence(before, prompt_logits(model, prompts)).max_difference < 1e-4


@pytest.mark.parametrize("calibrate", [calibrate_gptq, pytest.param(calibrate_awq, marks=pytest.mark.long)])
def test_calibration_on_text_beats_rounding(calibrate: Any, data_dir: Path) -> None:
    """builtin:tiny on held-out text of the kind it was calibrated on."""
    from tunesmith.checkpoint.source import resolve_model
    from tunesmith.text.tokenizer import load_tokenizer

    text = (data_dir / "tinystories_sample" / "tinystories_valid_30KB.txt").read_text(encoding="utf-8")
    ids = load_tokenizer(resolve_model("builtin:tiny")).encode(text)
    pieces = [ids[i : i + 256] for i in range(0, 2048, 256)]
    held_out = pieces[-2:]
    models: list[Any] = [load_for_inference("builtin:tiny", dtype="float32", device="cpu") for _ in range(3)]
    before = prompt_logits(models[0], held_out)
    hold_linears(models[1], INT4)
    calibrate(models[2], INT4, pieces[:-2])
    rounded, calibrated = (divergence(before, prompt_logits(m, held_out)).kl_mean for m in models[1:])
    assert calibrated < rounded
