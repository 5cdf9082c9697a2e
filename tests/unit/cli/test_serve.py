"""`tunesmith serve`: what a model is called that nobody named."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import typer

from tunesmith.checkpoint.inference import TRAINED
from tunesmith.cli.serve import default_names, serve
from tunesmith.errors import RequestError
from tunesmith.model.weight_formats import FORMAT_NAMES
from tunesmith.serve.options import EngineOptions


def test_a_run_answers_to_its_folder_and_to_what_was_typed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bug: only the path that was typed, with its folders, was the model's name."""
    (tmp_path / "runs" / "shop" / "final").mkdir(parents=True)
    (tmp_path / "runs" / "shop" / "run.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    assert default_names("runs/shop") == ["shop", "runs/shop"]
    assert default_names("runs/shop/final") == ["shop", "runs/shop/final"]
    monkeypatch.chdir(tmp_path / "runs")
    assert default_names("shop") == ["shop"]
    for other in ("builtin:tiny", "Qwen/Qwen3-0.6B", str(tmp_path)):
        assert default_names(other) == [other]


def test_the_attention_backend_is_one_of_those_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    served: list[EngineOptions] = []
    monkeypatch.setattr("tunesmith.cli.serve.run", lambda options, engine: served.append(engine))
    with pytest.raises(RequestError, match="--attention-backend must be auto or triton or flash-attn-3 or flashinfer"):
        serve("builtin:tiny", attention_backend="flash-attention-3")
    serve("builtin:tiny", attention_backend="flash-attn-3")
    assert served[0].attention_backend == "flash-attn-3"


@pytest.mark.parametrize("verb", ["serve", "chat"])
def test_weight_formats_go_by_either_name_and_all_are_listed(verb: str) -> None:
    """`chat` knew --quantize alone, `serve` --quantization, and chat's help had three of the formats."""
    command = typer.main.get_command(importlib.import_module(f"tunesmith.cli.{verb}").app)
    (option,) = (one for one in command.params if "--quantize" in one.opts)
    assert "--quantization" in option.opts
    shown = str(option.help)  # type: ignore[attr-defined]
    listed = {name.removesuffix("-sym") for name in (*FORMAT_NAMES, *TRAINED)} - {"fp8-inner"}
    assert all(name in shown or f"-{name.partition('-')[2]}" in shown for name in listed), listed
