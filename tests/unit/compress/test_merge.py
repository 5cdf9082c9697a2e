"""Merging: equal to the adapter, on the base that was trained, measured at every hop, refused when it is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tunesmith.checkpoint.adapter import save_adapter
from tunesmith.checkpoint.load import Quantize, load_decoder, load_model
from tunesmith.compress.divergence import divergence, prompt_logits, random_prompts
from tunesmith.compress.merge import merge_adapter, merge_to_directory
from tunesmith.errors import AdapterError, RunDirError, VerificationError
from tunesmith.model.language_model import LanguageModel, logits
from tunesmith.model.methods import adapted_linears, apply_method, quantise_model
from tunesmith.model.quant import NF4Linear
from tunesmith.recipe.schema import MethodSection

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
DOCUMENTS = [[5, 9, 200, 31, 7, 77, 12], [3, 250, 8, 14]]
VARIANTS: dict[str, dict[str, Any]] = {
    "lora": {"kind": "lora"},
    "rslora": {"kind": "lora", "rslora": True},
    "dora": {"kind": "lora", "dora": True, "targets": ["q_proj", "down_proj"]},
    "qlora": {"kind": "qlora"},
    "qlora-plain-dora": {"kind": "qlora", "dora": True, "double_quantisation": False},
}


def adapted(model: LanguageModel, method: dict[str, Any]) -> LanguageModel:
    """The model with adapters as if trained: every parameter of theirs moved."""
    apply_method(model, MethodSection(rank=4, **method), seed=0)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for linear in adapted_linears(model).values():
            for name, parameter in linear.adapters.named_parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.mul_(1 + 0.1 * noise) if "magnitude" in name else parameter.add_(0.05 * noise)
    return model


def relative(left: list[torch.Tensor], right: list[torch.Tensor]) -> float:
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("variant", list(VARIANTS))
@pytest.mark.parametrize("family", ["qwen2", "mixtral"])
def test_merged_equals_adapter(tiny_model_dir: Callable[..., Path], family: str, variant: str) -> None:
    method = dict(VARIANTS[variant])
    if family == "mixtral" and "targets" in method:
        method["targets"] = ["q_proj", "down_proj"]
    model = adapted(load_decoder(tiny_model_dir(family)), method).eval()
    expected = logits(model, DOCUMENTS)
    merged = logits(merge_adapter(model), DOCUMENTS)
    assert not adapted_linears(model)
    assert relative(merged, expected) < 1e-5
    unadapted = logits(load_decoder(tiny_model_dir(family)).eval(), DOCUMENTS)
    assert relative(unadapted, expected) > 1e-2


@pytest.mark.parametrize("method", [{"kind": "lora"}, {"kind": "qlora", "dora": True}])
def test_merged_equals_adapter_through_transformers(
    tiny_model_dir: Callable[..., Path], method: dict[str, Any]
) -> None:
    model = adapted(load_model(tiny_model_dir("gpt2"), backend="transformers", device="cpu"), method).eval()
    expected = logits(model, DOCUMENTS)
    assert relative(logits(merge_adapter(model), DOCUMENTS), expected) < 1e-5


@pytest.mark.parametrize("variant", ["lora", "dora", "qlora"])
def test_directory_holds_the_merged_model(tiny_model_dir: Callable[..., Path], tmp_path: Path, variant: str) -> None:
    """Also loaded by transformers, with the tokenizer beside it."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = tiny_model_dir("qwen2")
    quantize: Quantize | None = "nf4-double" if variant == "qlora" else None
    model = adapted(load_decoder(base, quantize=quantize), VARIANTS[variant]).eval()
    save_adapter(model, tmp_path / "adapter", base)
    report = merge_to_directory(None, tmp_path / "adapter", tmp_path / "merged", device="cpu")
    assert report.base_checked is True
    assert report.dtype == "float32"
    (hop,) = report.hops
    assert hop.divergence.max_difference < 1e-4
    assert hop.divergence.argmax_agreement_ratio == 1
    expected = logits(model, DOCUMENTS)
    assert relative(logits(load_model(tmp_path / "merged", device="cpu"), DOCUMENTS), expected) < 1e-5
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        mine = [theirs(torch.tensor([document])).logits[0] for document in DOCUMENTS]
    assert relative(mine, expected) < 1e-4
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").vocab_size > 0


@pytest.mark.parametrize("method", [{"kind": "lora"}, {"kind": "qlora"}])
def test_directory_through_transformers(
    tiny_model_dir: Callable[..., Path], tmp_path: Path, method: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that only the transformers backend knows (Phi), quantised linears without an adapter included."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        "phi", vocab_size=272, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    torch.manual_seed(0)
    base = tmp_path / "base"
    AutoModelForCausalLM.from_config(config).save_pretrained(base)
    model = load_model(base, device="cpu")
    assert model.backend == "transformers"
    adapted(model, {**method, "targets": ["q_proj", "fc2"]}).eval()
    save_adapter(model, tmp_path / "adapter", base)
    merge_to_directory(base, tmp_path / "adapter", tmp_path / "merged", device="cpu")
    assert relative(logits(load_model(tmp_path / "merged", device="cpu"), DOCUMENTS), logits(model, DOCUMENTS)) < 1e-5


def test_narrow_and_requantised_merges_report_their_divergence(
    tiny_model_dir: Callable[..., Path], tmp_path: Path
) -> None:
    base = tiny_model_dir("qwen2", hidden_size=64)
    save_adapter(adapted(load_decoder(base), {"kind": "lora"}), tmp_path / "a", base)
    report = merge_to_directory(
        base, tmp_path / "a", tmp_path / "m", torch.bfloat16, "nf4-double", device="cpu", kl_limit=1.0
    )
    narrow, quantised = report.hops
    assert 0 < narrow.divergence.kl_mean < quantised.divergence.kl_mean < 1.0
    assert 0 < narrow.divergence.mean_difference < quantised.divergence.mean_difference
    assert report.quantisation == "nf4-double"
    model = load_model(tmp_path / "m", device="cpu")
    assert sum(isinstance(child, NF4Linear) for child in model.modules()) == 8  # type: ignore[attr-defined]
    assert not (tmp_path / "m" / "dense").exists()


def test_requantised_directory_loads_in_transformers(tiny_model_dir: Callable[..., Path], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    for family, widths in (("qwen2", {"hidden_size": 64}), ("gpt2", {"n_embd": 64})):
        base = tiny_model_dir(family, **widths)
        out = tmp_path / family
        save_adapter(adapted(load_decoder(base), {"kind": "lora"}), out / "a", base)
        merge_to_directory(base, out / "a", out / "m", None, "nf4-double", device="cpu", kl_limit=1.0)
        theirs = AutoModelForCausalLM.from_pretrained(out / "m", dtype=torch.float32).train()
        for module in theirs.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        expected = [theirs(torch.tensor([document])).logits[0].detach() for document in DOCUMENTS]
        assert relative(logits(load_model(out / "m", device="cpu"), DOCUMENTS), expected) < 1e-4


def test_another_base_is_refused_unless_forced(tiny_model_dir: Callable[..., Path], tmp_path: Path) -> None:
    base, other = tiny_model_dir("qwen2"), tmp_path / "other"
    model = load_decoder(base)
    save_adapter(adapted(load_decoder(base), {"kind": "lora"}), tmp_path / "a", base)
    with torch.no_grad():
        model.norm.weight.add_(0.5)
    from tunesmith.checkpoint.save import save_decoder

    save_decoder(model, other)
    with pytest.raises(AdapterError, match="another base"):
        merge_to_directory(other, tmp_path / "a", tmp_path / "m", device="cpu")
    assert not (tmp_path / "m").exists()
    report = merge_to_directory(other, tmp_path / "a", tmp_path / "m", device="cpu", force=True)
    assert report.base_checked is False


def test_an_adapter_that_names_no_base_needs_one(tiny_model_dir: Callable[..., Path], tmp_path: Path) -> None:
    base = tiny_model_dir("qwen2")
    save_adapter(adapted(load_decoder(base), {"kind": "lora"}), tmp_path / "a", base)
    path = tmp_path / "a" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": None}))
    with pytest.raises(AdapterError, match="--base"):
        merge_to_directory(None, tmp_path / "a", tmp_path / "m", device="cpu")


def test_a_hop_that_breaks_the_model_is_refused_and_leaves_nothing(
    tiny_model_dir: Callable[..., Path], tmp_path: Path
) -> None:
    base = tiny_model_dir("qwen2")
    save_adapter(adapted(load_decoder(base), {"kind": "lora"}), tmp_path / "a", base)
    with pytest.raises(VerificationError, match="breaks the model"):
        merge_to_directory(base, tmp_path / "a", tmp_path / "m", torch.bfloat16, kl_limit=1e-12, device="cpu")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]
    forced = merge_to_directory(
        base, tmp_path / "a", tmp_path / "m", torch.bfloat16, kl_limit=1e-12, device="cpu", force=True
    )
    assert not forced.hops[0].passed
    with pytest.raises(RunDirError, match="exists already"):
        merge_to_directory(base, tmp_path / "a", tmp_path / "m", device="cpu")


def test_divergence_of_known_distributions() -> None:
    """Two logits: p = (3/4, 1/4) against q = (1/2, 1/2) is KL = 3/4 ln(3/2) + 1/4 ln(1/2)."""
    before = [torch.tensor([[3.0, 1.0]]).log(), torch.tensor([[1.0, 3.0]]).log()]
    after = [torch.tensor([[0.0, -0.0]]), torch.tensor([[-1.0, 1.0]])]
    first = 0.75 * torch.tensor(1.5).log() + 0.25 * torch.tensor(0.5).log()
    result = divergence(before[:1], after[:1])
    assert result.kl_mean == pytest.approx(float(first), abs=1e-6)
    assert divergence(before, after).argmax_agreement_ratio == 1
    assert divergence(before, before).kl_mean == 0
    assert divergence(before, after).max_difference == pytest.approx(1.0986, abs=1e-3)


def test_prompt_logits_are_float32_whatever_the_weights_are(tiny_model_dir: Callable[..., Path]) -> None:
    model = load_decoder(tiny_model_dir("qwen2"), dtype=torch.bfloat16)
    model.compute_dtype = torch.bfloat16
    first = prompt_logits(model, random_prompts(272, length=5))
    assert {tensor.dtype for tensor in first} == {torch.float32}
    assert model.compute_dtype == torch.bfloat16
    assert model.training
    assert not torch.equal(first[0], first[0].bfloat16().float())


def test_quantised_linears_of_transformers_keep_their_place(tiny_model_dir: Callable[..., Path]) -> None:
    model = load_model(tiny_model_dir("gpt2"), backend="transformers", device="cpu")
    before = logits(model, DOCUMENTS)
    quantise_model(model, "nf4-double")
    linears = [child for child in model.modules() if isinstance(child, NF4Linear)]  # type: ignore[attr-defined]
    assert len(linears) == 8
    native = load_decoder(tiny_model_dir("gpt2"), quantize="nf4-double").eval()
    after = logits(model, DOCUMENTS)
    assert relative(after, before) > 1e-3
    assert relative(after, logits(native, DOCUMENTS)) < 1e-4


def test_the_revision_of_the_base_is_remembered(
    tiny_model_dir: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was forgotten: an adapter trained on a revision of a Hub model was refused as one of another base."""
    base = tiny_model_dir("qwen2")
    asked: list[tuple[str, str | None]] = []

    def download(repo: str, revision: str | None) -> Path:
        asked.append((repo, revision))
        return base

    monkeypatch.setattr("tunesmith.checkpoint.source._download", download)
    save_adapter(adapted(load_decoder(base), {"kind": "lora"}), tmp_path / "a", "org/name", base, "v2")
    report = merge_to_directory(None, tmp_path / "a", tmp_path / "m", device="cpu")
    assert asked == [("org/name", "v2")]
    assert (report.base, report.base_checked) == ("org/name", True)
