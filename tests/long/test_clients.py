"""Unmodified clients pass, each in its own locked environment (installed the first time, which takes minutes)."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
RESULTS = HERE.parents[1] / "build" / "test-long"


@pytest.mark.long
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("client", ["openai", "langchain", "litellm", "lm_eval", "guidellm", "vllm_bench"])
def test_client(client: str) -> None:
    out = RESULTS / f"client-{client}"
    command = [sys.executable, str(HERE / "client_matrix.py"), "--out", str(out), "--only", client]
    done = subprocess.run(command, capture_output=True, text=True, timeout=7000)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((out / "clients.json").read_text(encoding="utf-8"))
    assert result["passed"] and result["clients"][0]["checks"]
