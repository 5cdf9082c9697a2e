"""Equal work or not, and what rows pooled over rounds and runs say."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from tunesmith.bench.peers.table import markdown
from tunesmith.bench.peers.timing import CONTINUOUS, IDLE_TO_IDLE
from tunesmith.bench.peers.verdict import difference, pooled, summarise


def row(peer: str = "tunesmith", seconds: float = 1.0, **changes: Any) -> dict[str, Any]:
    steps = [{"seconds": s, "loss": 2.0 - i / 10, "grad_norm": 1.0} for i, s in enumerate([9.0, seconds, seconds * 2])]
    memory = {
        "allocated_peak_bytes": 2_000_000_000,
        "reserved_peak_bytes": 3_000_000_000,
        "resident_peak_bytes": 4_000_000_000,
        "all_steps_allocated_peak_bytes": 2_500_000_000,
        "all_steps_reserved_peak_bytes": 3_500_000_000,
    }
    base = {
        "peer": peer,
        "round": 0,
        "status": "ok",
        "reason": None,
        "steps": steps,
        "tokens": [100, 100, 100],
        "trained_tokens": [90, 90, 90],
        "trainable_parameters": 7,
        "digest": "d",
        "dtypes": {"trained": ["float32"], "optimizer": ["float32"], "frozen": ["bfloat16"]},
        "memory": memory,
        "versions": {"torch": "2"},
    }
    return {**base, **changes}


def record(rows: list[dict[str, Any]], commit: str = "c", timing: str = CONTINUOUS) -> dict[str, Any]:
    key = {"chip": "chip", "driver": None, "torch": "2", "commit": commit, "row": "r", "recipe_hash": "h"}
    key["timing"] = timing
    return {
        "key": key,
        "resolved": {"bench": {"warmup_steps": 1}, "method": {}, "train": {"precision": "bfloat16"}},
        "rows": rows,
        "started": "now",
    }


def with_step(index: int, **values: float | None) -> dict[str, Any]:
    changed = copy.deepcopy(row("peer"))
    changed["steps"][index].update(values)
    return changed


def test_the_same_work_is_equal() -> None:
    assert difference(row("peer"), row()) is None
    assert difference(with_step(0, loss=2.019, grad_norm=0.991), row()) is None


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        (row(digest="e"), "the token ids differ"),
        (row(tokens=[100, 100, 99]), "the tokens differ"),
        (row(trained_tokens=[90, 90, 91]), "the trained tokens differ"),
        (row(trainable_parameters=8), "the number of trained parameters differ"),
        (row(dtypes={**row()["dtypes"], "trained": ["bfloat16"]}), "trained dtype bfloat16 against float32"),
        (row(dtypes={**row()["dtypes"], "optimizer": ["uint8"]}), "optimizer dtype uint8 against float32"),
        (with_step(0, loss=2.03), "first loss 2.03 against 2"),
        (with_step(0, grad_norm=0.98), "first gradient norm 0.98 against 1"),
        (with_step(0, loss=None), "first loss not finite against 2"),
        (with_step(2, loss=2.0), "loss of step 3 2 against 1.8"),
    ],
)
def test_what_is_not_the_same_work_is_named(other: dict[str, Any], reason: str) -> None:
    assert difference(other, row()) == reason


def test_rates_are_over_the_timed_steps_of_all_rounds() -> None:
    rows = [row(seconds=1.0), row("peer", 2.0), row(seconds=0.5, round=1), row("peer", 4.0, round=1)]
    ours, peer = summarise(record(rows))
    assert ours["tokens_per_s"] == {"median": 100.0, "min": 50.0, "max": 200.0, "steps": 4, "rounds": [75.0, 150.0]}
    assert peer["tokens_per_s"]["median"] == 25.0
    assert peer["ours_is_times"] == 4.0
    assert peer["rounds"] == 2
    assert ours["first_step_s"] == 9.0
    assert ours["step_1"] == {"loss": 2.0, "grad_norm": 1.0}
    assert ours["step_10"] is None


def test_unequal_work_gets_no_ratio() -> None:
    rows = [row(), row("peer"), row("peer", round=1, digest="other")]
    peer = summarise(record(rows))[1]
    assert peer["verdict"] == "not equal work: the token ids differ"
    assert peer["ours_is_times"] is None


def test_fp8_is_said_beside_the_ratio() -> None:
    made = record([row(), row("peer")])
    made["resolved"] = {**made["resolved"], "method": {"base": "fp8"}}
    peer = summarise(made)[1]
    assert peer["verdict"] == "equal work but for our fp8 products; the peer's are in bfloat16"
    assert peer["ours_is_times"] == 1.0


def test_without_ours_nothing_is_proved() -> None:
    failed = {"peer": "tunesmith", "status": "out_of_memory", "reason": "no more", "steps": [], "round": 0}
    ours, peer = summarise(record([failed, row("peer")]))
    assert ours["verdict"] == "out of memory: no more; proves nothing"
    assert peer["verdict"] == "no row of ours beside it"


def test_runs_of_one_key_are_pooled_and_others_are_not() -> None:
    others = [record([row()], commit="other"), record([row()], timing=IDLE_TO_IDLE)]
    groups = pooled([record([row()]), record([row()]), *others])
    assert [(group["runs"], len(group["rows"])) for group in groups] == [(2, 2), (1, 1), (1, 1)]


def test_the_page_has_a_line_for_each() -> None:
    gone = {**row("gone"), "status": "missing", "reason": "a | b", "steps": []}
    made = record([row(), row("peer"), row("slow", waits="it waits"), gone])
    group = {**made, "what": "a row", "timing": made["key"]["timing"], "rows": summarise(made)}
    page = markdown([group])
    assert "| **tunesmith** | 75 (50 to 100) | - | 2.50 / 3.50 GB | 9.00 s | 2.0000, 1 | - | 1 | ours |" in page
    assert "| peer | 75 (50 to 100) | 1.00x |" in page
    assert "| equal work; it waits |" in page
    assert "missing: a / b; proves nothing |" in page
    assert "## r (timing: continuous)" in page
