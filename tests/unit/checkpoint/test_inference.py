"""`load_for_inference`: every format loads, is near the model it was made of, takes adapters, and refuses mistakes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tunesmith.checkpoint.inference import load_for_inference
from tunesmith.compress.divergence import divergence, prompt_logits
from tunesmith.errors import ModelError, UnsupportedModelError
from tunesmith.model.decode_linears import DecodeFp8Linear, DecodeLinear, DecodeNF4Linear, adopted
from tunesmith.model.fp8 import Fp8Linear, quantised_fp8
from tunesmith.model.held import HeldLinear
from tunesmith.model.int8 import Int8Linear
from tunesmith.model.layers import Linear
from tunesmith.model.quant import NF4Linear, quantised

PROMPTS = [[1, 5, 9, 200, 31], list(range(3, 60))]


@pytest.mark.parametrize(
    ("name", "limit"), [("int8", 1e-4), ("w8a8", 1e-3), ("int4-g32", 2e-2), ("int4-sym", 2e-2), ("fp8", 1e-2)]
)
@pytest.mark.parametrize("family", ["qwen3", "mixtral", "gpt2"])
def test_every_format_is_near_the_model(name: str, limit: float, family: str, tiny_model_dir: Any) -> None:
    source = tiny_model_dir(family)
    before = prompt_logits(load_for_inference(source, dtype="float32", device="cpu"), PROMPTS)
    model: Any = load_for_inference(source, quantize=name, dtype="float32", device="cpu")
    after = prompt_logits(model, PROMPTS)
    assert divergence(before, after).kl_mean < limit
    assert not model.training
    model.is_fused = True
    fused = prompt_logits(model, PROMPTS)
    assert divergence(after, fused).kl_mean < 1e-4


def test_the_head_is_int8_on_a_cpu_and_as_stored_when_asked(tiny_model_dir: Any) -> None:
    source = tiny_model_dir("qwen2")
    model: Any = load_for_inference(source, quantize="int4", device="cpu")
    assert isinstance(model.head, Int8Linear)
    assert not isinstance(load_for_inference(source, quantize="int4", device="cpu", head="stored").head, HeldLinear)  # type: ignore[attr-defined]
    assert not isinstance(load_for_inference(source, device="cpu").head, HeldLinear)  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["int8", "int4-g32"])
def test_adapters_go_on_a_quantised_base(name: str, tiny_model_dir: Any, tmp_path: Any) -> None:
    from tunesmith.checkpoint.adapter import save_adapter
    from tunesmith.model.lora import AdapterOptions
    from tunesmith.model.methods import add_adapters

    source = tiny_model_dir("qwen2")
    tuned: Any = load_for_inference(source, dtype="float32", device="cpu")
    add_adapters(tuned, {"blocks.1.mlp.down": ["down_proj"]}, lambda _: AdapterOptions(4, 8), seed=0)
    with torch.no_grad():
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.3, generator=torch.Generator().manual_seed(1))
    save_adapter(tuned, tmp_path / "adapter", base_path=str(source))
    mine = load_for_inference(source, quantize=name, adapter=tmp_path / "adapter", dtype="float32", device="cpu")
    plain = load_for_inference(source, quantize=name, dtype="float32", device="cpu")
    wanted, found, without = (prompt_logits(model, PROMPTS) for model in (tuned, mine, plain))
    assert divergence(wanted, found).kl_mean < 0.1 * divergence(wanted, without).kl_mean


def test_mistakes_are_refused(tiny_model_dir: Any) -> None:
    source = tiny_model_dir("qwen2")
    with pytest.raises(ModelError, match="no weight format 'int44', did you mean 'int4'"):
        load_for_inference(source, quantize="int44")
    with pytest.raises(UnsupportedModelError, match="int8 is for the native decoder: take quantize='nf4'"):
        load_for_inference(source, quantize="int8", backend="transformers")


def test_random_weights_need_no_files(tiny_model_dir: Any) -> None:
    models = [
        load_for_inference(tiny_model_dir("qwen2"), quantize="int8", weights="random", seed=seed, device="cpu")
        for seed in (3, 3, 4)
    ]
    logits = [prompt_logits(model, PROMPTS)[1] for model in models]
    assert torch.equal(logits[0], logits[1])
    assert not torch.equal(logits[0], logits[2])


def test_decode_forms_share_what_they_replace() -> None:
    """On this machine no kernel runs, so that their products are those of the linears they stand for."""
    linear = Linear(64, {"a": 32, "b": 16}, True)
    torch.nn.init.normal_(linear.weight)
    x = torch.randn(1, 64)
    cases: list[tuple[type[Any], Any]] = [
        (DecodeLinear, linear),
        (DecodeNF4Linear, quantised(linear, True)),
        (DecodeFp8Linear, quantised_fp8(linear)),
    ]
    for form, held in cases:
        mine = adopted(form, held)
        assert isinstance(mine, (Linear, NF4Linear, Fp8Linear))
        assert torch.equal(mine(x), held(x))
        assert [t.data_ptr() for t in mine.state_dict().values()] == [t.data_ptr() for t in held.state_dict().values()]
