"""`--lora-modules` and `--follow-lora`: mistakes are one line, told before anything is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tunesmith.cli.serve import serve
from tunesmith.errors import RequestError
from tunesmith.serve.options import EngineOptions, ServerOptions

Served = list[tuple[ServerOptions, EngineOptions]]


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Served:
    found: Served = []
    monkeypatch.setattr("tunesmith.cli.serve.run", lambda options, engine: found.append((options, engine)))
    return found


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text("{}")
    return tmp_path / "run"


def test_an_adapter_and_a_run_that_is_followed(served: Served, run: Path, tmp_path: Path) -> None:
    serve("builtin:tiny", lora_modules=[f"done={tmp_path}"], follow_lora=[f"live={run}"])
    ((options, engine),) = served
    assert options.adapters == (("done", str(tmp_path)),) and options.followed == (("live", str(run)),)
    assert engine.more["enable_lora"] is True


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"follow_lora": ["live"]}, "--follow-lora wants NAME=RUN, got 'live'"),
        ({"lora_modules": ["=x"]}, "--lora-modules wants NAME=DIRECTORY, got '=x'"),
        ({"follow_lora": ["live=nowhere"]}, "there is no directory nowhere"),
        ({"follow_lora": ["live=."]}, r"no run directory.*--lora-modules live=\."),
        ({"lora_modules": ["a=."], "follow_lora": ["a=run"]}, "a model called 'a' already"),
        ({"lora_modules": ["a=.", "a=run"]}, "a model called 'a' already"),
        ({"follow_lora": ["builtin:tiny=run"]}, "a model called 'builtin:tiny' already"),
    ],
)
def test_mistakes_are_told(
    given: dict[str, Any], match: str, served: Served, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RequestError, match=match):
        serve("builtin:tiny", **given)
    assert not served


@pytest.mark.parametrize(
    ("text", "match"), [('{"method": "ngram"', "must be JSON"), ("[4]", "must be a JSON object"), ("4", "JSON object")]
)
def test_a_speculation_that_is_no_object_is_refused(text: str, match: str, served: Served) -> None:
    with pytest.raises(RequestError, match=match) as told:
        serve("builtin:tiny", speculative_config=text)
    assert "\n" not in str(told.value) and not served
    serve("builtin:tiny", speculative_config='{"method": "ngram", "num_tokens": 4}')
    assert served[0][1].more == {"speculative": {"method": "ngram", "num_tokens": 4}}
