"""Training spread over ranks has the losses of one process: three ways here, all of them in the campaign."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).resolve().parent
CAMPAIGN = HERE / "equality_campaign.py"
RESULTS = HERE.parents[1] / "build" / "test-long"


def test_lora_under_what_other_tests_leave_out(
    ranks: Callable[..., list[Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twenty steps each: ZeRO-1 and -2 of adapters, and a pipeline beside another."""
    monkeypatch.syspath_prepend(str(HERE))
    import equality_campaign as campaign

    chosen = [
        campaign.Case("lora", 2, "zero2"),
        campaign.Case("lora", 2, "zero1"),
        campaign.Case("lora", 4, "ddp", pipeline=2),
    ]
    assert set(chosen) <= set(campaign.cases())
    results: list[dict[str, Any]] = []
    campaign.run_campaign(ranks, campaign.save_model(tmp_path), chosen, {}, results.append)
    assert [result["name"] for result in results if not result["is_equal"]] == []


def test_the_campaign_has_every_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(HERE))
    import equality_campaign as campaign

    names = [case.name for case in campaign.cases()]
    assert len(set(names)) == len(names)
    wanted = ["dp4-zero2", "tp4", "pp4", "dp2-tp2-zero3", "tp2-pp2", "dp2-tp2-pp2-ddp", "deepspeed-dp4-zero1-cpu"]
    assert {f"{kind}-{way}" for kind in ("full", "lora", "qlora") for way in wanted} <= set(names)


@pytest.mark.long
@pytest.mark.timeout(7200)
def test_every_way_has_the_losses_of_one_process() -> None:
    RESULTS.mkdir(parents=True, exist_ok=True)
    out = RESULTS / "equality.json"
    out.unlink(missing_ok=True)
    command = [sys.executable, str(CAMPAIGN), "--out", str(out)]
    done = subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=7100
    )
    result = json.loads(out.read_text(encoding="utf-8"))
    assert [case for case in result["cases"] if not case["is_equal"]] == [], done.stderr[-2000:]
    assert result["counts"]["cases"] >= 99
