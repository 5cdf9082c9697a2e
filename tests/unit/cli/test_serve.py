"""`tunesmith serve`: what a model is called that nobody named."""

from __future__ import annotations

from pathlib import Path

import pytest

from tunesmith.cli.serve import default_names, serve
from tunesmith.errors import RequestError
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
