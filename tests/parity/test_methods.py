"""Every method's forward and gradients against transformers + PEFT (+ bitsandbytes), float32, whole tensors.

The tolerance is 1e-4 of the largest magnitude: the operations are the same, their order in float32 is not.
Widths are multiples of 64, because bitsandbytes' own CPU kernel reads wrong scales for others.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tunesmith.checkpoint.adapter import adapter_tensors, load_adapter
from tunesmith.checkpoint.load import load_decoder
from tunesmith.checkpoint.names import tensor_names
from tunesmith.model.decoder import Decoder
from tunesmith.model.methods import apply_method
from tunesmith.model.packed import pack_documents
from tunesmith.recipe.schema import MethodSection

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

TOLERANCE = 1e-4
DOCUMENTS = [[5, 9, 200, 31, 7, 77, 12], [3, 250, 8, 14]]
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2": {"hidden_size": 64, "intermediate_size": 128},
    "llama": {"hidden_size": 64, "intermediate_size": 128, "attention_bias": True},
    "gpt2": {"n_embd": 64},
}
TARGETS = {
    "qwen2": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "llama": ["q_proj", "v_proj", "down_proj"],
    "gpt2": ["c_attn", "c_proj", "c_fc"],
}
VARIANTS: dict[str, dict[str, Any]] = {"lora": {}, "rslora": {"use_rslora": True}, "dora": {"use_dora": True}}


@pytest.fixture(params=list(FAMILIES))
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def base(family: str, tiny_model_dir: Callable[..., Path]) -> Path:
    return tiny_model_dir(family, **FAMILIES[family])


def theirs(base: Path, quantisation: Any = None) -> Any:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, quantization_config=quantisation)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


def with_peft(model: Any, family: str, **options: Any) -> Any:
    """PEFT's adapter with random A and B, and magnitudes off the base's norms, so that nothing is trivially equal."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    config = LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=TARGETS[family],
        fan_in_fan_out=family == "gpt2",
        init_lora_weights=False,
        task_type="CAUSAL_LM",
        **options,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "magnitude" in name:
                parameter.mul_(1 + 0.1 * torch.randn_like(parameter))
    return model


def their_loss(model: Any) -> tuple[list[Tensor], Tensor]:
    logits = [model(input_ids=torch.tensor([document])).logits[0] for document in DOCUMENTS]
    return logits, _loss(logits)


def our_loss(model: Any) -> tuple[list[Tensor], Tensor]:
    pack = pack_documents(DOCUMENTS)
    logits = list(model.logits(model.hidden(pack)).split(pack.lengths))
    return logits, _loss(logits)


def _loss(logits: list[Tensor]) -> Tensor:
    pieces = [
        F.cross_entropy(rows[:-1].float(), torch.tensor(document[1:]), reduction="sum")
        for rows, document in zip(logits, DOCUMENTS, strict=True)
    ]
    return torch.stack(pieces).sum()


def assert_close(ours: Tensor, expected: Tensor, name: str) -> None:
    error = (ours - expected).abs().max() / expected.abs().max().clamp(min=1e-12)
    assert error < TOLERANCE, f"{name}: relative error {error:.2e}"


def compare(ours: Any, peft_model: Any) -> None:
    """Logits and the gradient of every adapter tensor."""
    expected_logits, expected_loss = their_loss(peft_model)
    logits, loss = our_loss(ours)
    for mine, their in zip(logits, expected_logits, strict=True):
        assert_close(mine, their, "logits")
    expected_loss.backward()
    loss.backward()
    grads = {
        name.replace(".default", "").removesuffix(".weight"): parameter.grad
        for name, parameter in peft_model.named_parameters()
        if parameter.requires_grad
    }
    tensors = adapter_tensors(ours)
    assert len(tensors) == len(grads) > 0
    for name, parameter in tensors.items():
        assert parameter.grad is not None
        assert_close(parameter.grad, grads[name.removesuffix(".weight")], name)
    assert all(p.grad is None for p in ours.parameters() if not p.requires_grad)


def test_full(base: Path) -> None:
    model = load_decoder(base)
    apply_method(model, MethodSection(kind="full"), seed=0)
    reference = theirs(base).train()
    expected_logits, expected_loss = their_loss(reference)
    logits, loss = our_loss(model.train())
    for mine, their in zip(logits, expected_logits, strict=True):
        assert_close(mine, their, "logits")
    expected_loss.backward()
    loss.backward()
    expected = {name: parameter.grad for name, parameter in reference.named_parameters()}
    compared = 0
    for name, grad in _gradients(model):
        assert_close(grad, expected[name], name)
        compared += 1
    assert compared == len(expected)


def _gradients(model: Decoder) -> Iterator[tuple[str, Tensor]]:
    for item in tensor_names(model):
        module: Any = model.get_submodule(item.module)
        grad = getattr(module, item.kind).grad
        if item.part is not None:
            grad = grad[module.rows(item.part)]
        yield item.name, grad.t() if item.transposed else grad


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_adapters(base: Path, family: str, variant: str, tmp_path: Path) -> None:
    reference = with_peft(theirs(base), family, **VARIANTS[variant])
    reference.save_pretrained(tmp_path)
    model = load_decoder(base)
    load_adapter(model, tmp_path, trainable=True)
    compare(model.train(), reference.train())


@pytest.mark.parametrize("variant", list(VARIANTS))
@pytest.mark.parametrize("double", [True, False], ids=["double", "plain"])
def test_qlora(base: Path, family: str, variant: str, double: bool, tmp_path: Path) -> None:
    from transformers import BitsAndBytesConfig

    quantisation = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=torch.float32,
    )
    reference = with_peft(theirs(base, quantisation), family, **VARIANTS[variant])
    reference.save_pretrained(tmp_path)
    model = load_decoder(base, dtype=torch.float32, quantize="nf4-double" if double else "nf4")
    load_adapter(model, tmp_path, trainable=True)
    compare(model.train(), reference.train())
