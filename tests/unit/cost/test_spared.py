"""What spared blocks cost, beside two measured runs and the table of a recipe."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tunesmith.arch import read_config
from tunesmith.cost.memory import DTypeName
from tunesmith.cost.shards import Formats, Layout
from tunesmith.cost.spared import backward_peak, block_activations

ROOT = Path(__file__).resolve().parents[3]
CONFIG = read_config(ROOT / "recipes" / "configs" / "qwen2.5-7b")
TOKENS = 8192


def _peak(processes: int, dtype: DTypeName, spared: int) -> int:
    formats = Formats(dtype, dtype, "bfloat16")
    return backward_peak(CONFIG, Layout("zero3", processes), formats, tokens=TOKENS, spared=spared)


@pytest.mark.parametrize(("dtype", "folder"), [("bfloat16", "bf16"), ("float32", "fp32")])
def test_two_gpus_held_as_much(dtype: DTypeName, folder: str) -> None:
    cell = ROOT / "benchmarks" / "results" / f"scale-qwen2.5-7b-{folder}-h200x2-2026-11-22" / "cells" / "weak-2-0.json"
    measured = json.loads(cell.read_text(encoding="utf-8"))["summary"]["memory"]["allocated_peak_bytes"]
    assert _peak(2, dtype, 0) == pytest.approx(measured, rel=0.02)


def test_the_recipes_table_is_the_formulas() -> None:
    header = (ROOT / "recipes" / "scale-qwen2.5-7b.yaml").read_text(encoding="utf-8").partition("version:")[0]
    (spared,) = re.findall(r"#     spared +([\d ]+)\n", header)
    rows = re.findall(r"#     (\d) GPUs, (\w+) +([\d. ]+)\n", header)
    assert len(rows) == 4
    for processes, dtype, sizes in rows:
        found = [f"{_peak(int(processes), dtype, int(count)) / 1e9:.1f}" for count in spared.split()]
        assert sizes.split() == found, (processes, dtype)


def test_a_spared_block_keeps_gate_and_up() -> None:
    kept, more = block_activations(CONFIG, 1, Formats())
    assert (kept, more) == (2 * 15360, 2 * 37888)


def test_the_first_spared_blocks_take_room_that_gradients_need_later() -> None:
    assert _peak(2, "float32", 0) == _peak(2, "float32", 9) < _peak(2, "float32", 10)
    assert _peak(2, "bfloat16", 0) < _peak(2, "bfloat16", 1)
