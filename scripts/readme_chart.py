"""Draws the README's chart of memory against speed from the committed JSON: python scripts/readme_chart.py"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
COLOURS = {
    "tunesmith": "#0b6fb8",
    "transformers + PEFT": "#8a8f98",
    "transformers + PEFT + Liger": "#c2540a",
    "Unsloth 2026.10.7": "#2f8f5b",
    "TRL 1.15 + PEFT + Liger": "#8e5bb5",
}
MARKS = {"LoRA": "o", "LoRA + checkpointing": "s", "QLoRA": "^", "QLoRA + checkpointing": "D"}


def ours() -> list[dict[str, Any]]:
    """One row per cell of the 7B matrix; those without checkpointing as they ran beside peers, where they did."""
    rows = []
    for path in sorted((RESULTS / "matrix-qwen2.5-7b-h200-2026-11-22" / "cells").glob("*.json")):
        cell = json.loads(path.read_text(encoding="utf-8"))
        if cell["label"] in MARKS:
            speed, peak = cell["throughput"]["tokens_per_s"], cell["memory"]["allocated_peak_bytes"]
            rows.append(
                {"peer": "tunesmith", "cell": cell["label"], "tokens_per_s": speed, "allocated_peak_bytes": peak}
            )
    beside = {row["cell"]: row for row in side_by_side() if row["peer"] == "tunesmith"}
    return [beside.get(row["cell"], row) if row["cell"] in WITHOUT_CHECKPOINTING else row for row in rows]


SIDE_BY_SIDE = {
    "7b-lora": "LoRA",
    "7b-lora-gc": "LoRA + checkpointing",
    "7b-qlora": "QLoRA",
    "7b-qlora-gc": "QLoRA + checkpointing",
}
WITHOUT_CHECKPOINTING = ("LoRA", "QLoRA")
NAMES = {
    "tunesmith": "tunesmith",
    "transformers": "transformers + PEFT",
    "bitsandbytes": "transformers + PEFT",
    "liger": "transformers + PEFT + Liger",
    "unsloth": "Unsloth 2026.10.7",
    "trl": "TRL 1.15 + PEFT + Liger",
}


def side_by_side() -> list[dict[str, Any]]:
    """The rows of ours and of other projects that ran in turn; of each the newest run that it was in."""
    groups = json.loads((RESULTS / "peers" / "peers.json").read_text(encoding="utf-8"))["groups"]
    newest: dict[tuple[str, str], dict[str, Any]] = {}
    for group in sorted(groups, key=lambda group: group["last_started"]):
        cell = SIDE_BY_SIDE.get(group["key"]["row"])
        for row in group["rows"]:
            if cell is None or row["peer"] not in NAMES or row["tokens_per_s"] is None:
                continue
            peer, peak = NAMES[row["peer"]], row["all_steps_allocated_peak_bytes"]
            speed = row["tokens_per_s"]["median"]
            newest[peer, cell] = {"peer": peer, "cell": cell, "tokens_per_s": speed, "allocated_peak_bytes": peak}
    return list(newest.values())


def peers() -> list[dict[str, Any]]:
    """The rows measured of other projects: beside ours where that was done, else in a session of their own."""
    path = RESULTS / "peers-h200-2026-11-22" / "peers.json"
    apart = json.loads(path.read_text(encoding="utf-8"))["rows"]
    rows = {(row["peer"], row["cell"]): row for row in apart if row["cell"] in MARKS}
    beside = {(row["peer"], row["cell"]): row for row in side_by_side() if row["peer"] != "tunesmith"}
    return list((rows | beside).values())


def ours_with_spared_blocks() -> list[dict[str, Any]]:
    """Our row beside peers with checkpointing: selective, ten blocks spared, which the matrix has no cell of."""
    return [row for row in side_by_side() if (row["peer"], row["cell"]) == ("tunesmith", "LoRA + checkpointing")]


def main() -> None:
    """Write docs/images/memory-speed.svg."""
    plt.rcParams.update({"svg.fonttype": "none", "font.family": "sans-serif", "svg.hashsalt": "tunesmith"})
    figure, axes = plt.subplots(figsize=(8.2, 4.6))
    for row in (*peers(), *ours(), *ours_with_spared_blocks()):
        strong = row["peer"] == "tunesmith"
        axes.scatter(
            row["allocated_peak_bytes"] / 1e9,
            row["tokens_per_s"] / 1e3,
            color=COLOURS[row["peer"]],
            marker=MARKS[row["cell"]],
            s=95 if strong else 60,
            zorder=3 if strong else 2,
            edgecolor="white",
        )
    for row in ours_with_spared_blocks():
        at = (row["allocated_peak_bytes"] / 1e9, row["tokens_per_s"] / 1e3)
        axes.annotate("selective, ten blocks spared", at, (-8, -3), textcoords="offset points", ha="right", fontsize=7)
    for name, colour in COLOURS.items():
        axes.scatter([], [], color=colour, marker="o", label=name)
    for cell, mark in MARKS.items():
        axes.scatter([], [], color="#444444", marker=mark, label=cell, facecolor="none")
    axes.set(xlabel="peak allocated memory, GB (left is better)", ylabel="thousand tokens/s (up is better)")
    axes.set_title("Qwen2.5-7B shape, 4 x 2048 tokens, one H200, random weights", loc="left", fontsize=11)
    axes.set(xlim=(0, 95), ylim=(0, 20))
    axes.grid(color="#e6e6e6", zorder=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(ncols=2, frameon=False, fontsize=8.5, loc="lower right")
    figure.tight_layout()
    figure.savefig(ROOT / "docs" / "images" / "memory-speed.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
