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
}
MARKS = {"LoRA": "o", "LoRA + checkpointing": "s", "QLoRA": "^", "QLoRA + checkpointing": "D"}


def ours() -> list[dict[str, Any]]:
    """One row per cell of the 7B matrix."""
    rows = []
    for path in sorted((RESULTS / "matrix-qwen2.5-7b-h200-2026-11-22" / "cells").glob("*.json")):
        cell = json.loads(path.read_text(encoding="utf-8"))
        if cell["label"] in MARKS:
            speed, peak = cell["throughput"]["tokens_per_s"], cell["memory"]["allocated_peak_bytes"]
            rows.append(
                {"peer": "tunesmith", "cell": cell["label"], "tokens_per_s": speed, "allocated_peak_bytes": peak}
            )
    return rows


SIDE_BY_SIDE = {
    "7b-lora": "LoRA",
    "7b-lora-gc": "LoRA + checkpointing",
    "7b-qlora": "QLoRA",
    "7b-qlora-gc": "QLoRA + checkpointing",
}
NAMES = {
    "tunesmith": "tunesmith",
    "transformers": "transformers + PEFT",
    "liger": "transformers + PEFT + Liger",
    "unsloth": "Unsloth 2026.10.7",
}


def side_by_side() -> list[dict[str, Any]]:
    """The rows of ours and of other projects that ran in turn; where a row ran more than once, the newest run's."""
    groups = json.loads((RESULTS / "peers" / "peers.json").read_text(encoding="utf-8"))["groups"]
    newest = {group["key"]["row"]: group for group in groups if group["key"]["row"] in SIDE_BY_SIDE}
    return [
        {
            "peer": NAMES[row["peer"]],
            "cell": SIDE_BY_SIDE[name],
            "tokens_per_s": row["tokens_per_s"]["median"],
            "allocated_peak_bytes": row["all_steps_allocated_peak_bytes"],
        }
        for name, group in newest.items()
        for row in group["rows"]
        if row["peer"] in NAMES and row["tokens_per_s"] is not None
    ]


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
    axes.set(xlim=(0, 125), ylim=(0, 20))
    axes.grid(color="#e6e6e6", zorder=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(ncols=2, frameon=False, fontsize=8.5, loc="lower right")
    figure.tight_layout()
    figure.savefig(ROOT / "docs" / "images" / "memory-speed.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
