"""Checkpoints made by transformers + bitsandbytes, and what is refused."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tunesmith.checkpoint.load import load_decoder
from tunesmith.errors import ModelError, UnsupportedModelError
from tunesmith.kernels.nf4 import quantize_nf4
from tunesmith.model.language_model import logits
from tunesmith.model.layers import Linear
from tunesmith.model.methods import apply_method
from tunesmith.model.quant import NF4Linear
from tunesmith.recipe.schema import MethodSection

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
WIDTHS: dict[str, dict[str, Any]] = {
    "qwen2": {"hidden_size": 64, "intermediate_size": 128},
    "gpt2": {"n_embd": 64},
}
TOKENS = [3, 77, 12, 9, 250, 31]


@pytest.fixture(scope="module")
def quantised(tiny_model_dir: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A function: family and options of BitsAndBytesConfig -> the directory of a model saved quantised."""

    def make(family: str, dtype: torch.dtype = torch.bfloat16, **options: Any) -> Path:
        from transformers import AutoModelForCausalLM, BitsAndBytesConfig

        settings = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", **options}
        source = tiny_model_dir(family, **WIDTHS[family])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = AutoModelForCausalLM.from_pretrained(
                source, dtype=dtype, quantization_config=BitsAndBytesConfig(**settings)
            )
            directory = tmp_path_factory.mktemp("bnb")
            model.save_pretrained(directory)
        return directory

    return make


@pytest.mark.parametrize("family", list(WIDTHS))
@pytest.mark.parametrize("double", [True, False])
def test_codes_and_scales_are_taken_over_bit_for_bit(
    quantised: Callable[..., Path], tiny_model_dir: Callable[..., Path], family: str, double: bool
) -> None:
    model = load_decoder(quantised(family, bnb_4bit_use_double_quant=double))
    source = load_decoder(tiny_model_dir(family, **WIDTHS[family]), dtype=torch.bfloat16)
    linears = [(name, child) for name, child in model.named_modules() if isinstance(child, NF4Linear)]
    assert len(linears) == 8
    for name, linear in linears:
        dense = source.get_submodule(name)
        assert isinstance(dense, Linear)
        for part in linear.parts:
            mine, expected = linear.part_nf4(part), quantize_nf4(dense.part_weight(part), double)
            assert mine.dtype == torch.bfloat16
            assert mine.is_double == double
            for field in ("codes", "scales", "scale_scales", "offset"):
                left, right = getattr(mine, field), getattr(expected, field)
                assert left is right is None or torch.equal(left, right), (name, part, field)


@pytest.mark.parametrize("family", list(WIDTHS))
def test_logits_equal_transformers(quantised: Callable[..., Path], family: str) -> None:
    from transformers import AutoModelForCausalLM

    directory = quantised(family, torch.float32, bnb_4bit_compute_dtype=torch.float32)
    reference = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).train()
    for module in reference.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    expected = reference(torch.tensor([TOKENS])).logits[0]
    mine = logits(load_decoder(directory).eval(), [TOKENS])[0]
    assert (mine - expected).abs().max() / expected.abs().max() < 1e-4


def test_modules_left_unquantised_stay_dense(quantised: Callable[..., Path]) -> None:
    directory = quantised("qwen2", llm_int8_skip_modules=["lm_head", "down_proj", "q_proj"])
    model = load_decoder(directory)
    block = model.blocks[0]
    assert isinstance(block.get_submodule("mlp.down"), Linear)
    assert isinstance(block.get_submodule("mlp.up"), NF4Linear)
    # k_proj and v_proj are quantised and q_proj is not: the fused linear holds all of them dequantised.
    assert isinstance(block.get_submodule("attention.qkv"), Linear)
    reference = load_decoder(quantised("qwen2"))
    fused, nf4 = block.get_submodule("attention.qkv"), reference.blocks[0].get_submodule("attention.qkv")
    assert isinstance(fused, Linear) and isinstance(nf4, NF4Linear)
    assert torch.equal(fused.part_weight("k_proj"), nf4.part_weight("k_proj"))


def test_a_quantised_checkpoint_is_trained_by_qlora_and_refuses_full(quantised: Callable[..., Path]) -> None:
    directory = quantised("qwen2", bnb_4bit_use_double_quant=True)
    summary = apply_method(load_decoder(directory), MethodSection(kind="qlora"), seed=0)
    assert summary.trainable_parameters < summary.total_parameters / 2
    with pytest.raises(UnsupportedModelError, match="NF4"):
        apply_method(load_decoder(directory), MethodSection(kind="full"), seed=0)


def test_other_scales_than_asked_for_are_refused(quantised: Callable[..., Path]) -> None:
    with pytest.raises(ModelError, match="double_quantisation to false"):
        load_decoder(quantised("qwen2", bnb_4bit_use_double_quant=False), quantize="nf4-double")


def test_fp4_is_refused(quantised: Callable[..., Path]) -> None:
    with pytest.raises(UnsupportedModelError, match="fp4"):
        load_decoder(quantised("qwen2", bnb_4bit_quant_type="fp4"))


def test_other_quantisations_are_refused(quantised: Callable[..., Path], tmp_path: Path) -> None:
    config = json.loads((quantised("qwen2") / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModelError, match="gptq"):
        load_decoder(tmp_path)


@pytest.mark.parametrize(
    ("ending", "message"),
    [
        (".absmax", "absmax.*asks for"),
        (".quant_map", "table of its format"),
        (".quant_state.bitsandbytes__nf4", "quantisation state"),
    ],
)
def test_damaged_state_is_refused(quantised: Callable[..., Path], ending: str, message: str) -> None:
    directory = quantised("qwen2")
    path = directory / "model.safetensors"
    tensors = load_file(path)
    name = next(name for name in sorted(tensors) if name.endswith(ending) and "nested" not in name)
    tensors[name] = tensors[name][:-1] if ending != ".quant_map" else tensors[name] * 0.5
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=message):
        load_decoder(directory)
