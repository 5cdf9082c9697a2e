"""The transformers backend against transformers itself, one document at a time, for families not known natively."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from tunesmith.errors import ModelError, UnsupportedModelError
from tunesmith.model.language_model import logits
from tunesmith.model.packed import pack_documents
from tunesmith.model.transformers_backend import TransformersModel, length_groups

_COMMON: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "gpt_neox": _COMMON,
    "phi": _COMMON,
    "falcon": _COMMON,
    "gemma2": {**_COMMON, "num_key_value_heads": 2, "head_dim": 8},
    "cohere": {**_COMMON, "num_key_value_heads": 2},
    "granite": {**_COMMON, "logits_scaling": 3.0},
    "opt": {
        "vocab_size": 64,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "ffn_dim": 48,
        "word_embed_proj_dim": 32,
    },
    "mamba": {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8},
}
DOCUMENTS = [[3, 5, 7, 9, 11, 13, 2, 4, 6, 8, 10, 63], [1], [40, 41, 42, 43, 44], [7, 6, 5, 4]]


def _model(family: str) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **FAMILIES[family])
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_each_document_alone(family: str) -> None:
    """1e-4: sums of padded rows are taken in another order."""
    model = _model(family)
    with torch.no_grad():
        expected = [model(torch.tensor([document])).logits[0] for document in DOCUMENTS]
    for ours, theirs in zip(logits(TransformersModel(model), DOCUMENTS), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_documents_do_not_see_each_other(family: str) -> None:
    wrapped = TransformersModel(_model(family))
    changed = [[token ^ 1 for token in DOCUMENTS[0]], *DOCUMENTS[1:]]
    before, after = logits(wrapped, DOCUMENTS), logits(wrapped, changed)
    assert not torch.equal(before[0], after[0])
    for a, b in zip(before[1:], after[1:], strict=True):
        assert torch.equal(a, b)


def _gradients(wrapped: TransformersModel) -> list[Tensor]:
    wrapped.zero_grad()
    wrapped.logits(wrapped.hidden(pack_documents(DOCUMENTS))).square().mean().backward()
    return [p.grad.clone() for p in wrapped.parameters() if p.grad is not None]


def test_block_checkpointing_gives_the_same_gradients() -> None:
    wrapped = TransformersModel(_model("gpt_neox")).train()
    calls: list[int] = []
    wrapped.model.base_model.layers[0].attention.register_forward_hook(lambda *_: calls.append(1))
    plain = _gradients(wrapped)
    once = len(calls)
    wrapped.checkpointing = "block"
    for a, b in zip(plain, _gradients(wrapped), strict=True):
        assert torch.equal(a, b)
    assert len(calls) == 3 * once
    wrapped.checkpointing = "none"
    _gradients(wrapped)
    assert len(calls) == 4 * once


def test_selective_checkpointing_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="selective"):
        TransformersModel(_model("gpt_neox")).checkpointing = "selective"


def test_dropout_is_off() -> None:
    """A family with dropout by default trained with it, so that a gradient depended on how the batch was cut."""
    wrapped = TransformersModel(_model("opt")).train()
    assert wrapped.model.config.dropout > 0
    pack = pack_documents(DOCUMENTS)
    assert torch.equal(wrapped.hidden(pack), wrapped.hidden(pack))


def test_compute_dtype() -> None:
    wrapped = TransformersModel(_model("gpt_neox"))
    exact = logits(wrapped, DOCUMENTS)[0]
    wrapped.compute_dtype = torch.bfloat16
    hidden = wrapped.hidden(pack_documents(DOCUMENTS))
    assert hidden.dtype == torch.bfloat16
    ours = wrapped.logits(hidden)[: len(DOCUMENTS[0])].detach()
    assert ours.dtype == torch.bfloat16
    torch.testing.assert_close(ours.float(), exact, rtol=0.1, atol=0.1)
    wrapped.to(torch.bfloat16)
    wrapped.compute_dtype = torch.float32
    with pytest.raises(UnsupportedModelError, match=r"set model\.dtype to float32"):
        wrapped.hidden(pack_documents(DOCUMENTS))


def test_noise_only_while_training() -> None:
    wrapped = TransformersModel(_model("gpt_neox"))
    pack = pack_documents(DOCUMENTS)
    quiet = wrapped.hidden(pack)
    wrapped.noise_alpha = 5.0
    assert torch.equal(wrapped.hidden(pack), quiet)
    wrapped.train()
    assert not torch.equal(wrapped.hidden(pack), quiet)


def test_padding_is_less_than_half() -> None:
    groups = length_groups((1, 2, 3, 4, 100, 5, 8, 1, 65))
    assert sorted(i for group in groups for i in group) == list(range(9))
    lengths = (1, 2, 3, 4, 100, 5, 8, 1, 65)
    for group in groups:
        longest = max(lengths[i] for i in group)
        assert all(2 * lengths[i] > longest or lengths[i] * 2 == longest for i in group)


def test_a_model_that_looks_ahead_is_refused() -> None:
    config = AutoConfig.for_model("bert", **_COMMON)
    with pytest.raises(UnsupportedModelError, match="no causal language model"):
        TransformersModel(AutoModelForCausalLM.from_config(config).eval())


def test_save_and_load(tmp_path: Path) -> None:
    wrapped = TransformersModel(_model("phi"))
    wrapped.save(tmp_path)
    again = TransformersModel.load(tmp_path)
    assert torch.equal(logits(again, DOCUMENTS)[0], logits(wrapped, DOCUMENTS)[0])
    assert not again.training
    half = TransformersModel.load(tmp_path, dtype=torch.bfloat16)
    assert logits(half, DOCUMENTS)[0].dtype == torch.bfloat16


def test_random_weights_are_a_function_of_the_seed(tmp_path: Path) -> None:
    TransformersModel(_model("phi")).save(tmp_path)
    state = torch.get_rng_state()
    first, again, other = (
        logits(TransformersModel.load(tmp_path, weights="random", seed=seed), DOCUMENTS)[0] for seed in (1, 1, 2)
    )
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_missing_tensor_is_refused(tmp_path: Path) -> None:
    """transformers alone would fill it with random numbers and go on."""
    from safetensors.torch import load_file, save_file

    TransformersModel(_model("phi")).save(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors.pop("model.layers.1.mlp.fc1.weight")
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.fc1\.weight"):
        TransformersModel.load(tmp_path)


def test_code_from_a_checkpoint_is_never_run(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        '{"model_type": "homemade", "auto_map": {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}}',
        encoding="utf-8",
    )
    (tmp_path / "code.py").write_text("raise SystemExit('was run')", encoding="utf-8")
    with pytest.raises(UnsupportedModelError):
        TransformersModel.load(tmp_path)
