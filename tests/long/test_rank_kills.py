"""Groups that lose a process to SIGKILL go on as if nothing had happened: two kills here, fifty in the campaign."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).resolve().parent
CAMPAIGN = HERE / "rank_kill_campaign.py"
RESULTS = HERE.parents[1] / "build" / "test-long"


def _campaign(kills: int, ranks: int, steps: int, out: Path, timeout_s: float) -> dict[str, Any]:
    command = [sys.executable, str(CAMPAIGN), "--kills", str(kills), "--ranks", str(ranks), "--out", str(out)]
    command += ["--steps", str(steps)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout_s)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(out.read_text(encoding="utf-8"))


def trained(recipe: str, run: str) -> None:
    """One rank of the run that is left alone."""
    from tunesmith.recipe.load import load_recipe
    from tunesmith.train.run import train

    train(load_recipe(recipe), run_dir=Path(run), quiet=True)


@pytest.mark.timeout(300)
def test_two_kills(ranks: Callable[..., list[Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At random steps, the second of a group that had resumed; the run to compare with is of ranks that are there."""
    monkeypatch.syspath_prepend(str(HERE))
    import rank_kill_campaign as campaign

    def undisturbed(recipe: Path, run: Path) -> None:
        ranks(trained, 2, str(recipe), str(run))

    moment = campaign.by_steps(random.Random(0), 6, 14)
    result = campaign.run_campaign(2, 2, 0, 60, tmp_path / "runs", undisturbed, moment)
    assert result.kills == 2
    assert result.restarts >= 2
    assert result.resumes_from_a_checkpoint >= 1
    assert result.losses_compared > 60
    assert result.mismatches == []


@pytest.mark.long
@pytest.mark.timeout(7200)
def test_fifty_kills() -> None:
    RESULTS.mkdir(parents=True, exist_ok=True)
    result = _campaign(50, 4, 400, RESULTS / "rank-kills.json", 7100)
    assert result["kills"] == 50
    assert result["resumes_from_a_checkpoint"] >= 25
    assert result["mismatches"] == []
