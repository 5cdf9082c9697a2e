"""The packs that training's attention kernels are measured on."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[3] / "benchmarks" / "packed_attention.py"


def test_every_pack_has_all_tokens_and_its_kind_of_lengths() -> None:
    spec = importlib.util.spec_from_file_location("packed_attention", SCRIPT)
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    sys.modules["packed_attention"] = script
    spec.loader.exec_module(script)
    found = script.packs(8192)
    assert all(sum(lengths) == 8192 and min(lengths) > 0 for lengths, _ in found.values())
    assert len(set(found["four of one length"][0])) == 1 and len(set(found["short, uneven"][0])) > 10
    assert found["long, uneven, window"][1] == script.WINDOW
    del sys.modules["packed_attention"]
