"""Adapters in PEFT's format: PEFT reads ours, we read PEFT's, and what we can't do is refused by name."""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tunesmith.checkpoint.adapter import load_adapter, read_adapter_tensors, save_adapter
from tunesmith.checkpoint.adapter_config import options_for
from tunesmith.checkpoint.fingerprint import base_fingerprint
from tunesmith.checkpoint.load import load_decoder, load_model
from tunesmith.checkpoint.save import save_decoder
from tunesmith.errors import AdapterError
from tunesmith.model.language_model import LanguageModel, logits
from tunesmith.model.methods import adapted_linears, apply_method
from tunesmith.recipe.schema import MethodSection

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
DOCUMENTS = [[5, 9, 200, 31, 7, 77, 12], [3, 250, 8, 14]]
METHODS: dict[str, dict[str, Any]] = {"lora": {}, "rslora": {"rslora": True}, "dora": {"dora": True}}
PEFT: dict[str, dict[str, Any]] = {"lora": {}, "rslora": {"use_rslora": True}, "dora": {"use_dora": True}}


def train_a_little(model: LanguageModel) -> None:
    """Move every adapter parameter, as training would."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for linear in adapted_linears(model).values():
            for parameter in linear.adapters.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def with_adapter(directory: Path, backend: str = "native", **method: Any) -> LanguageModel:
    model = load_model(directory, backend=backend, device="cpu")  # type: ignore[arg-type]
    apply_method(model, MethodSection(kind="lora", rank=4, alpha=6, **method), seed=0)
    train_a_little(model)
    return model.eval()


def their_logits(base: Path, adapter: Path) -> list[torch.Tensor]:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()
    with torch.no_grad():
        return [model(input_ids=torch.tensor([document])).logits[0] for document in DOCUMENTS]


def make_with_peft(base: Path, out: Path, **options: Any) -> list[torch.Tensor]:
    """PEFT's adapter with random values, saved to `out`. Returns: its logits."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(2)
    config = LoraConfig(**{"r": 4, "lora_alpha": 6, "init_lora_weights": False, "task_type": "CAUSAL_LM", **options})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "magnitude" in name:
                    parameter.mul_(1.2)
        model.save_pretrained(out)
    with torch.no_grad():
        return [model(input_ids=torch.tensor([document])).logits[0] for document in DOCUMENTS]


def assert_same(left: list[torch.Tensor], right: list[torch.Tensor]) -> None:
    for a, b in zip(left, right, strict=True):
        assert (a - b).abs().max() / b.abs().max() < 1e-4


@pytest.mark.parametrize("variant", list(METHODS))
@pytest.mark.parametrize("family", ["qwen2", "gpt2", "mistral"])
@pytest.mark.parametrize("backend", ["native", "transformers"])
def test_peft_reads_ours(
    tiny_model_dir: Callable[..., Path], tmp_path: Path, family: str, variant: str, backend: str
) -> None:
    base = tiny_model_dir(family)
    model = with_adapter(base, backend, **METHODS[variant])
    save_adapter(model, tmp_path, base)
    expected = logits(model, DOCUMENTS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # PEFT warns about keys it doesn't know, and about weights it misses
        warnings.simplefilter("ignore", FutureWarning)
        assert_same(their_logits(base, tmp_path), expected)
    again = load_model(base, adapter=tmp_path, device="cpu")
    assert_same(logits(again, DOCUMENTS), expected)


@pytest.mark.parametrize("variant", list(PEFT))
@pytest.mark.parametrize(("family", "targets"), [("qwen2", "all-linear"), ("gpt2", ["c_attn", "c_proj", "c_fc"])])
@pytest.mark.parametrize("backend", ["native", "transformers"])
def test_we_read_pefts(
    tiny_model_dir: Callable[..., Path], tmp_path: Path, family: str, targets: Any, variant: str, backend: str
) -> None:
    base = tiny_model_dir(family)
    options = {**PEFT[variant], "target_modules": targets, "fan_in_fan_out": family == "gpt2"}
    expected = make_with_peft(base, tmp_path, **options)
    model = load_model(base, adapter=tmp_path, device="cpu", backend=backend)  # type: ignore[arg-type]
    assert_same(logits(model, DOCUMENTS), expected)
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_patterns_of_rank_and_alpha(tiny_model_dir: Callable[..., Path], tmp_path: Path) -> None:
    base = tiny_model_dir("qwen2")
    expected = make_with_peft(
        base,
        tmp_path / "theirs",
        target_modules=["q_proj", "v_proj", "down_proj"],
        rank_pattern={"v_proj": 2, r"model\.layers\.1\.self_attn\.q_proj": 7},
        alpha_pattern={"down_proj": 11},
        layers_to_transform=None,
    )
    model = load_model(base, adapter=tmp_path / "theirs", device="cpu")
    assert_same(logits(model, DOCUMENTS), expected)
    save_adapter(model, tmp_path / "ours", base)
    assert_same(their_logits(base, tmp_path / "ours"), expected)


def test_layers_of_its_own_choice(tiny_model_dir: Callable[..., Path], tmp_path: Path) -> None:
    """An adapter on some layers only: we write full names, which PEFT matches."""
    base = tiny_model_dir("qwen2")
    expected = make_with_peft(base, tmp_path / "theirs", target_modules=["q_proj"], layers_to_transform=[1])
    model = load_model(base, adapter=tmp_path / "theirs", device="cpu")
    assert list(adapted_linears(model)) == ["blocks.1.attention.qkv"]
    save_adapter(model, tmp_path / "ours", base)
    config = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["model.layers.1.self_attn.q_proj"]
    assert_same(their_logits(base, tmp_path / "ours"), expected)


def test_experts_round_trip(tiny_model_dir: Callable[..., Path], tmp_path: Path) -> None:
    base = tiny_model_dir("mixtral")
    model = with_adapter(base)
    save_adapter(model, tmp_path, base)
    names = load_file(tmp_path / "adapter_model.safetensors")
    assert "base_model.model.model.layers.0.block_sparse_moe.experts.3.w1.lora_A.weight" in names
    assert_same(logits(load_model(base, adapter=tmp_path, device="cpu"), DOCUMENTS), logits(model, DOCUMENTS))


def test_continued_into_the_recipes_own_adapters(tiny_model_dir: Callable[..., Path], tmp_path: Path) -> None:
    base = tiny_model_dir("qwen2")
    first = with_adapter(base)
    save_adapter(first, tmp_path, base)
    second = load_decoder(base)
    apply_method(second, MethodSection(kind="lora", rank=4, alpha=6), seed=9)
    load_adapter(second, tmp_path)
    assert_same(logits(second.eval(), DOCUMENTS), logits(first, DOCUMENTS))
    assert all(p.requires_grad for linear in adapted_linears(second).values() for p in linear.adapters.parameters())
    other = load_decoder(base)
    apply_method(other, MethodSection(kind="lora", rank=8, alpha=6), seed=9)
    with pytest.raises(AdapterError, match=r"set method\.rank to 4"):
        load_adapter(other, tmp_path)
    fewer = load_decoder(base)
    apply_method(fewer, MethodSection(kind="lora", rank=4, alpha=6, targets=["q_proj"]), seed=9)
    with pytest.raises(AdapterError, match=r"has blocks\.0\.attention\.output\.o_proj, the model's lacks"):
        load_adapter(fewer, tmp_path)


def test_the_base_is_on_record(tiny_model_dir: Callable[..., Path], tmp_path: Path) -> None:
    base = tiny_model_dir("qwen2")
    save_adapter(with_adapter(base), tmp_path / "lora", base)
    record = read_adapter_tensors(tmp_path / "lora")[1]
    assert (record.fingerprint, record.quantisation, record.dtype) == (base_fingerprint(base), "none", "float32")
    quantised = load_decoder(base, dtype=torch.bfloat16, quantize="nf4-double")
    apply_method(quantised, MethodSection(kind="qlora"), seed=0)
    save_adapter(quantised, tmp_path / "qlora", "org/name", base_directory=base)
    record = read_adapter_tensors(tmp_path / "qlora")[1]
    assert (record.fingerprint, record.quantisation, record.dtype) == (base_fingerprint(base), "nf4-double", "bfloat16")
    config = json.loads((tmp_path / "qlora" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "org/name"


def test_fingerprint_is_blind_to_shards_and_sees_one_value(tiny_model_dir: Callable[..., Path], tmp_path: Path) -> None:
    base = tiny_model_dir("qwen2")
    model = load_decoder(base)
    save_decoder(model, tmp_path / "shards", max_shard_bytes=20_000)
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    assert base_fingerprint(tmp_path / "shards") == base_fingerprint(base)
    with torch.no_grad():
        model.blocks[0].get_parameter("mlp_norm.weight")[0] += 1e-3
    save_decoder(model, tmp_path / "other")
    assert base_fingerprint(tmp_path / "other") != base_fingerprint(base)


def test_a_model_without_adapter_is_refused(tiny_model_dir: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="no adapter"):
        save_adapter(load_decoder(tiny_model_dir("qwen2")), tmp_path, "x")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "LOHA"}, "LOHA"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"use_qalora": True}, "use_qalora"),
        ({"target_parameters": ["x"]}, "target_parameters"),
        ({"a_field_of_tomorrow": {"x": 1}}, "a_field_of_tomorrow"),
        ({"init_lora_weights": "pissa_niter_4"}, "pissa"),
        ({"r": 0}, "r must be a positive number"),
        ({"lora_alpha": "8"}, "lora_alpha must be a positive number"),
        ({"lora_alpha": float("nan")}, "lora_alpha must be a positive number"),  # was: merged, and diverged
        ({"rank_pattern": [1]}, "rank_pattern must be a mapping"),  # was: an AttributeError escaped
        ({"rank_pattern": {"q_proj": "x"}}, "rank_pattern of q_proj must be a positive number"),
        ({"lora_dropout": "a"}, "lora_dropout must be a number"),
        ({"rank_pattern": {"(": 3}}, "no regular expression"),
        ({"r": 5}, "has shape"),
        # Adapters of the rank that the configuration claims were once built before any tensor was looked at.
        ({"r": 60_000}, "has rank 60000"),
        ({"use_dora": True}, "lacks the tensor"),
    ],
)
def test_what_we_cannot_do_is_refused_by_name(
    tiny_model_dir: Callable[..., Path], tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    base = tiny_model_dir("qwen2")
    save_adapter(with_adapter(base), tmp_path, base)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(AdapterError, match=message):
        load_adapter(load_decoder(base), tmp_path)


def _rename(tensors: dict[str, torch.Tensor], old: str, new: str) -> dict[str, torch.Tensor]:
    return {name.replace(old, new): tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: _rename(t, "layers.1.", "layers.7."), "does not have"),
        (lambda t: _rename(t, "q_proj", "q_prj"), "did you mean 'model.layers.0.self_attn.q_proj'"),
        (lambda t: _rename(t, "lora_A", "lora_C"), "no part of a LoRA adapter"),
        (lambda t: {name: x for i, (name, x) in enumerate(sorted(t.items())) if i}, "lacks the tensor"),
        (lambda t: {}, "holds no tensor"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(
    tiny_model_dir: Callable[..., Path], tmp_path: Path, change: Callable[..., Any], message: str
) -> None:
    base = tiny_model_dir("qwen2")
    save_adapter(with_adapter(base), tmp_path, base)
    path = tmp_path / "adapter_model.safetensors"
    save_file(change(load_file(path)), path)
    with pytest.raises(AdapterError, match=message):
        load_adapter(load_decoder(base), tmp_path)


def test_files_that_are_missing_torn_or_pickles(tiny_model_dir: Callable[..., Path], tmp_path: Path) -> None:
    base = tiny_model_dir("qwen2")
    with pytest.raises(AdapterError, match=r"has no adapter_config\.json"):
        load_adapter(load_decoder(base), tmp_path)
    save_adapter(with_adapter(base), tmp_path, base)
    weights = tmp_path / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-7])
    with pytest.raises(AdapterError, match="torn"):
        load_adapter(load_decoder(base), tmp_path)
    weights.rename(tmp_path / "adapter_model.bin")
    with pytest.raises(AdapterError, match="pickle"):
        load_adapter(load_decoder(base), tmp_path)
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(AdapterError, match="not valid JSON"):
        load_adapter(load_decoder(base), tmp_path)


def _other_base(base: Path, directory: Path) -> Path:
    """The same architecture with one weight moved, as after more training."""
    model = load_decoder(base)
    with torch.no_grad():
        model.blocks[0].get_parameter("mlp_norm.weight")[0] += 1e-3
    save_decoder(model, directory)
    return directory


@pytest.mark.parametrize("backend", ["native", "transformers"])
def test_another_base_than_the_one_on_record_is_refused(
    tiny_model_dir: Callable[..., Path], tmp_path: Path, backend: str
) -> None:
    """It was put on whatever had the right shapes, and answered nonsense."""
    base = tiny_model_dir("qwen2")
    other = _other_base(base, tmp_path / "other")
    save_adapter(with_adapter(base), tmp_path / "adapter", "org/name", base_directory=base)
    fold = r"or fold it .*tunesmith merge .*adapter --base .*other --force --output DIR$"
    with pytest.raises(AdapterError, match=rf"another base than .*other .*\(org/name\), {fold}"):
        load_model(other, adapter=tmp_path / "adapter", device="cpu", backend=backend)  # type: ignore[arg-type]
    assert adapted_linears(load_model(base, adapter=tmp_path / "adapter", device="cpu"))


def test_the_same_base_elsewhere_and_adapters_without_a_record_load(
    tiny_model_dir: Callable[..., Path], tmp_path: Path
) -> None:
    base = tiny_model_dir("qwen2")
    save_adapter(with_adapter(base), tmp_path / "ours", base)
    save_decoder(load_decoder(base), tmp_path / "moved", max_shard_bytes=20_000)
    assert adapted_linears(load_model(tmp_path / "moved", adapter=tmp_path / "ours", device="cpu"))
    make_with_peft(base, tmp_path / "theirs", target_modules=["q_proj"])
    other = _other_base(base, tmp_path / "other")
    assert adapted_linears(load_model(other, adapter=tmp_path / "theirs", device="cpu"))


def test_random_weights_are_known_by_their_seed(tiny_model_dir: Callable[..., Path], tmp_path: Path) -> None:
    base = tiny_model_dir("qwen2")
    save_adapter(with_adapter(base), tmp_path, base, random_seed=3)
    assert adapted_linears(load_model(base, adapter=tmp_path, weights="random", seed=3, device="cpu"))
    for options in ({"weights": "random", "seed": 4}, {}):
        with pytest.raises(AdapterError, match="random weights of seed 3"):
            load_model(base, adapter=tmp_path, device="cpu", **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "pattern",
    [
        "(l+)+x",
        "(.*a)*b",
        "(.?){60}q",
        "(l|l)" * 40,
        ".*.*.*.*.*.*q",
        "[a-z_.]*" * 8 + "q",
        "(?:(?:[a-z]|.)+)+X",
        "(" * 2_000,
        ".?" * 60,
        "(?x:(l+) +X)",
        "(l" + "|l" * 3 + r")\1" + "(a*)" * 9,
    ],
)
def test_patterns_that_would_take_for_ever_are_refused(pattern: str) -> None:
    config = {"r": 4, "lora_alpha": 8, "rank_pattern": {pattern: 2}}
    began = time.process_time()
    with pytest.raises(AdapterError, match=r"pattern .* (repeat|regular expression)"):
        options_for(config, "model.layers.0.self_attn." + "l" * 60)
    assert time.process_time() - began < 5


@pytest.mark.parametrize(
    ("pattern", "module", "matches"),
    [
        ("q_proj", "model.layers.3.self_attn.q_proj", True),
        ("q_proj", "model.layers.3.self_attn.seq_proj", False),
        (r"model\.layers\.1\.self_attn\.q_proj", "model.layers.1.self_attn.q_proj", True),
        (r".*\.layers\.(0|1|2|3)\.(mlp|self_attn)\..*_proj", "model.layers.3.mlp.up_proj", True),
        (r"layers\.[0-9]+\..*", "model.layers.12.mlp.up_proj", True),
        (r"(model\.)?layers\.\d{1,2}\.mlp\.(?:up|down)_proj", "model.layers.12.mlp.up_proj", True),
        (r"[*+?{}()|]+", "model.x", False),
    ],
)
def test_patterns_match_as_pefts_do(pattern: str, module: str, matches: bool) -> None:
    config = {"r": 4, "lora_alpha": 8, "rank_pattern": {pattern: 2}}
    assert options_for(config, module).rank == (2 if matches else 4)
