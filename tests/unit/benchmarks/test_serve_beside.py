"""The comparison over HTTP, as far as no peer is needed: the checkpoint, the commands, who goes first, the medians."""

from __future__ import annotations

import importlib.util
import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from tunesmith.checkpoint.load import load_model

SCRIPT = Path(__file__).resolve().parents[3] / "benchmarks" / "serve_beside.py"
TINY = Path(__file__).resolve().parents[3] / "tunesmith" / "models" / "tiny"


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("serve_beside", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["serve_beside"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["serve_beside"]


@pytest.fixture
def config(tmp_path: Path) -> Path:
    folder = tmp_path / "config"
    folder.mkdir()
    shutil.copy(TINY / "config.json", folder)
    return folder


def test_the_checkpoint_has_drawn_weights_and_the_tokenizer(script: ModuleType, config: Path, tmp_path: Path) -> None:
    script.write_checkpoint(config, TINY, tmp_path / "model", "cpu")
    assert (tmp_path / "model" / "tokenizer.json").read_bytes() == (TINY / "tokenizer.json").read_bytes()
    drawn, learnt = (load_model(path, device="cpu").get_parameter("norm.weight") for path in (tmp_path / "model", TINY))
    assert str(drawn.dtype) == "torch.bfloat16" and not drawn.equal(learnt)


def test_both_are_asked_for_the_same(script: ModuleType) -> None:
    asked = script.Asked(Path("m"), "fp8", 4096, ["--rate", "inf"], None, Path("packages"), "--a b", "--c 1")
    ours, peers = (asked.command(name, Path("out")) for name in ("tunesmith", "vllm"))
    for words in (ours, peers):
        assert words[words.index("--rate") + 1] == "inf" and words[-2:] == ["--output", "out"]
    served = shlex.split(ours[ours.index("--serve-args") + 1])
    assert served == ["--dtype", "bfloat16", "--max-model-len", "4096", "--quantization", "fp8", "--c", "1"]
    started = shlex.split(peers[peers.index("--start") + 1])
    assert started[:2] == ["env", "PYTHONPATH=packages"] and "{port}" in started
    assert started[-6:] == ["--max-model-len", "4096", "--quantization", "fp8", "--a", "b"]


def test_who_goes_first_alternates(script: ModuleType) -> None:
    assert [script.servers(True, number)[0] for number in range(3)] == ["tunesmith", "vllm", "tunesmith"]
    assert script.servers(False, 1) == ["tunesmith"]


def test_medians_are_over_rounds_and_failures_count_for_nothing(script: ModuleType) -> None:
    lines = [
        {"server": "tunesmith", "load": "rate-inf", "output_tokens_per_s": 30.0, "ttft_p50_s": 1.0, "ttft_p99_s": 2.0},
        {"server": "tunesmith", "load": "rate-inf", "output_tokens_per_s": 50.0, "ttft_p50_s": 3.0, "ttft_p99_s": 4.0},
        {"server": "vllm", "load": "rate-inf", "output_tokens_per_s": 20.0, "ttft_p50_s": 4.0, "ttft_p99_s": 6.0},
        {"server": "vllm", "status": "failed", "code": 1},
    ]
    found = script.medians(lines, "rate-inf")
    assert found["output_tokens_per_s"] == {"tunesmith": 40.0, "vllm": 20.0, "ratio": 2.0}
    assert found["ttft_p99_s"] == {"tunesmith": 3.0, "vllm": 6.0, "ratio": 0.5}
    failed = script.line_of({"name": "rate-inf", "status": "failed", "reason": "no answer"})
    assert failed == {"load": "rate-inf", "status": "failed", "reason": "no answer"}


def test_a_round_of_our_server(config: Path, tmp_path: Path) -> None:
    words = [sys.executable, str(SCRIPT), str(config), "--tokenizer", str(TINY), "--out", str(tmp_path / "out")]
    words += ["--num", "4", "--prompt-tokens", "8..16", "--output-tokens", "4..8", "--rounds", "1", "--device", "cpu"]
    done = subprocess.run(
        [*words, "--client-processes", "1", "--max-model-len", "256"], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    run, compared = map(json.loads, done.stdout.splitlines())
    assert run["server"] == "tunesmith" and run["completed"] == 4 and not run["errors"]
    assert compared["output_tokens_per_s"] == {"tunesmith": round(run["output_tokens_per_s"], 4)}


def test_answers_of_one_piece_have_no_time_per_token(script: ModuleType) -> None:
    measures = {"output_tokens_per_s": 74.26, "ttft_s": {"p50": 0.37714, "p99": 0.4}, "completed": 4, "errors": {}}
    cell = {"name": "rate-inf", "status": "ok", "target": {"start_s": 2.0}}
    line = script.line_of({**cell, "measures": {**measures, "tpot_s": {"p50": None, "p99": None}}})
    assert line["ttft_p50_s"] == 0.3771
    assert "tpot_p50_s" not in line
    assert line == script.line_of({**cell, "measures": {**measures, "tpot_s": None}})
