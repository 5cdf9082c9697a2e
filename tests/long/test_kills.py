"""Runs that are killed go on as if nothing had happened: five kills in `make test`, two hundred in `make test-long`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

CAMPAIGN = Path(__file__).with_name("kill_campaign.py")
RESULTS = Path(__file__).resolve().parents[2] / "build" / "test-long"


def _campaign(kills: int, out: Path, timeout_s: float) -> dict[str, Any]:
    command = [sys.executable, str(CAMPAIGN), "--kills", str(kills), "--out", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout_s)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(out.read_text(encoding="utf-8"))


def test_five_kills(tmp_path: Path) -> None:
    result = _campaign(5, tmp_path / "kills.json", 120)
    assert result["kills"] == 5
    assert result["inside_a_save"] >= 1
    assert result["resumes_from_a_checkpoint"] >= 1
    assert result["mismatches"] == []


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_two_hundred_kills() -> None:
    RESULTS.mkdir(parents=True, exist_ok=True)
    result = _campaign(200, RESULTS / "kills.json", 3500)
    assert result["kills"] == 200
    assert result["inside_a_save"] >= 50
    assert result["resumes_from_a_checkpoint"] >= 100
    assert result["mismatches"] == []
