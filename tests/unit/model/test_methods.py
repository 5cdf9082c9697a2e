"""Methods put into place: what trains, what is counted, what is refused with its nearest name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tunesmith.checkpoint.load import load_decoder, load_model
from tunesmith.errors import RecipeError, UnsupportedModelError
from tunesmith.model.decoder import Decoder
from tunesmith.model.language_model import LanguageModel, logits
from tunesmith.model.methods import adapted_linears, apply_method, block_linears
from tunesmith.model.packed import pack_documents
from tunesmith.model.quant import NF4Linear
from tunesmith.model.transformers_backend import TransformersModel
from tunesmith.recipe.schema import MethodSection

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
DOCUMENTS = [[5, 9, 200, 31, 7], [3, 250, 8]]


@pytest.fixture
def model(tiny_model_dir: Callable[..., Path]) -> Decoder:
    return load_decoder(tiny_model_dir("qwen2"))


def trained(model: LanguageModel) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def backward(model: LanguageModel) -> None:
    hidden = model.train().hidden(pack_documents(DOCUMENTS))
    model.logits(hidden).square().mean().backward()  # type: ignore[no-untyped-call]
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name


def test_full_trains_everything(model: Decoder) -> None:
    summary = apply_method(model, MethodSection(kind="full"), seed=0)
    assert summary.trainable_parameters == summary.total_parameters == sum(p.numel() for p in model.parameters())
    backward(model)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["last:1"], {"blocks.1."}),
        (["first:1"], {"blocks.0."}),
        (["last:2"], {"blocks.0.", "blocks.1."}),
        (["head"], {"head."}),
        (["embedding", "norms"], {"embedding.", "norm."}),
    ],
)
def test_freeze_trains_what_is_named(model: Decoder, names: list[str], expected: set[str]) -> None:
    apply_method(model, MethodSection(kind="freeze", trainable=names), seed=0)
    found = trained(model)
    assert all(any(name.startswith(prefix) or "norm" in name for prefix in expected) for name in found)
    assert all(any(name.startswith(prefix) for name in found) for prefix in expected)
    if names == ["embedding", "norms"]:
        assert sum("norm" in name for name in found) == 5
    backward(model)


def test_freeze_head_of_a_tied_model_is_its_embedding(tiny_model_dir: Callable[..., Path]) -> None:
    tied = load_decoder(tiny_model_dir("gpt2"))
    apply_method(tied, MethodSection(kind="freeze", trainable=["head"]), seed=0)
    assert trained(tied) == {"embedding.weight"}


@pytest.mark.parametrize(
    ("trainable", "message"),
    [
        (["nrms"], "did you mean 'norms'"),
        (["last:3"], "the model has 2"),
        (["last:0"], "asks for 0 blocks"),
        (["layers"], "allowed: last:N, first:N, head, embedding, norms"),
    ],
)
def test_freeze_refuses_unknown_names(model: Decoder, trainable: list[str], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        apply_method(model, MethodSection(kind="freeze", trainable=trainable), seed=0)


def test_lora_adapts_every_projection_of_the_blocks(model: Decoder) -> None:
    before = logits(model, DOCUMENTS)
    summary = apply_method(model, MethodSection(kind="lora", rank=4), seed=0)
    assert len(summary.adapted) == 2 * 7
    assert summary.adapted[:2] == ("blocks.0.attention.qkv.q_proj", "blocks.0.attention.qkv.k_proj")
    assert all(".adapters." in name for name in trained(model))
    sizes = {"q": (32, 32), "k": (32, 16), "v": (32, 16), "o": (32, 32), "g": (32, 64), "u": (32, 64), "d": (64, 32)}
    assert summary.trainable_parameters == 2 * sum(4 * (a + b) for a, b in sizes.values())
    assert all(torch.equal(a, b) for a, b in zip(before, logits(model, DOCUMENTS), strict=True))
    backward(model)


def test_targets(model: Decoder) -> None:
    summary = apply_method(model, MethodSection(kind="lora", targets=["q_proj", "v_proj", "down_proj"]), seed=0)
    assert {name.rsplit(".", 1)[1] for name in summary.adapted} == {"q_proj", "v_proj", "down_proj"}
    assert set(adapted_linears(model)) == {
        f"blocks.{layer}.{path}" for layer in (0, 1) for path in ("attention.qkv", "mlp.down")
    }


@pytest.mark.parametrize(
    ("targets", "message"),
    [(["q_prj"], "did you mean 'q_proj'"), (["lm_head"], "there are: down_proj"), ([], "method.targets is empty")],
)
def test_unknown_targets_are_refused(model: Decoder, targets: list[str], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        apply_method(model, MethodSection(kind="lora", targets=targets), seed=0)


def test_qlora_quantises_what_is_not_yet(model: Decoder, tiny_model_dir: Callable[..., Path]) -> None:
    total = sum(parameter.numel() for parameter in model.parameters())
    loaded = load_decoder(tiny_model_dir("qwen2"), quantize="nf4-double")
    for candidate in (model, loaded):
        summary = apply_method(candidate, MethodSection(kind="qlora", rank=4), seed=0)
        assert all(isinstance(linear.base, NF4Linear) for linear in adapted_linears(candidate).values())
        assert summary.total_parameters == total + summary.trainable_parameters
    left, right = logits(model.eval(), DOCUMENTS), logits(loaded.eval(), DOCUMENTS)
    assert all(torch.equal(a, b) for a, b in zip(left, right, strict=True))
    backward(model)


@pytest.mark.parametrize("method", [{"kind": "full"}, {"kind": "freeze", "trainable": ["norms"]}])
def test_nf4_weights_are_not_trained(tiny_model_dir: Callable[..., Path], method: dict[str, Any]) -> None:
    quantised = load_decoder(tiny_model_dir("qwen2"), quantize="nf4")
    with pytest.raises(UnsupportedModelError, match="NF4"):
        apply_method(quantised, MethodSection(**method), seed=0)


def test_experts_get_adapters_and_routers_do_not(tiny_model_dir: Callable[..., Path]) -> None:
    experts = load_decoder(tiny_model_dir("qwen3_moe"))
    summary = apply_method(experts, MethodSection(kind="lora", rank=2), seed=0)
    assert sum(".mlp.experts." in name for name in summary.adapted) == 2 * 4 * 3
    assert not any("router" in name for name in summary.adapted)
    backward(experts)


def test_the_same_seed_gives_the_same_adapters_on_other_targets(tiny_model_dir: Callable[..., Path]) -> None:
    values = []
    for targets in (["v_proj"], "all"):
        candidate = load_decoder(tiny_model_dir("qwen2"))
        apply_method(candidate, MethodSection(kind="lora", targets=targets), seed=7)
        values.append(adapted_linears(candidate)["blocks.1.attention.qkv"].adapter("v_proj").A)
    assert torch.equal(*values)


@pytest.mark.parametrize("family", ["qwen2", "gpt2"])
@pytest.mark.parametrize("kind", ["lora", "qlora", "full", "freeze"])
def test_the_transformers_backend_trains_the_same_way(
    tiny_model_dir: Callable[..., Path], family: str, kind: str
) -> None:
    directory = tiny_model_dir(family)
    foreign = load_model(directory, backend="transformers", device="cpu")
    native = load_decoder(directory)
    trainable = ["last:1", "norms"] if kind == "freeze" else []
    method = MethodSection.model_validate({"kind": kind, "rank": 4, "trainable": trainable})
    summaries = [apply_method(candidate, method, seed=0) for candidate in (foreign, native)]
    assert summaries[0].trainable_parameters == summaries[1].trainable_parameters
    assert summaries[0].total_parameters == summaries[1].total_parameters
    assert len(block_linears(foreign)) == 0 if kind in ("lora", "qlora") else len(block_linears(foreign)) > 0
    left, right = logits(foreign, DOCUMENTS), logits(native.eval(), DOCUMENTS)
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(left, right, strict=True))
    backward(foreign)


def test_fused_experts_of_transformers_are_refused(tiny_model_dir: Callable[..., Path]) -> None:
    foreign = load_model(tiny_model_dir("mixtral"), backend="transformers", device="cpu")
    for kind in ("lora", "qlora"):
        with pytest.raises(UnsupportedModelError, match="fused tensors"):
            apply_method(foreign, MethodSection.model_validate({"kind": kind}), seed=0)
    summary = apply_method(foreign, MethodSection(kind="lora", targets=["q_proj"]), seed=0)
    assert len(summary.adapted) == 2


FOREIGN = {
    "mamba": {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8},
    "falcon": {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
}


@pytest.mark.parametrize("kind", ["lora", "qlora"])
@pytest.mark.parametrize(
    ("family", "adapted", "left_alone"),
    [
        ("mamba", {"in_proj"}, {"dt_proj", "out_proj", "x_proj"}),
        ("falcon", {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"}, set()),
    ],
)
def test_families_whose_linears_are_peculiar(kind: str, family: str, adapted: set[str], left_alone: set[str]) -> None:
    """Was: Mamba multiplies by dt_proj's weight itself, so a linear in its place ended in an AttributeError; Falcon's
    linears are a class of their own, so none was found and nothing could be trained."""
    config = transformers.AutoConfig.for_model(family, **FOREIGN[family])
    model = TransformersModel(transformers.AutoModelForCausalLM.from_config(config))
    summary = apply_method(model, MethodSection(kind=kind, rank=2), seed=0)
    assert {name.rsplit(".", 1)[1] for name in summary.adapted} == adapted
    pack = pack_documents([[5, 9, 20, 31, 7], [3, 25, 8]])
    model.logits(model.train().hidden(pack)).square().mean().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    if left_alone:
        with pytest.raises(RecipeError, match="no linear of this model is called"):
            apply_method(model, MethodSection(targets=sorted(left_alone)), seed=0)
