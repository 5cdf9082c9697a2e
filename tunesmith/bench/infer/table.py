"""One row for every engine and weight format out of the cells of a run: medians over samples and rounds.

measures   by name: requests, output_tokens_per_s, total_tokens_per_s; of batches also ttft_s and tpot_s; of
           prefill also prompt_tokens_per_s. Each a dict of median, min, max and count.
first_token_s   command typed to first token; start_s: the engine's own start; weights_bytes, memory peaks
ours_is    by name: ours over this row's, in the same format, as times: above 1 is ours better
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import Any

OURS = "tunesmith"
SCHEMA, VERSION = "tunesmith.bench.infer", 1
Cell = Mapping[str, Any]
SAME = {"w8a8": "int8"}
"""Formats that stand beside a peer's of another name."""


def key_of(environment: Mapping[str, Any], chip: str | None) -> dict[str, Any]:
    """What numbers that may be compared have in common: chip, driver, torch, commit."""
    git = environment.get("git")
    commit = None if git is None else str(git["commit"])[:12] + ("+changes" if git.get("dirty") else "")
    packages = environment.get("packages") or {}
    return {
        "chip": chip or "unknown",
        "driver": environment.get("driver"),
        "torch": packages.get("torch"),
        "commit": commit,
    }


def make_table(cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """The rows, in the order in which engines and formats first ran, ours first within a format."""
    groups: dict[tuple[str, str], list[Cell]] = {}
    for cell in cells:
        groups.setdefault((cell["format"], cell["engine"]), []).append(cell)
    formats = list(dict.fromkeys(name for name, _ in groups))
    order = sorted(groups, key=lambda key: (formats.index(key[0]), key[1] != OURS))
    rows = [_row(engine, name, groups[name, engine]) for name, engine in order]
    ours = {row["format"]: row for row in rows if row["engine"] == OURS}
    for row in rows:
        mine = ours.get(row["format"]) or ours.get(SAME.get(row["format"], ""))
        row["ours_is"] = {} if row["engine"] == OURS or mine is None else _ratios(mine, row)
    return rows


def _row(engine: str, name: str, cells: Sequence[Cell]) -> dict[str, Any]:
    done = [cell for cell in cells if cell["status"] == "ok"]
    failed = next((cell for cell in cells if cell["status"] != "ok"), None)
    return {
        "engine": engine,
        "format": name,
        "status": "ok" if done else failed["status"] if failed else "failed",
        "reason": failed["reason"] if failed else None,
        "rounds": len(done),
        "failed_rounds": len(cells) - len(done),
        "how": next((cell["facts"].get("how") for cell in done), None),
        "versions": next((cell["versions"] for cell in done), {}),
        "measures": _measures(done),
        "first_token_s": _spread(cell["first_token_s"] for cell in done),
        "start_s": _spread(cell["start_s"] for cell in done),
        "weights_bytes": _highest(cell["facts"].get("weights_bytes") for cell in done),
        "device_peak_bytes": _highest(cell["facts"].get("device_peak_bytes") for cell in done),
        "device_used_peak_bytes": _highest(cell["device_used_peak_bytes"] for cell in done),
        "resident_peak_bytes": _highest(cell["resident_peak_bytes"] for cell in done),
        "short": sum(sample["short"] for cell in done for sample in cell["samples"]),
    }


def _measures(cells: Sequence[Cell]) -> dict[str, Any]:
    samples: dict[str, list[dict[str, float]]] = {}
    for cell in cells:
        for sample in cell["samples"]:
            samples.setdefault(sample["measure"], []).append(_rates(sample))
    return {
        name: {key: _spread(one[key] for one in taken if key in one) for key in dict.fromkeys(chain(*taken))}
        for name, taken in samples.items()
    }


def _rates(sample: Mapping[str, Any]) -> dict[str, float]:
    """What one sample says, in base units."""
    whole_s, output, prompt = sample["whole_s"], sample["output_tokens"], sample["prompt_tokens"]
    rates = {
        "requests": float(sample["requests"]),
        "output_tokens_per_s": output / whole_s,
        "total_tokens_per_s": (output + prompt) / whole_s,
        "prompt_tokens_per_s": prompt / whole_s,
    }
    each = output / sample["requests"]
    if "first_s" in sample and each > 1:
        rates["ttft_s"] = sample["first_s"]
        if whole_s > sample["first_s"]:  # else one of them was disturbed, and their difference says nothing
            rates["tpot_s"] = (whole_s - sample["first_s"]) / (each - 1)
    return rates


def _spread(values: Iterable[float | None]) -> dict[str, float] | None:
    known = [value for value in values if value is not None]
    if not known:
        return None
    return {"median": statistics.median(known), "min": min(known), "max": max(known), "count": len(known)}


def _highest(values: Iterable[int | None]) -> int | None:
    return max((value for value in values if value is not None), default=None)


def _ratios(ours: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, float]:
    """How many times better ours is: rates over theirs, times under theirs."""
    found = {}
    for name, values in ours["measures"].items():
        theirs = other["measures"].get(name)
        if theirs is None:
            continue
        for key, is_time in (
            ("output_tokens_per_s", False),
            ("prompt_tokens_per_s", False),
            ("ttft_s", True),
            ("tpot_s", True),
        ):
            mine, its = values.get(key), theirs.get(key)
            if mine and its and mine["median"] and its["median"]:
                ratio = its["median"] / mine["median"] if is_time else mine["median"] / its["median"]
                found[f"{name}.{key}"] = ratio
    mine, its = ours["first_token_s"], other["first_token_s"]
    if mine and its:
        found["first_token_s"] = its["median"] / mine["median"]
    return found
