"""Clients that leave, and ten times the load: nothing leaks, refusals are quick, the work goes on."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).resolve().parent
RESULTS = HERE.parents[1] / "build" / "test-long"


def _campaign(name: str, *arguments: str) -> dict[str, Any]:
    out = RESULTS / name
    command = [sys.executable, str(HERE / f"{name}_campaign.py"), *arguments, "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=3500)
    assert done.returncode == 0, done.stdout + done.stderr
    (file,) = out.glob("*.json")
    return dict(json.loads(file.read_text(encoding="utf-8")))


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_a_thousand_disconnects() -> None:
    result = _campaign("disconnect", "--disconnects", "1000")
    assert result["disconnects"] == 1000 and result["pages_leaked"] == 0 and result["passed"]


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_ten_times_the_load() -> None:
    result = _campaign("overload", "--seconds", "60")
    assert all(result["checks"].values()) and result["rejected"] > 0
