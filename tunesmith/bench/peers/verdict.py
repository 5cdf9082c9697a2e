"""What rows say together: medians over all timed steps, and whether two of them did the same work."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tunesmith.bench.peers.store import OURS

TOLERANCE_RATIO = 0.01
LATER_TOLERANCE_RATIO = 0.02  # ten updates in other orders of summation, in bfloat16
LATER_STEP = 10
EQUAL = "equal work"
Row = Mapping[str, Any]


def pooled(records: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Records of the same key as one, in the order in which the keys came; their rows one after the other."""
    groups: dict[tuple[tuple[str, Any], ...], dict[str, Any]] = {}
    for record in records:
        key = tuple(sorted(record["key"].items()))
        group = groups.setdefault(key, {**record, "runs": 0, "rows": []})
        group["runs"] += 1
        group["rows"] = [*group["rows"], *record["rows"]]
    return list(groups.values())


def summarise(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One summary for tunesmith and for each peer of a record (or of pooled ones), tunesmith first."""
    names = list(dict.fromkeys([OURS, *(row["peer"] for row in record["rows"])]))
    warmup = int(record["resolved"]["bench"]["warmup_steps"])
    groups = {name: [row for row in record["rows"] if row["peer"] == name] for name in names}
    ours = [row for row in groups[OURS] if row["status"] == "ok"]
    out = [_summary(name, rows, ours, warmup) for name, rows in groups.items() if rows]
    base = next((s["tokens_per_s"]["median"] for s in out if s["peer"] == OURS and s["tokens_per_s"]), None)
    for summary in out:
        rate = summary["tokens_per_s"]
        equal = summary["verdict"] == EQUAL
        summary["ours_is_times"] = base / rate["median"] if base and rate and equal else None
        if equal and uses_fp8(record["resolved"]["method"]):
            summary["verdict"] = f"{EQUAL} but for our fp8 products; the peer's are in {_precision(record)}"
    return out


def uses_fp8(method: Mapping[str, Any]) -> bool:
    """Whether our products of frozen weights are in fp8, which no peer has."""
    return method.get("base") == "fp8" or bool(method.get("fp8_compute"))


def _precision(record: Mapping[str, Any]) -> str:
    return str(record["resolved"]["train"]["precision"])


def _summary(name: str, rows: Sequence[Row], ours: Sequence[Row], warmup: int) -> dict[str, Any]:
    ok = [row for row in rows if row["status"] == "ok"]
    failed = [row for row in rows if row["status"] != "ok"]
    first = ok[0] if ok else None
    return {
        "peer": name,
        "rounds": len(ok),
        "failed_rounds": len(failed),
        "verdict": _verdict(name, ok, failed, ours),
        "tokens_per_s": _rates(ok, warmup),
        "allocated_peak_bytes": _highest(ok, "allocated_peak_bytes"),
        "reserved_peak_bytes": _highest(ok, "reserved_peak_bytes"),
        "resident_peak_bytes": _highest(ok, "resident_peak_bytes"),
        "all_steps_allocated_peak_bytes": _highest(ok, "all_steps_allocated_peak_bytes"),
        "all_steps_reserved_peak_bytes": _highest(ok, "all_steps_reserved_peak_bytes"),
        "first_step_s": statistics.median(row["steps"][0]["seconds"] for row in ok) if ok else None,
        "step_1": _step(first, 0),
        "step_10": _step(first, 9),
        "trainable_parameters": first and first.get("trainable_parameters"),
        "dtypes": first and {**first.get("dtypes", {}), "autocast": first.get("autocast")},
        "attention": first and first.get("attention"),
        "waits": first and first.get("waits"),
        "versions": first and first.get("versions"),
    }


def _rates(rows: Sequence[Row], warmup: int) -> dict[str, Any] | None:
    """Tokens a second over every timed step of every round: median, extremes, and each round's own median."""
    rounds = [_round_rates(row, warmup) for row in rows]
    every = [rate for rates in rounds for rate in rates]
    if not every:
        return None
    return {
        "median": statistics.median(every),
        "min": min(every),
        "max": max(every),
        "steps": len(every),
        "rounds": [statistics.median(rates) for rates in rounds if rates],
    }


def _round_rates(row: Row, warmup: int) -> list[float]:
    pairs = list(zip(row["tokens"], row["steps"], strict=True))[warmup:]
    return [tokens / step["seconds"] for tokens, step in pairs]


def _highest(rows: Sequence[Row], name: str) -> int | None:
    values = [row["memory"][name] for row in rows if row["memory"][name] is not None]
    return max(values, default=None)


def _step(row: Row | None, index: int) -> dict[str, Any] | None:
    if row is None or index >= len(row["steps"]):
        return None
    return {name: row["steps"][index][name] for name in ("loss", "grad_norm")}


def _verdict(name: str, ok: Sequence[Row], failed: Sequence[Row], ours: Sequence[Row]) -> str:
    """In a few words: what this row may be used for."""
    if not ok:
        return f"{failed[0]['status'].replace('_', ' ')}: {failed[0]['reason']}; proves nothing"
    if name == OURS:
        return "ours"
    if not ours:
        return "no row of ours beside it"
    found = next((d for row in ok if (d := difference(row, ours[0])) is not None), None)
    return EQUAL if found is None else f"not equal work: {found}"


def difference(row: Row, ours: Row) -> str | None:
    """The first thing in which a row's work differs from ours; None where it is the same work.

    The ids of the first step, the tokens and trained tokens of every step, the trained parameters and their dtypes must
    be the same; loss and gradient norm (before clipping) of the first step within 1 %, and the loss after ten steps (or
    as many as there are) within 2 %: a library that does not update would be quick.
    """
    for what, key in (
        ("the token ids", "digest"),
        ("the tokens", "tokens"),
        ("the trained tokens", "trained_tokens"),
        ("the number of trained parameters", "trainable_parameters"),
    ):
        if row[key] != ours[key]:
            return f"{what} differ"
    for what in ("trained", "optimizer"):
        mine, other = ours["dtypes"][what], row["dtypes"][what]
        if mine != other:
            return f"{what} dtype {', '.join(other)} against {', '.join(mine)}"
    for what, key in (("loss", "loss"), ("gradient norm", "grad_norm")):
        mine, other = ours["steps"][0][key], row["steps"][0][key]
        if _differ(mine, other, TOLERANCE_RATIO):
            return f"first {what} {_number(other)} against {_number(mine)}"
    later = min(LATER_STEP, len(ours["steps"]), len(row["steps"])) - 1
    mine, other = ours["steps"][later]["loss"], row["steps"][later]["loss"]
    if _differ(mine, other, LATER_TOLERANCE_RATIO):
        return f"loss of step {later + 1} {_number(other)} against {_number(mine)}"
    return None


def _differ(mine: float | None, other: float | None, tolerance_ratio: float) -> bool:
    return mine is None or other is None or abs(other - mine) > tolerance_ratio * abs(mine)


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.5g}"
