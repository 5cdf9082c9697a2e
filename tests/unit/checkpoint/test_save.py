"""Saving: whole files, shards, and what transformers reads back."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tunesmith.arch import FAMILIES
from tunesmith.checkpoint.load import load_decoder
from tunesmith.checkpoint.save import save_decoder, tensors_of
from tunesmith.model.language_model import logits

Make = Callable[..., Path]
DOCUMENT = [3, 5, 7, 9, 11]


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_what_was_loaded_is_saved_bit_for_bit(family: str, tiny_model_dir: Make, tmp_path: Path) -> None:
    source = tiny_model_dir(family)
    save_decoder(load_decoder(source), tmp_path)
    before, after = load_file(source / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_shards_and_their_index(tiny_model_dir: Make, tmp_path: Path) -> None:
    decoder = load_decoder(tiny_model_dir("qwen2"))
    save_decoder(decoder, tmp_path, max_shard_bytes=30_000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text(encoding="utf-8"))
    tensors = dict(tensors_of(decoder))
    assert set(index["weight_map"]) == set(tensors)
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in tensors.values())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 2
    assert [p.name for p in sorted(tmp_path.glob("*.safetensors"))] == files
    largest = max(t.numel() * t.element_size() for t in tensors.values())
    for file in files:
        assert sum(t.nbytes for t in load_file(tmp_path / file).values()) <= max(30_000, largest)
    assert torch.equal(logits(load_decoder(tmp_path), [DOCUMENT])[0], logits(decoder, [DOCUMENT])[0])


def test_a_smaller_model_leaves_no_old_shard(tiny_model_dir: Make, tmp_path: Path) -> None:
    decoder = load_decoder(tiny_model_dir("qwen2"))
    save_decoder(decoder, tmp_path, max_shard_bytes=30_000)
    save_decoder(decoder, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_a_tied_head_is_not_stored(tiny_model_dir: Make, tmp_path: Path) -> None:
    save_decoder(load_decoder(tiny_model_dir("qwen2", tie_word_embeddings=True)), tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")


def test_dtype_is_converted_and_recorded(tiny_model_dir: Make, tmp_path: Path) -> None:
    save_decoder(load_decoder(tiny_model_dir("llama")), tmp_path, dtype=torch.bfloat16)
    raw = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert raw["dtype"] == "bfloat16"
    assert raw["architectures"] == ["LlamaForCausalLM"]
    assert AutoModelForCausalLM.from_pretrained(tmp_path).dtype == torch.bfloat16
    assert load_decoder(tmp_path).embedding.weight.dtype == torch.bfloat16


def test_a_failed_save_leaves_no_half_file(
    tiny_model_dir: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(shard: object, path: Path, metadata: object) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tunesmith.checkpoint.save.save_file", full)
    with pytest.raises(OSError, match="No space"):
        save_decoder(load_decoder(tiny_model_dir("llama")), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_quantised_model_is_saved_dense(tiny_model_dir: Make, tmp_path: Path) -> None:
    source = tiny_model_dir("llama", hidden_size=64, intermediate_size=128)
    decoder = load_decoder(source, quantize="nf4")
    save_decoder(decoder, tmp_path)
    dense = load_decoder(tmp_path)
    torch.testing.assert_close(logits(dense, [DOCUMENT])[0], logits(decoder, [DOCUMENT])[0], rtol=1e-5, atol=1e-6)
