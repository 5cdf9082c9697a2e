"""fp8 beside the unquantised model, on one that has learnt: the first loss, training, and every station after it.

On a CPU the products are the reference's: the numbers of fp8 without its speed.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from tunesmith.checkpoint.adapter import adapter_tensors, read_adapter_tensors
from tunesmith.checkpoint.load import load_model
from tunesmith.cli import main
from tunesmith.compress.merge import merge_adapter, merge_to_directory
from tunesmith.engine.llm import LLM
from tunesmith.errors import DeviceError, ModelError, RecipeError
from tunesmith.model.fp8 import Fp8Linear
from tunesmith.model.language_model import LanguageModel, logits
from tunesmith.model.lora import AdaptedLinear
from tunesmith.recipe.load import recipe_from_mapping
from tunesmith.recipe.schema import Recipe
from tunesmith.rundir.io import read_jsonl
from tunesmith.train.run import train
from tunesmith.train.session import build_session

FP8_BASE = {"base": "fp8"}
NF4_IN_FP8 = {"kind": "qlora", "fp8_compute": True}
FULL_IN_FP8 = {"kind": "full", "fp8_compute": True}


def recipe(method: dict[str, Any], output: Path | None = None, **train: Any) -> Recipe:
    return recipe_from_mapping(
        {
            "output": str(output),
            "model": {"path": "builtin:tiny", "device": "cpu"},
            "method": {"rank": 4, **method},
            "data": {"train": ["builtin:shop"], "max_rows": 24, "max_length": 128, "workers": 0},
            "train": {"max_steps": 8, "micro_batch_tokens": 128, "learning_rate": 5e-3, **train},
            "log": {"trackers": []},
        }
    )


def losses(method: dict[str, Any], steps: int, **train: Any) -> list[float]:
    session = build_session(recipe(method, **train))
    found = [session.step().loss for _ in range(steps)]
    session.close()
    return found


@pytest.mark.parametrize(
    ("method", "plain"), [(FP8_BASE, {}), (NF4_IN_FP8, {"kind": "qlora"}), (FULL_IN_FP8, {"kind": "full"})]
)
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_first_loss_is_that_without_fp8(method: dict[str, Any], plain: dict[str, Any], precision: str) -> None:
    """Within 1 %: activations and weights carry 3 bits of mantissa."""
    mine, theirs = losses(method, 1, precision=precision)[0], losses(plain, 1, precision=precision)[0]
    assert mine != theirs
    assert mine == pytest.approx(theirs, rel=0.01)


@pytest.mark.parametrize("method", [FP8_BASE, NF4_IN_FP8, FULL_IN_FP8], ids=str)
def test_the_loss_falls(method: dict[str, Any]) -> None:
    found = losses(method, 8)
    assert sum(found[-2:]) < 0.8 * sum(found[:2])


def test_checkpointing_changes_nothing() -> None:
    assert losses(FP8_BASE, 3) == losses(FP8_BASE, 3, checkpointing="block")


def test_an_fp8_run_is_chatted_with_and_merged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe(FP8_BASE, tmp_path / "runs").to_yaml(), encoding="utf-8")
    assert main.run(["train", str(path), "--json"]) == 0
    run = Path(json.loads(capsys.readouterr().out.splitlines()[-1])["run_dir"])
    rows = [row["loss"] for row in read_jsonl(run / "metrics.jsonl") if "loss" in row]
    assert rows[-1] < rows[0]
    adapter = run / "final"
    assert read_adapter_tensors(adapter)[1].quantisation == "fp8-inner"
    llm = LLM(run, device="cpu")
    assert llm.source is not None and llm.source.quantize == "fp8-inner"
    assert llm.generate(["hello"], max_tokens=3)
    report = merge_to_directory(None, adapter, tmp_path / "merged", device="cpu")
    assert report.base_quantisation == "fp8-inner"
    trained = load_model("builtin:tiny", adapter=adapter, quantize="fp8-inner", dtype="float32", device="cpu")
    merged = load_model(tmp_path / "merged", dtype="float32", device="cpu")
    expected, found = logits(trained, [[5, 9, 80, 31, 7]])[0], logits(merged, [[5, 9, 80, 31, 7]])[0]
    assert (expected - found).abs().max() / expected.abs().max() < 0.02  # merged weights are stored in bfloat16


def test_a_full_run_in_fp8_is_resumed_and_ends_in_an_ordinary_checkpoint(tmp_path: Path) -> None:
    """What is saved are the masters: nothing in fp8 is left."""
    chosen = recipe(FULL_IN_FP8, tmp_path, max_steps=3, learning_rate=1e-4)
    first, second = build_session(chosen), build_session(chosen)
    first.step()
    second.restore(deepcopy(first.state()))
    expected = [first.step().loss for _ in range(2)]
    assert [second.step().loss for _ in range(2)] == expected
    first.close()
    second.close()
    result = train(chosen)
    names = {name for name, _ in cast(torch.nn.Module, load_model("builtin:tiny", device="cpu")).named_parameters()}
    saved: Any = load_model(result.run_dir / "final", dtype="bfloat16", device="cpu")
    assert {name for name, _ in saved.named_parameters()} == names
    trained = dict(first.module.named_parameters())
    assert all(torch.equal(value, trained[name].to(torch.bfloat16)) for name, value in saved.named_parameters())


def test_an_adapter_of_an_fp8_base_comes_back_bit_for_bit(tmp_path: Path) -> None:
    result = train(recipe(FP8_BASE, tmp_path, max_steps=2))
    model = load_model("builtin:tiny", adapter=result.run_dir / "final", quantize="fp8-inner", device="cpu")
    stored, _ = read_adapter_tensors(result.run_dir / "final")
    held = {name.removeprefix("base_model.model."): tensor for name, tensor in adapter_tensors(model).items()}
    assert held.keys() == stored.keys()
    assert all(torch.equal(held[name], stored[name]) for name in stored)


def test_a_gpu_without_fp8_is_refused_before_anything_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tunesmith.train.resolve.pick_device", lambda _: torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 6))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA RTX A6000")
    for method in (FP8_BASE, NF4_IN_FP8, FULL_IN_FP8):
        with pytest.raises(DeviceError, match=r"has no fp8 products.*method.kind=qlora") as caught:
            build_session(recipe(method))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("asked", ["auto", "all", "inner"])
def test_the_outer_blocks_stay_wide_unless_all_are_asked_for(asked: str, tmp_path: Path) -> None:
    """`builtin:tiny` is small: two wide blocks cost less than 64 MiB. The resolved recipe says what was decided."""
    session = build_session(recipe({**FP8_BASE, "fp8_blocks": asked}, tmp_path))
    blocks: Any = cast(Any, session.model).blocks
    held = [any(isinstance(child, Fp8Linear) for child in block.modules()) for block in blocks]
    session.close()
    assert session.recipe.method.fp8_blocks == ("all" if asked == "all" else "inner")
    assert held == ([True] * 6 if asked == "all" else [False, True, True, True, True, False])


def test_a_device_without_fp8_products_serves_an_fp8_base_from_its_weights() -> None:
    model: Any = load_model("builtin:tiny", quantize="fp8", device="cpu")
    linears = [child for child in model.modules() if isinstance(child, Fp8Linear)]
    assert len(linears) == 6 * 4
    assert {linear.compute for linear in linears} == {"weights"}


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ({"kind": "qlora", "base": "fp8"}, r"method.base 'fp8' goes with method.kind lora.*method.fp8_compute to true"),
        (
            {"kind": "full", "base": "fp8"},
            r"method.base 'fp8' goes with method.kind lora, not with full: set method.fp8_compute",
        ),
        (
            {"kind": "lora", "fp8_compute": True},
            r"method.fp8_compute goes with method.kind qlora or full.*method.base to fp8",
        ),
        ({"kind": "freeze", "trainable": ["head"], "fp8_compute": True}, "method.fp8_compute goes .* not with freeze"),
    ],
)
def test_contradictions_are_refused_with_the_key_to_use(method: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        recipe(method)


def test_an_nf4_checkpoint_is_no_fp8_base(tmp_path: Path) -> None:
    result = train(recipe({}, tmp_path, max_steps=1))
    merge_to_directory(None, result.run_dir / "final", tmp_path / "nf4", quantize="nf4", device="cpu", force=True)
    with pytest.raises(ModelError, match="is quantised to NF4 already"):
        load_model(tmp_path / "nf4", quantize="fp8", device="cpu")


@pytest.mark.parametrize("family", ["gpt2", "qwen2"])
def test_the_transformers_backend_holds_an_fp8_base_too(
    family: str, tiny_model_dir: Callable[..., Path], tmp_path: Path
) -> None:
    """Linears and Conv1D alike; those without an adapter are merged from fp8 as well."""
    path = str(tiny_model_dir(family))
    chosen = recipe({**FP8_BASE, "targets": ["c_attn" if family == "gpt2" else "q_proj"]}, tmp_path, max_steps=2)
    section = chosen.model.model_copy(update={"path": path, "backend": "transformers"})
    data = chosen.data.model_copy(update={"format": "tokens", "train": [], "max_length": 32})
    result = train(chosen.model_copy(update={"model": section, "data": data}))
    adapter = result.run_dir / "final"
    model = load_model(path, adapter, "fp8", dtype="float32", device="cpu", backend="transformers")
    assert any(isinstance(child, Fp8Linear) for child in cast(torch.nn.Module, model).modules())
    expected = logits(model, [[5, 9, 80, 31, 7]])[0]
    merged = cast(torch.nn.Module, merge_adapter(model))
    assert not any(isinstance(child, AdaptedLinear) for child in merged.modules())
    found = logits(cast(LanguageModel, merged), [[5, 9, 80, 31, 7]])[0]
    assert torch.allclose(expected, found, atol=1e-5)


def test_a_foreign_models_outer_blocks_stay_wide_too() -> None:
    model: Any = load_model("builtin:tiny", quantize="fp8-inner", backend="transformers", device="cpu")
    names = {name for name, child in model.named_modules() if isinstance(child, Fp8Linear)}
    assert {int(name.split("layers.")[1].split(".")[0]) for name in names} == {1, 2, 3, 4}
    assert len(names) == 4 * 7
