"""What an engine is asked for, as plain data: from LLM's arguments whatever their types."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from dataclasses import asdict, fields
from pathlib import Path

import torch

from tunesmith.engine.asked import Asked
from tunesmith.engine.llm import LLM
from tunesmith.serve.options import EngineOptions


def test_arguments_of_any_type_become_plain() -> None:
    asked = Asked.of({"model": Path("m"), "dtype": torch.bfloat16, "device": torch.device("cuda", 1), "tokenizer": 3})
    assert asked == Asked("m", dtype="bfloat16", device="cuda:1")
    assert Asked(**json.loads(json.dumps(asdict(asked)))) == asked


def test_names_and_defaults_are_llms() -> None:
    known = inspect.signature(LLM).parameters
    own = {field.name: field.default for field in fields(Asked) if field.name not in ("model", "weights")}
    assert {name: known[name].default for name in own} == own


def test_a_server_asks_as_its_llm_does() -> None:
    """Else its engine would start a second worker for the same kernels."""
    options = EngineOptions("m", quantization="fp8", max_num_seqs=8, more={"revision": "r"})
    assert options.kernels() == Asked("m", quantize="fp8", max_num_seqs=8, revision="r")


def test_nothing_that_takes_long_is_imported() -> None:
    code = (
        "import sys, tunesmith.engine.compiling, tunesmith.serve.worker, tunesmith.bench.infer.ours\n"
        "print(sorted({'torch', 'numpy', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
