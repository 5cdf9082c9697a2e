"""Served = trained on tiny runs: what agrees passes, what was changed on the way is refused in a line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from tunesmith.checkpoint.adapter import save_adapter
from tunesmith.checkpoint.load import load_decoder
from tunesmith.checkpoint.save import save_decoder
from tunesmith.engine.llm import LLM
from tunesmith.engine.runner import NativeRunner
from tunesmith.errors import VerificationError
from tunesmith.model.decoder import Decoder
from tunesmith.model.head_copy import copy_head
from tunesmith.model.int8 import Int8Linear
from tunesmith.model.methods import apply_method
from tunesmith.recipe.schema import DataSection, MethodSection, ModelSection, Recipe
from tunesmith.rundir.layout import RunDir, create_run
from tunesmith.verify import served_reference
from tunesmith.verify.served import check_served, trained_reference

LORA = MethodSection(kind="lora", rank=4)
QLORA = MethodSection(kind="qlora", rank=4, double_quantisation=False)
ROWS = [
    {"messages": [
        {"role": "user", "content": f"第{n}个问题 😀?"}, {"role": "assistant", "content": f"Answer {n}."},
        {"role": "user", "content": "And?"}, {"role": "assistant", "content": " so on"},
    ]}
    for n in range(4)
]  # fmt: skip


@pytest.fixture(scope="module")
def base(tiny_model_dir: Callable[..., Path]) -> Path:
    return tiny_model_dir("qwen2", hidden_size=64, initializer_range=0.3)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    return file


def make_run(
    folder: Path, base: Path, rows: Path | str, method: MethodSection = LORA, change: float = 0.2, **data: Any
) -> RunDir:
    """A finished run: an adapter that does something, or with method full a whole model."""
    recipe = Recipe(
        output=str(folder), model=ModelSection(path=str(base)), method=method,
        data=DataSection.model_validate({"train": [str(rows)], **data}),
    )  # fmt: skip
    run = create_run(recipe)
    model = load_decoder(base, dtype=torch.float32, quantize="nf4" if method.kind == "qlora" else None)
    if method.kind == "full":
        save_decoder(model, run.final)
        return run
    apply_method(model, method, seed=0)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * change)
    save_adapter(model, run.final, base)
    return run


@pytest.mark.parametrize("method", [LORA, QLORA, MethodSection(kind="full")], ids=["lora", "qlora", "full"])
def test_a_run_is_served_as_it_was_trained(base: Path, rows: Path, tmp_path: Path, method: MethodSection) -> None:
    run = make_run(tmp_path, base, rows, method, system="Be brief.", template_arguments={"enable_thinking": False})
    reference = trained_reference(run.path, device="cpu")
    assert reference is not None
    report = check_served(LLM(run.path, device="cpu"), reference)
    assert report.prompts is not None and report.prompts.num_prompts == report.prompts.num_equal == 8
    names = [hop.name for hop in report.hops]
    assert names == ["merged in float32"] * (method.kind != "full") + [report.hops[-2].name, "engine"]
    assert all(hop.passed and hop.max_dlogprob < 1e-3 and hop.agreement_ratio > 0.98 for hop in report.hops)
    assert report.line().startswith("served = trained, in ") and "\n" not in report.line()
    written = json.loads((run.path / "served.json").read_text(encoding="utf-8"))
    assert written["passed"] and written["hops"][-1]["name"] == "engine" and written["prompts"]["num_equal"] == 8


def test_the_reference_is_computed_once(
    base: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path, base, rows)
    first = trained_reference(run.path, device="cpu")
    with monkeypatch.context() as patch:
        patch.setattr(served_reference, "load_model", None)
        again = trained_reference(run.final, device="cpu")
        beside = trained_reference(base, run.final, device="cpu")
    assert first is not None and again is not None and beside is not None
    assert all(torch.equal(a, b) for a, b in zip(first.summary, again.summary, strict=True))
    assert first.merged == again.merged
    (run.path / served_reference.REFERENCE_NAME).write_bytes(b"torn")
    repaired = trained_reference(run.path, device="cpu")
    assert repaired is not None and torch.equal(repaired.summary[2], first.summary[2])


@pytest.mark.parametrize("quantize", ["int8", "nf4"])
def test_another_form_shows_what_it_costs(base: Path, rows: Path, tmp_path: Path, quantize: str) -> None:
    run = make_run(tmp_path, base, rows)
    reference = trained_reference(run.path, device="cpu")
    assert reference is not None
    report = check_served(LLM(run.path, device="cpu", quantize=quantize), reference, refuse=False)
    merged, served, engine = report.hops
    assert merged.max_dlogprob < 1e-3 < served.max_dlogprob and served.kl_mean is not None and served.kl_mean > 1e-6
    verdict = f"served in {quantize}, near what was trained" if served.passed else f"served != trained, in {quantize}"
    assert engine.passed and report.line().startswith(f"{verdict}: on ")
    assert served.passed or quantize == "nf4"


def test_the_copy_of_a_head_is_compared_too(base: Path, rows: Path, tmp_path: Path) -> None:
    """What few requests are answered with: prompts, and so the engine's own hop, are the stored head's."""
    run = make_run(tmp_path, base, rows)
    reference = trained_reference(run.path, device="cpu")
    assert reference is not None
    llm = LLM(run.path, device="cpu")
    model, runner = cast(Decoder, llm.model), cast(NativeRunner, llm.runner)
    copy_head(model)
    runner.head_copy = model.head_copy
    report = check_served(llm, reference)
    names = [hop.name for hop in report.hops]
    assert names == ["merged in float32", "head in int8, up to 16 requests", "weights as served (float32)", "engine"]
    copied, weights, engine = report.hops[1:]
    assert 1e-5 < copied.max_dlogprob < 0.1 and weights.max_dlogprob < 1e-3 and engine.max_dlogprob < 1e-3
    assert "where few requests run: head in int8, up to 16 requests" in report.line()
    cast(Int8Linear, model.head_copy).codes.mul_(-1)
    with pytest.raises(VerificationError, match=r"head in int8, up to 16 requests: KL .* at most 0\.1"):
        check_served(llm, reference)


def test_a_model_that_is_another_is_refused(base: Path, rows: Path, tmp_path: Path) -> None:
    """The base without its adapter behind the run's name."""
    run = make_run(tmp_path, base, rows, change=1.0)
    reference = trained_reference(run.path, device="cpu")
    assert reference is not None
    llm = LLM(base, device="cpu")
    with pytest.raises(VerificationError, match=r"weights as served \(float32\): KL .* at most 0\.1"):
        check_served(llm, reference)
    report = check_served(llm, reference, refuse=False)
    assert report.problems() and report.line().startswith("served != trained")
    assert not json.loads((run.path / "served.json").read_text(encoding="utf-8"))["passed"]


def test_another_template_is_refused_with_the_first_difference(base: Path, rows: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path, base, rows)
    reference = trained_reference(run.path, device="cpu")
    assert reference is not None
    llm = LLM(run.path, device="cpu")
    assert llm.tokenizer is not None and llm.tokenizer.chat_template is not None
    changed = llm.tokenizer.chat_template.replace("assistant", "Assistant")
    llm.tokenizer = llm.tokenizer.with_chat_template(changed)
    with pytest.raises(VerificationError, match=r"prompts have other token ids .*row 1: token \d+: served as"):
        check_served(llm, reference)


def test_rows_that_are_gone_or_no_conversations_have_stand_ins(base: Path, rows: Path, tmp_path: Path) -> None:
    gone = trained_reference(make_run(tmp_path / "a", base, tmp_path / "gone.jsonl").path, device="cpu")
    assert gone is not None and gone.rows.origin == "built-in questions"
    text = trained_reference(make_run(tmp_path / "b", base, rows, format="text").path, device="cpu")
    assert text is not None and not text.rows.rows and len(text.documents) == 1
    held = trained_reference(make_run(tmp_path / "c", base, rows, validation=[str(rows)]).path, device="cpu")
    assert held is not None and held.rows.origin == "the run's validation rows"
    report = check_served(LLM(text.run.path, device="cpu"), text)
    assert report.prompts is None and report.problems() == []


def test_what_is_no_run_has_no_reference(base: Path) -> None:
    assert trained_reference(base) is None and trained_reference("builtin:tiny") is None
