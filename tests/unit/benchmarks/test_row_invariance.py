"""The check of batch-invariant operators: it sees rows that depend on their number, and runs on a CPU."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    spec = importlib.util.spec_from_file_location("row_invariance", ROOT / "benchmarks" / "row_invariance.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_rows_that_depend_on_their_number_are_seen(bench: ModuleType) -> None:
    x = torch.randn(20, 4, generator=torch.Generator().manual_seed(0))
    assert bench.differing(torch.tanh, x) == []
    assert bench.differing(lambda x: x - x.mean(), x)[:2] == ["1 rows from 0 on", "1 rows from 19 on"]


def test_every_operator_has_a_line(bench: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--formats", "int8", "--rows", "10", "--device", "cpu", "--dtype", "float32"]
    assert bench.main([str(ROOT / "tunesmith" / "models" / "tiny"), *words]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    named = {(line["format"], line["operator"]) for line in lines[:-1]}
    stream = ("rms_norm", "add_rms_norm", "heads_to_pages", "swiglu", "qkv", "down", "logits", "logprobs_M", "draws")
    assert named >= {("float32", name) for name in stream} | {("int8", "down")}
    assert lines[-1]["wrong"] == 0
