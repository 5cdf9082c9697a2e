"""Damaged training states are always found out: thirty times in `make test`, a thousand in `make test-long`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

CAMPAIGN = Path(__file__).with_name("corruption_campaign.py")
RESULTS = Path(__file__).resolve().parents[2] / "build" / "test-long"


def _campaign(corruptions: int, out: Path, timeout_s: float) -> dict[str, Any]:
    command = [sys.executable, str(CAMPAIGN), "--corruptions", str(corruptions), "--out", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout_s)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(out.read_text(encoding="utf-8"))


def _check(result: dict[str, Any], corruptions: int) -> None:
    assert result["corruptions"] == result["detected"] == result["states_compared"] == corruptions
    assert result["silent"] == []
    assert set(result["by_kind"]) == {"truncate", "flip", "zero", "delete", "swap", "swap_between_steps"}
    assert all(times >= corruptions // 6 for times in result["by_kind"].values())
    assert {"tensors", "state.json", "manifest.json"} == set(result["by_file"])


def test_thirty_corruptions(tmp_path: Path) -> None:
    _check(_campaign(30, tmp_path / "corruptions.json", 120), 30)


@pytest.mark.long
def test_a_thousand_corruptions() -> None:
    RESULTS.mkdir(parents=True, exist_ok=True)
    _check(_campaign(1000, RESULTS / "corruptions.json", 280), 1000)
