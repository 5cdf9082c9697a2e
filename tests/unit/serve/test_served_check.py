"""`tunesmith serve RUN`: what is loaded is compared with what was trained, shown, and refused where it is broken."""

from __future__ import annotations

import gc
import json
import weakref
from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import Any

import pytest
import torch

from tunesmith.checkpoint.load import load_decoder
from tunesmith.checkpoint.save import save_decoder
from tunesmith.engine.grammar_compile import RequestGrammars
from tunesmith.engine.llm import LLM
from tunesmith.engine.request import StructuredSpec
from tunesmith.errors import VerificationError
from tunesmith.recipe.schema import DataSection, MethodSection, ModelSection, Recipe
from tunesmith.rundir.layout import RunDir, create_run
from tunesmith.serve import loading
from tunesmith.serve.loading import load_model
from tunesmith.serve.options import EngineOptions
from tunesmith.text.tokenizer import load_tokenizer
from tunesmith.verify import served_reference


@pytest.fixture
def run(tiny_model_dir: Callable[..., Path], tmp_path: Path) -> RunDir:
    """A whole model that a run brought out."""
    base = tiny_model_dir("qwen2", initializer_range=0.3)
    row = {"messages": [{"role": "user", "content": "你好 😀"}, {"role": "assistant", "content": "Hi"}]}
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(row) + "\n", encoding="utf-8")
    data = DataSection.model_validate({"train": [str(file)], "system": "Be brief."})
    recipe = Recipe(
        output=str(tmp_path), model=ModelSection(path=str(base)), method=MethodSection(kind="full"), data=data
    )
    made = create_run(recipe)
    save_decoder(load_decoder(base, dtype=torch.float32), made.final)
    load_tokenizer(base).save(made.final)
    return made


def load(run: RunDir, **options: str) -> dict[str, object]:
    engine = EngineOptions(model=str(run.path), device="cpu", max_model_len=256, **options)  # type: ignore[arg-type]
    return load_model(engine, lambda _: None).facts


def test_a_run_says_in_one_line_that_it_is_served_as_trained(run: RunDir) -> None:
    facts = load(run)
    line = str(facts["served"])
    assert line.startswith("served = trained, in float32: on ") and "1 of 1 prompts the same ids" in line
    assert "the best next token is the same for 100.0%" in line
    assert json.loads((run.path / "served.json").read_text(encoding="utf-8"))["passed"]
    assert "served" not in load(run, served_check="off")


def test_the_trained_form_is_gone_before_the_served_one_is_loaded(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both at once would take the memory of two models; later starts load the trained form no more."""
    made: list[weakref.ref[Any]] = []
    alive: list[int] = []

    def load_trained(*args: Any, **options: Any) -> Any:
        model = load_trained_model(*args, **options)
        made.append(weakref.ref(model))
        return model

    @wraps(LLM)
    def load_served(*args: Any, **options: Any) -> LLM:
        alive.append(sum(ref() is not None for ref in made))
        return LLM(*args, **options)

    load_trained_model = served_reference.load_model
    monkeypatch.setattr(served_reference, "load_model", load_trained)
    monkeypatch.setattr(loading, "LLM", load_served)
    gc.disable()  # not by luck
    try:
        first, second = load(run), load(run)
    finally:
        gc.enable()
    assert len(made) == 1 and alive == [0, 0]
    assert "checked in" in str(first["served"]) and "checked in" in str(second["served"])


def test_another_template_is_refused_reported_or_not_looked_at(run: RunDir, tmp_path: Path) -> None:
    template = tmp_path / "other.jinja"
    template.write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", encoding="utf-8")
    with pytest.raises(VerificationError, match=r"1 of 1 prompts have other token ids .* --served-check report"):
        load(run, chat_template=str(template))
    facts = load(run, chat_template=str(template), served_check="report")
    assert str(facts["served"]).startswith("served != trained")
    assert "served" not in load(run, chat_template=str(template), served_check="off")


def test_the_check_leaves_no_trace_in_the_engine(run: RunDir) -> None:
    model = load_model(EngineOptions(model=str(run.path), device="cpu", max_model_len=256), lambda _: None)
    stats = model.engine.stats()
    assert isinstance(grammars := model.llm.engine.grammars, RequestGrammars)
    assert StructuredSpec("json_object") in grammars.compiler._cache  # what grammars need is got ready before a request
    assert stats.prompt_tokens == stats.num_finished == stats.pages_used == 0


@pytest.mark.long
@pytest.mark.parametrize("quantization", [None, "w8a8"])
def test_a_model_that_processes_share_is_compared_by_all_of_them(run: RunDir, quantization: str | None) -> None:
    """It used to be compared through the engine alone; and to give no embeddings."""
    options = EngineOptions(model=str(run.path), device="cpu", max_model_len=256, quantization=quantization)
    vectors, lines = [], []
    for size in (1, 2):
        model = load_model(replace(options, tensor_parallel_size=size), lambda _: None)
        try:
            vectors.append(torch.frombuffer(bytearray(next(model.embed([[5, 6, 7]], "mean"))[0]), dtype=torch.float32))
            lines.append(str(model.facts["served"]))
        finally:
            model.close()
    for line in lines:
        assert line.startswith(f"served in {quantization}, near" if quantization else "served = trained, in float32")
    assert torch.allclose(*vectors, atol=1e-3 if quantization else 1e-5)
