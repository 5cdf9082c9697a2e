"""Ours against transformers: tiny models of every family with large random weights, float32, whole tensors.

The tolerance of 1e-4 is for sums taken in another order; logits here are of order 1.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from tunesmith.checkpoint.load import load_decoder
from tunesmith.checkpoint.names import tensor_names
from tunesmith.checkpoint.save import save_decoder
from tunesmith.model.decoder import Decoder
from tunesmith.model.language_model import logits
from tunesmith.model.packed import pack_documents

_LLAMA: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
CASES: dict[str, dict[str, Any]] = {
    "llama": {**_LLAMA, "rope_parameters": _LLAMA3_ROPE},
    "llama-linear-rope": {**_LLAMA, "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0}},
    "llama-biases-tied": {**_LLAMA, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    "mistral": {**_LLAMA, "sliding_window": 5},
    "qwen2": {**_LLAMA, "tie_word_embeddings": True},
    "qwen2-sliding": {**_LLAMA, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    "qwen3": {**_LLAMA, "head_dim": 16},
    "mixtral": {**_LLAMA, "num_local_experts": 4, "sliding_window": 6},
    "qwen3_moe": {
        **_LLAMA,
        "head_dim": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "norm_topk_prob": True,
        "mlp_only_layers": [0],
    },
    # Once only layers from max_window_layers on slid here; transformers' Qwen3-MoE has the window in every layer.
    "qwen3_moe-sliding": {
        **_LLAMA,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "use_sliding_window": True,
        "sliding_window": 4,
        "max_window_layers": 1,
    },
    "gpt2": {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "bos_token_id": 1},
    "gpt2-untied": {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "tie_word_embeddings": False},
}
DOCUMENTS = [[3, 5, 7, 9, 11, 13, 2, 4, 6, 8, 10, 63], [1], [40, 41, 42, 43, 44, 45, 46]]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Any, Path]]:
    """transformers' model of a case, with weights large enough to matter, and the directory it is saved in."""
    made: dict[str, tuple[Any, Path]] = {}

    def make(case: str) -> tuple[Any, Path]:
        if case not in made:
            directory = tmp_path_factory.mktemp(case)
            torch.manual_seed(0)
            config = AutoConfig.for_model(case.split("-")[0], **CASES[case])
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.normal_(0.0, 0.2)
            model.save_pretrained(directory)
            made[case] = (model, directory)
        return made[case]

    return make


def _theirs(model: Any) -> list[Tensor]:
    return [model(torch.tensor([document])).logits[0] for document in DOCUMENTS]


@pytest.mark.parametrize("case", CASES)
def test_logits_and_round_trip(case: str, reference: Any, tmp_path: Path) -> None:
    model, directory = reference(case)
    decoder = load_decoder(directory)
    with torch.no_grad():
        theirs = _theirs(model)
    for ours, expected in zip(logits(decoder, DOCUMENTS), theirs, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)

    save_decoder(decoder, tmp_path, max_shard_bytes=20_000)
    assert (tmp_path / "model.safetensors.index.json").is_file()
    back, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    stored = back.state_dict()
    assert stored.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(stored[name], tensor), name
    with torch.no_grad():
        # The same values, but elsewhere in memory: MKL's products then have other last bits on some processors.
        for ours, expected in zip(_theirs(back), theirs, strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_gradients(case: str, reference: Any, tmp_path: Path) -> None:
    model, directory = reference(case)
    decoder = load_decoder(directory)
    _loss(list(decoder.logits(decoder.hidden(pack_documents(DOCUMENTS))).split([len(d) for d in DOCUMENTS]))).backward()
    model.zero_grad()
    _loss(_theirs(model)).backward()
    theirs = _saved_gradients(model, tmp_path)
    ours = _gradients(decoder)
    assert set(ours) == set(theirs)
    for name, gradient in ours.items():
        scale = float(theirs[name].abs().max()) + 1e-3
        assert float((gradient - theirs[name]).abs().max()) < 1e-4 * scale, name


def _loss(outputs: list[Tensor]) -> Tensor:
    losses = [
        F.cross_entropy(out[:-1], torch.tensor(document[1:]), reduction="sum")
        for out, document in zip(outputs, DOCUMENTS, strict=True)
        if len(document) > 1
    ]
    return torch.stack(losses).sum()


def _gradients(decoder: Decoder) -> dict[str, Tensor]:
    found = {}
    for item in tensor_names(decoder):
        module: Any = decoder.get_submodule(item.module)
        gradient = getattr(module, item.kind).grad
        if item.part is not None:
            gradient = gradient[module.rows(item.part)]
        found[item.name] = gradient.t() if item.transposed else gradient
    return found


def _saved_gradients(model: Any, directory: Path) -> dict[str, Tensor]:
    """transformers' gradients under the names of a checkpoint: its own saving takes its fused experts apart."""
    import copy

    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter, source in zip(twin.parameters(), model.parameters(), strict=True):
            parameter.copy_(source.grad)
    twin.save_pretrained(directory)
    return load_file(directory / "model.safetensors")


@pytest.mark.parametrize("kind", ["block", "selective"])
@pytest.mark.parametrize("case", ["llama", "gpt2", "qwen3_moe"])
def test_checkpointing_gives_the_same_gradients(case: str, kind: Any, reference: Any) -> None:
    _, directory = reference(case)
    found = []
    for checkpointing in ("none", kind):
        decoder = load_decoder(directory).train()
        decoder.checkpointing = checkpointing
        decoder.logits(decoder.hidden(pack_documents(DOCUMENTS))).square().mean().backward()
        found.append(_gradients(decoder))
    for name, gradient in found[0].items():
        assert torch.equal(gradient, found[1][name]), name


@pytest.mark.parametrize("case", CASES)
def test_documents_do_not_see_each_other(case: str, reference: Any) -> None:
    """Perturbing the first document must not move the others by one bit."""
    _, directory = reference(case)
    decoder = load_decoder(directory)
    changed = [[token + 1 for token in DOCUMENTS[0][:-1]] + [0], *DOCUMENTS[1:]]
    before, after = logits(decoder, DOCUMENTS), logits(decoder, changed)
    assert not torch.equal(before[0], after[0])
    assert torch.equal(before[1], after[1])
    assert torch.equal(before[2], after[2])


def test_a_published_model_reads_its_stories(data_dir: Path) -> None:
    """stories260K: 3.548 is its perplexity on these stories, measured with transformers when the data was collected."""
    from transformers import AutoTokenizer

    directory = data_dir / "weights_stories260K" / "hf"
    stories = data_dir / "tinystories_sample" / "tinystories_v2_sample_4KB.txt"
    if not stories.is_file():
        pytest.skip("tinystories_v2_sample_4KB.txt is absent")
    decoder = load_decoder(directory)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    text = stories.read_text(encoding="utf-8")
    documents = [
        [1, *tokenizer(story.strip(), add_special_tokens=False)["input_ids"]][:512]
        for story in text.split("<|endoftext|>")
        if story.strip()
    ]
    with torch.no_grad():
        loss, count = 0.0, 0
        for document, out in zip(documents, logits(decoder, documents), strict=True):
            loss += float(F.cross_entropy(out[:-1], torch.tensor(document[1:]), reduction="sum"))
            count += len(document) - 1
    perplexity = torch.tensor(loss / count).exp().item()
    assert 3.5 < perplexity < 3.6
