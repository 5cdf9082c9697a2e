"""Groups that lose a process to SIGKILL go on as if nothing had happened: two kills here, fifty in the campaign."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

CAMPAIGN = Path(__file__).with_name("rank_kill_campaign.py")
RESULTS = Path(__file__).resolve().parents[2] / "build" / "test-long"


def _campaign(kills: int, ranks: int, steps: int, out: Path, timeout_s: float) -> dict[str, Any]:
    command = [sys.executable, str(CAMPAIGN), "--kills", str(kills), "--ranks", str(ranks), "--out", str(out)]
    command += ["--steps", str(steps)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout_s)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(out.read_text(encoding="utf-8"))


@pytest.mark.timeout(300)
def test_two_kills(tmp_path: Path) -> None:
    result = _campaign(2, 2, 100, tmp_path / "kills.json", 280)
    assert result["kills"] == 2
    assert result["restarts"] >= 2
    assert result["mismatches"] == []


@pytest.mark.long
@pytest.mark.timeout(7200)
def test_fifty_kills() -> None:
    RESULTS.mkdir(parents=True, exist_ok=True)
    result = _campaign(50, 4, 400, RESULTS / "rank-kills.json", 7100)
    assert result["kills"] == 50
    assert result["resumes_from_a_checkpoint"] >= 25
    assert result["mismatches"] == []
