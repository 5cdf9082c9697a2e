"""The certificate: passes where all is well, and fails where a fault is planted."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tunesmith.errors import DataError
from tunesmith.model.attention import PackedAttention
from tunesmith.model.decoder import Decoder
from tunesmith.model.lora import AdaptedLinear
from tunesmith.recipe.load import recipe_from_mapping
from tunesmith.recipe.schema import Recipe
from tunesmith.train.resolve import resolve_recipe
from tunesmith.verify.certificate import Certificate, _versions, certify
from tunesmith.verify.check import Outcome, run_check
from tunesmith.verify.invariance import accumulation_invariance, packing_isolation
from tunesmith.verify.kernels import Case, compare, fp8_products, shapes_of
from tunesmith.verify.mask import mask_shown
from tunesmith.verify.stations import merge_parity, resume_equality
from tunesmith.verify.subject import Subject, make_subject, reduced_config

Make = Callable[..., Path]
CPU = torch.device("cpu")


@pytest.fixture
def recipe(tiny_model_dir: Make) -> Callable[..., Recipe]:
    def make(kind: str = "lora", family: str = "qwen2", **sections: Any) -> Recipe:
        mapping = {
            "model": {"path": str(tiny_model_dir(family, hidden_size=64)), "device": "cpu"}
            if family != "gpt2"
            else {"path": str(tiny_model_dir(family)), "device": "cpu"},
            "method": {"kind": kind, "rank": 4, **sections.pop("method", {})},
            "data": {"format": "tokens"},
            **sections,
        }
        return recipe_from_mapping(mapping)

    return make


@pytest.fixture
def subject(recipe: Callable[..., Recipe]) -> Callable[..., Subject]:
    def make(*args: Any, **kwargs: Any) -> Subject:
        return make_subject(resolve_recipe(recipe(*args, **kwargs)))

    return make


def _checks(certificate: Certificate) -> dict[str, bool]:
    return {check.name: check.passed for check in certificate.checks}


@pytest.mark.parametrize("kind", ["lora", "qlora", "full"])
def test_every_check_passes(kind: str, recipe: Callable[..., Recipe]) -> None:
    certificate = certify(recipe(kind, method={"dropout": 0.1} if kind != "full" else {}))
    assert _checks(certificate) == dict.fromkeys(_checks(certificate), True)
    expected = {
        "mask shown",
        "accumulation invariance",
        "packing isolation",
        "blocks written out",
        "kernel: RMS norm",
        "kernel: rope",
        "kernel: attention",
        "kernel: chunked loss",
        "resume equality",
    }
    if kind != "full":
        expected |= {"kernel: LoRA linear", "merge parity"}
    if kind == "qlora":
        expected |= {"kernel: NF4 quantise", "kernel: NF4 dequantise", "kernel: NF4 linear"}
    assert set(_checks(certificate)) == expected
    assert ("merge parity" in certificate.skipped) == (kind == "full")


@pytest.mark.parametrize(
    ("kind", "method"),
    [("lora", {"base": "fp8"}), ("qlora", {"fp8_compute": True}), ("full", {"fp8_compute": True})],
)
def test_products_in_fp8_are_checked_and_the_rest_passes(
    kind: str, method: dict[str, Any], recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    certificate = certify(recipe(kind, method=method))
    assert _checks(certificate) == dict.fromkeys(_checks(certificate), True)
    assert "kernel: fp8 products" in _checks(certificate)
    assert ("merge parity" in _checks(certificate)) == (kind != "full")
    # A fault: the columns of the transposed codes are one off.
    shifted = lambda codes: codes.view(torch.uint8).t().roll(1, 1).contiguous().view(codes.dtype)  # noqa: E731
    monkeypatch.setattr("tunesmith.model.fp8.transpose_fp8", shifted)
    chosen = resolve_recipe(recipe("lora", method={"base": "fp8"}))
    shapes = shapes_of(make_subject(chosen).widths, chosen.train, CPU)
    assert not run_check("", lambda: fp8_products(shapes, chosen.method, CPU, torch.float32)).passed


@pytest.mark.parametrize(
    ("family", "sections"),
    [
        ("gpt2", {"method": {"dora": True}}),
        ("mistral", {"train": {"precision": "bfloat16", "optimizer": "adamw8bit"}}),
        ("qwen3_moe", {"train": {"checkpointing": "block", "accumulation": 2, "neftune_alpha": 5.0}}),
    ],
)
def test_other_families_and_settings(family: str, sections: Any, recipe: Callable[..., Recipe]) -> None:
    certificate = certify(recipe("lora", family, **sections))
    assert _checks(certificate) == dict.fromkeys(_checks(certificate), True)
    assert ("kernel: sliding-window attention" in _checks(certificate)) == (family == "mistral")
    assert ("kernel: DoRA linear" in _checks(certificate)) == (family == "gpt2")
    assert ("kernel: expert routing" in _checks(certificate)) == (family == "qwen3_moe")
    assert ("kernel: 8-bit AdamW" in _checks(certificate)) == (family == "mistral")


def test_transformers_backend(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, GPTNeoXConfig

    config = GPTNeoXConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    certificate = certify(recipe("lora").model_copy(update={"model": _model(tmp_path)}))
    assert _checks(certificate) == dict.fromkeys(_checks(certificate), True)
    assert {"accumulation invariance", "packing isolation", "merge parity", "resume equality"} <= set(
        _checks(certificate)
    )
    assert "kernels of the blocks" in certificate.skipped


def _model(path: Path) -> Any:
    from tunesmith.recipe.schema import ModelSection

    return ModelSection(path=str(path), device="cpu")


def test_quick_leaves_generators_and_writes_into_the_run(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    before = torch.get_rng_state()
    certificate = certify(recipe("lora"), full=False, run_dir=tmp_path)
    assert torch.equal(before, torch.get_rng_state())
    assert set(certificate.skipped) == {"merge parity", "resume equality"}
    written = json.loads((tmp_path / "certificate.json").read_text(encoding="utf-8"))
    assert written["passed"] is True
    assert {check["name"] for check in written["checks"]} == set(_checks(certificate))


def test_a_passed_certificate_is_kept_until_the_recipe_changes(
    recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("tunesmith.verify.certificate._versions", lambda: {"torch": "1", "tunesmith": "1"})
    first = certify(recipe("lora"), full=False)
    again = certify(recipe("lora", name="another name"), full=False)
    other = certify(recipe("lora", method={"rank": 8}), full=False)
    assert [first.cached, again.cached, other.cached] == [False, True, False]
    assert again.checks == first.checks
    monkeypatch.setattr("tunesmith.verify.certificate._versions", lambda: {"torch": "0", "tunesmith": "0"})
    assert not certify(recipe("lora"), full=False).cached


def test_a_certificate_is_of_the_libraries_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another Triton or transformers, whose kernels and models a run uses, once found the old certificate."""
    before = _versions()
    monkeypatch.setattr("tunesmith.verify.certificate.metadata.version", lambda name: "0.0")
    after = _versions()
    assert {name for name in before if before[name] != after[name]} >= {"transformers", "tokenizers"}


def test_a_failed_certificate_is_not_kept(
    recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("tunesmith.verify.certificate.mask_shown", lambda *_: Outcome(None, None, "no", passed=False))
    assert not certify(recipe("lora"), full=False).passed
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    again = certify(recipe("lora"), full=False)
    assert again.passed
    assert not again.cached


def test_a_loss_divided_by_each_micro_batch_is_caught(
    subject: Callable[..., Subject], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The classic fault: a mean over every micro-batch instead of over the tokens of the whole window."""
    from tunesmith.verify import invariance

    right = invariance.language_model_loss

    def mean_of_each(model: Any, batch: Any, chunk_tokens: int) -> tuple[Tensor, int]:
        loss, count = right(model, batch, chunk_tokens)
        return loss / max(count, 1), count

    monkeypatch.setattr(invariance, "language_model_loss", mean_of_each)
    assert not run_check("x", lambda: accumulation_invariance(subject(), CPU)).passed


def test_documents_that_see_each_other_are_caught(
    subject: Callable[..., Subject], monkeypatch: pytest.MonkeyPatch
) -> None:
    def one_document(self: PackedAttention, layer: int) -> Any:
        from tunesmith.model.attention import attend_one

        return lambda query, key, value: attend_one(query, key, value, None)

    monkeypatch.setattr(PackedAttention, "__getitem__", one_document)
    assert not run_check("x", lambda: packing_isolation(subject(), CPU, torch.float32)).passed


def test_a_model_that_ignores_its_input_proves_no_isolation(
    subject: Callable[..., Subject], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Decoder, "hidden", lambda self, pack: torch.zeros(pack.tokens_T.numel(), 64))
    assert not run_check("x", lambda: packing_isolation(subject(), CPU, torch.float32)).passed


def test_a_wrong_merge_is_caught(subject: Callable[..., Subject], monkeypatch: pytest.MonkeyPatch) -> None:
    right = AdaptedLinear.merged_part
    monkeypatch.setattr(AdaptedLinear, "merged_part", lambda self, part: right(self, part) * 1.01)
    assert not run_check("x", lambda: merge_parity(subject(), CPU)).passed


def test_a_forgotten_optimiser_state_is_caught(
    subject: Callable[..., Subject], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tunesmith.train.states._restore_optimizer", lambda state, updater: None)
    assert not run_check("x", lambda: resume_equality(subject())).passed


def test_a_forgotten_generator_is_caught(subject: Callable[..., Subject], monkeypatch: pytest.MonkeyPatch) -> None:
    """With dropout the losses after a resume depend on torch's generator."""
    monkeypatch.setattr("tunesmith.train.randomness.restore", lambda *_: None)
    assert not run_check("x", lambda: resume_equality(subject(method={"dropout": 0.3}))).passed


def test_a_kernel_that_rounds_too_much_is_caught() -> None:
    inputs = (torch.randn(32, 32, generator=torch.Generator().manual_seed(0)),)
    exact = Case("x", lambda x: x.exp(), lambda x: x.exp(), inputs, "")
    assert run_check("x", lambda: compare(exact)).passed

    def coarse(x: Tensor) -> Tensor:
        return x.exp().bfloat16().to(x.dtype)

    assert not run_check("x", lambda: compare(Case("x", coarse, lambda x: x.exp(), inputs, ""))).passed

    class WrongGradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.exp()

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Tensor:
            return grads[0]

    wrong = Case("x", WrongGradient.apply, lambda x: x.exp(), inputs, "")
    assert not run_check("x", lambda: compare(wrong)).passed


def test_not_a_number_never_passes() -> None:
    assert not run_check("x", lambda: Outcome(float("nan"), 1.0, "")).passed
    assert not run_check("x", lambda: Outcome(None, None, "")).passed


def test_mask_of_real_rows(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    rows = [
        {"messages": [{"role": "user", "content": f"say {i}"}, {"role": "assistant", "content": str(i)}]}
        for i in range(5)
    ]
    path = tmp_path / "chat.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    good = recipe("lora", data={"train": [str(path)], "max_length": 256})
    found = run_check("mask", lambda: mask_shown(good, Path(good.model.path)))
    assert found.passed
    assert found.value is not None
    assert 0 < found.value < 0.5
    cut = recipe("lora", data={"train": [str(path)], "max_length": 8})
    with pytest.raises(DataError, match="none of 5 rows can be trained on"):
        mask_shown(cut, Path(cut.model.path))


@pytest.mark.parametrize("name", ["Qwen2.5-7B-Instruct", "Qwen3-30B-A3B", "gpt2-large", "Mistral-7B-Instruct-v0.2"])
def test_a_released_model_is_reduced(name: str, data_dir: Path) -> None:
    from tunesmith.arch import read_config

    config = read_config(data_dir / "model_configs" / name)
    small = reduced_config(config, 2_000_000)
    assert small.family == config.family
    assert small.head_dim == config.head_dim
    assert small.num_hidden_layers == 2
    assert (small.window(0) is None) == (config.window(0) is None)
    with torch.device("meta"):
        assert sum(p.numel() for p in Decoder(small).parameters()) <= 2_000_000
