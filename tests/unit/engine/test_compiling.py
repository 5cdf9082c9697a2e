"""When an engine's kernels are compiled in the background, and that it can't hurt."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tunesmith.engine import compiling, llm
from tunesmith.engine.asked import Asked
from tunesmith.engine.compiling import start_ahead, start_compiling
from tunesmith.engine.llm import LLM
from tunesmith.kernels.compiling import Compiling

ASKED = Asked("builtin:tiny", dtype="bfloat16")
FAILS = "import sys; sys.exit('no such library')"


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[dict[str, Any]]]:
    """Requests to workers, each of which fails; there is a GPU as far as anybody asks, and an empty cache."""
    pytest.importorskip("triton")
    requests: list[dict[str, Any]] = []

    def start(module: str, request: dict[str, Any], marker: Path) -> Compiling:
        requests.append({**request, "module": module, "marker": marker})
        return Compiling(subprocess.Popen([sys.executable, "-c", FAILS], stdout=subprocess.PIPE, text=True))

    monkeypatch.setattr(compiling, "can_compile", lambda device: device != "cpu")
    monkeypatch.setattr(compiling, "start_worker", start)
    monkeypatch.setattr(compiling, "start_cuda", lambda device: None)
    monkeypatch.setattr(compiling, "_under_way", {})
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    yield requests


def test_nothing_is_started_for_a_cpu() -> None:
    assert start_ahead(Asked("builtin:tiny", device="cpu")) is None


def test_a_model_without_native_kernels_and_one_that_processes_share_start_none(started: list[dict[str, Any]]) -> None:
    assert start_compiling(Asked("builtin:tiny", backend="transformers")) is None
    assert start_compiling(Asked("builtin:tiny", tensor_parallel_size=2)) is None
    assert started == []


def test_what_is_under_way_is_not_started_again(started: list[dict[str, Any]]) -> None:
    first = start_ahead(ASKED)
    assert first is not None
    assert start_compiling(ASKED) is first
    assert start_compiling(Asked("builtin:tiny", quantize="fp8")) is not first
    assert [request["asked"]["quantize"] for request in started] == [None, "fp8"]


def test_nothing_is_started_where_all_is_compiled(started: list[dict[str, Any]]) -> None:
    start_compiling(ASKED)
    started[0]["marker"].touch()
    compiling._under_way.clear()
    assert start_compiling(ASKED) is None
    assert len(started) == 1


def test_a_model_that_was_written_anew_is_another(started: list[dict[str, Any]], tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for text in ("{}", '{"a": 1}'):
        (model / "config.json").write_text(text)
        (model / "config.json").touch()
        start_compiling(Asked(str(model)))
    assert len({request["marker"] for request in started}) == 2


def test_an_engine_goes_on_without_a_worker_that_fails(
    started: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The model is on the CPU; its worker is started all the same."""
    monkeypatch.setattr(compiling, "can_compile", lambda device: True)
    with caplog.at_level("DEBUG", logger="tunesmith.engine.loading"):
        found = LLM("builtin:tiny", device="cpu", max_model_len=32).generate([[5, 6, 7]], max_tokens=3, temperature=0.0)
    assert len(found[0].token_ids) == 3
    assert len(started) == 1
    assert sum("not compiled ahead, exit code 1" in record.message for record in caplog.records) == 1


def test_llm_asks_as_whoever_began_before_it(
    started: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, tiny_model_dir: Callable[..., Path]
) -> None:
    """As `tunesmith chat` does while torch is imported."""
    monkeypatch.setattr(compiling, "can_compile", lambda device: True)
    arguments: dict[str, Any] = {"model": tiny_model_dir("qwen2"), "device": "cpu", "max_num_seqs": 1}
    first = start_compiling(Asked.of(arguments))
    waited: list[Compiling | None] = []
    make = llm.make_runner
    monkeypatch.setattr(llm, "make_runner", lambda *a, **kw: waited.append(kw["compiling"]) or make(*a, **kw))
    LLM(**arguments)
    assert waited == [first]
