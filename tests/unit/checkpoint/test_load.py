"""Loading: dtypes, shards, old files, and every refusal."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tunesmith.checkpoint.load import load_decoder, load_language_model, load_model
from tunesmith.errors import ModelError, UnsupportedModelError
from tunesmith.model.language_model import logits
from tunesmith.recipe.schema import ModelSection

Make = Callable[..., Path]
DOCUMENT = [3, 5, 7, 9, 11]


def _edited(source: Path, target: Path, edit: Callable[[dict[str, Tensor]], object]) -> Path:
    shutil.copytree(source, target)
    tensors = load_file(target / "model.safetensors")
    edit(tensors)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtype_is_the_checkpoints_or_what_is_asked(dtype: torch.dtype, tiny_model_dir: Make, tmp_path: Path) -> None:
    def convert(tensors: dict[str, Tensor]) -> None:
        tensors.update({name: tensor.to(dtype) for name, tensor in tensors.items()})

    directory = _edited(tiny_model_dir("qwen2"), tmp_path / "model", convert)
    assert {p.dtype for p in load_decoder(directory).parameters()} == {dtype}
    wide = load_decoder(directory, dtype=torch.float32)
    assert {p.dtype for p in wide.parameters()} == {torch.float32}
    assert logits(wide, [DOCUMENT])[0].dtype == torch.float32


def test_a_missing_tensor_is_named(tiny_model_dir: Make, tmp_path: Path) -> None:
    directory = _edited(tiny_model_dir("llama"), tmp_path / "m", lambda t: t.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(ModelError, match=r"lacks tensors: model\.layers\.1\.mlp\.up_proj\.weight"):
        load_decoder(directory)


def test_a_checkpoint_without_embedding_is_refused(tiny_model_dir: Make, tmp_path: Path) -> None:
    """With the checkpoint's own dtype, which is the embedding's, this was a KeyError before anything was checked."""
    directory = _edited(tiny_model_dir("llama"), tmp_path / "m", lambda t: t.pop("model.embed_tokens.weight"))
    with pytest.raises(ModelError, match=r"lacks tensors: model\.embed_tokens\.weight"):
        load_model(directory, device="cpu")


def test_an_unexpected_tensor_is_named(tiny_model_dir: Make, tmp_path: Path) -> None:
    extra = {"model.layers.0.self_attn.extra.weight": torch.zeros(1)}
    directory = _edited(tiny_model_dir("llama"), tmp_path / "m", lambda t: t.update(extra))
    with pytest.raises(ModelError, match=r"unexpected tensors: model\.layers\.0\.self_attn\.extra\.weight"):
        load_decoder(directory)


def test_a_wrong_shape_is_named(tiny_model_dir: Make, tmp_path: Path) -> None:
    wrong = {"model.norm.weight": torch.zeros(5)}
    directory = _edited(tiny_model_dir("llama"), tmp_path / "m", lambda t: t.update(wrong))
    with pytest.raises(ModelError, match=r"model\.norm\.weight \(5,\) instead of \(32,\)"):
        load_decoder(directory)


def test_old_gpt2_files(tiny_model_dir: Make, tmp_path: Path) -> None:
    """Published GPT-2 and DialoGPT files have no "transformer." prefix, hold their masks, and their tied head too."""

    def age(tensors: dict[str, Tensor]) -> None:
        old = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
        tensors.clear()
        tensors.update(old)
        for layer in range(2):
            tensors[f"h.{layer}.attn.bias"] = torch.ones(1, 1, 8, 8)
            tensors[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
        tensors["lm_head.weight"] = tensors["wte.weight"].clone()

    source = tiny_model_dir("gpt2")
    old = load_decoder(_edited(source, tmp_path / "old", age))
    assert torch.equal(logits(old, [DOCUMENT])[0], logits(load_decoder(source), [DOCUMENT])[0])


def test_a_bare_base_model(tiny_model_dir: Make, tmp_path: Path) -> None:
    def strip(tensors: dict[str, Tensor]) -> None:
        bare = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
        tensors.clear()
        tensors.update(bare)

    source = tiny_model_dir("qwen2", tie_word_embeddings=True)
    bare = load_decoder(_edited(source, tmp_path / "bare", strip))
    assert torch.equal(logits(bare, [DOCUMENT])[0], logits(load_decoder(source), [DOCUMENT])[0])


def test_pickle_is_never_read(tiny_model_dir: Make, tmp_path: Path) -> None:
    shutil.copy(tiny_model_dir("llama") / "config.json", tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    with pytest.raises(ModelError, match=r"pickled weights only \(pytorch_model\.bin\)"):
        load_decoder(tmp_path)


def test_no_weights_at_all(tiny_model_dir: Make, tmp_path: Path) -> None:
    shutil.copy(tiny_model_dir("llama") / "config.json", tmp_path)
    with pytest.raises(ModelError, match="holds no weights"):
        load_decoder(tmp_path)


def test_a_torn_file(tiny_model_dir: Make, tmp_path: Path) -> None:
    directory = tmp_path / "m"
    shutil.copytree(tiny_model_dir("llama"), directory)
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(ModelError, match="torn"):
        load_decoder(directory)


def _write_index(directory: Path, file: str) -> None:
    names = load_file(directory / "model.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, file)}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


@pytest.mark.parametrize(
    ("file", "problem"), [("model-00001-of-00002.safetensors", "is missing"), ("../x.safetensors", "outside")]
)
def test_a_bad_index(file: str, problem: str, tiny_model_dir: Make, tmp_path: Path) -> None:
    directory = tmp_path / "m"
    shutil.copytree(tiny_model_dir("llama"), directory)
    _write_index(directory, file)
    with pytest.raises(ModelError, match=problem):
        load_decoder(directory)


def test_an_index_that_names_what_a_file_lacks(tiny_model_dir: Make, tmp_path: Path) -> None:
    directory = tmp_path / "m"
    shutil.copytree(tiny_model_dir("llama"), directory)
    _write_index(directory, "model.safetensors")
    names = load_file(directory / "model.safetensors")
    names.pop("model.norm.weight")
    save_file(names, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"does not hold model\.norm\.weight"):
        load_decoder(directory)


def test_random_weights_are_a_function_of_the_seed(tiny_model_dir: Make, tmp_path: Path) -> None:
    for family in ("qwen2", "gpt2", "qwen3_moe"):
        directory = tmp_path / family
        directory.mkdir()
        shutil.copy(tiny_model_dir(family) / "config.json", directory)
        first, again, other = (load_decoder(directory, weights="random", seed=seed) for seed in (1, 1, 2))
        for (name, a), b in zip(first.named_parameters(), again.parameters(), strict=True):
            assert torch.equal(a, b), name
        assert not torch.equal(first.embedding.weight, other.embedding.weight)
        assert float(first.embedding.weight.detach().std()) == pytest.approx(0.02, rel=0.05)
        assert torch.equal(first.norm.weight, torch.ones(32))
        assert torch.isfinite(logits(first, [DOCUMENT])[0]).all()


def test_random_weights_leave_torchs_generator_alone(tiny_model_dir: Make) -> None:
    before = torch.get_rng_state()
    load_decoder(tiny_model_dir("qwen2"), weights="random")
    assert torch.equal(before, torch.get_rng_state())


def test_progress_counts_every_tensor(tiny_model_dir: Make) -> None:
    seen: list[tuple[int, int]] = []
    load_decoder(tiny_model_dir("llama"), progress=lambda done, total: seen.append((done, total)))
    assert seen[-1][0] == seen[-1][1] == len(load_file(tiny_model_dir("llama") / "model.safetensors"))
    assert seen == sorted(seen)


@pytest.mark.parametrize("quantize", ["nf4", "nf4-double"])
def test_quantised_as_it_arrives(quantize: str, tiny_model_dir: Make) -> None:
    directory = tiny_model_dir("llama", hidden_size=64, intermediate_size=128)
    plain = load_decoder(directory)
    decoder = load_decoder(directory, quantize=quantize)  # type: ignore[arg-type]
    ours, exact = decoder.blocks[0].attention.qkv, plain.blocks[0].attention.qkv
    assert type(ours).__name__ == "NF4Linear"
    error = (ours.part_weight("k_proj") - exact.part_weight("k_proj").detach()).abs().max()
    assert 0 < float(error) < 0.2 * float(exact.weight.detach().abs().max())
    assert torch.equal(decoder.embedding.weight, plain.embedding.weight)
    assert not any(buffer.is_meta for buffer in decoder.buffers())


def test_quantised_on_the_transformers_backend(tiny_model_dir: Make) -> None:
    directory = str(tiny_model_dir("llama", hidden_size=64, intermediate_size=128))
    foreign = load_model(directory, quantize="nf4", device="cpu", backend="transformers")
    native = load_model(directory, quantize="nf4", device="cpu")
    ours, theirs = logits(native, [DOCUMENT])[0], logits(foreign, [DOCUMENT])[0]
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert not torch.equal(ours, logits(load_model(directory, device="cpu"), [DOCUMENT])[0])


def test_load_model_is_ready_to_evaluate(tiny_model_dir: Make) -> None:
    model = load_model(str(tiny_model_dir("llama")), device="cpu", dtype="bfloat16")
    assert not model.training
    assert model.backend == "native"
    assert next(model.parameters()).dtype == torch.bfloat16
    with pytest.raises(ModelError, match="dtype must be"):
        load_model(str(tiny_model_dir("llama")), dtype="int7", device="cpu")


def test_the_backend_is_chosen_and_announced(
    tiny_model_dir: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from transformers import AutoModelForCausalLM, GPTNeoXConfig

    config = GPTNeoXConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING):
        model = load_language_model(ModelSection(path=str(tmp_path)))
    assert model.backend == "transformers"
    assert "gpt_neox" in caplog.text
    with pytest.raises(UnsupportedModelError, match="gpt_neox"):
        load_language_model(ModelSection(path=str(tmp_path), backend="native"))
    chosen = load_language_model(ModelSection(path=str(tiny_model_dir("llama")), backend="transformers"))
    assert chosen.backend == "transformers"
    native = load_decoder(tiny_model_dir("llama"))
    torch.testing.assert_close(logits(chosen, [DOCUMENT])[0], logits(native, [DOCUMENT])[0], rtol=1e-4, atol=1e-4)


def test_a_foreign_quantisation_is_refused(tiny_model_dir: Make, tmp_path: Path) -> None:
    directory = tmp_path / "m"
    shutil.copytree(tiny_model_dir("llama"), directory)
    raw = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    raw["quantization_config"] = {"quant_method": "awq", "bits": 4}
    (directory / "config.json").write_text(json.dumps(raw), encoding="utf-8")
    with pytest.raises(UnsupportedModelError, match="'awq'"):
        load_decoder(directory)


@pytest.mark.parametrize(
    ("name", "given"), [("quantize", "nf5"), ("quantize", "int8"), ("backend", "mine"), ("weights", "no")]
)
def test_a_choice_that_there_is_not_is_refused(name: str, given: str, tiny_model_dir: Make) -> None:
    """Any other quantize was taken for plain NF4 without a word, the others ended in pydantic's error."""
    choice: dict[str, Any] = {name: given}
    with pytest.raises(ModelError, match=f"{name} must be one of .*, got '{given}'"):
        load_model(tiny_model_dir("llama"), **choice)
