"""The sweep of ways to quantise rows: what it asks Triton for, and what it says where there is no GPU."""

from __future__ import annotations

import importlib.util
import sys
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest
import torch

pytest.importorskip("triton")
ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fp8_rows", ROOT / "benchmarks" / "fp8_rows.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_without_a_gpu_it_says_so_in_a_line(
    bench: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench.main([]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.count("\n") == 1
    assert "needs a GPU" in shown.err


def test_the_rule_is_what_the_operator_launches(bench: ModuleType) -> None:
    """Taken down on the meta device, as the sweep's own launches are."""
    from tunesmith.kernels.fp8_triton import quantize_rows_operator
    from tunesmith.kernels.warm_up import recorded

    for width in bench.WIDTHS:
        for folded in (False, True):
            x, fold, codes, scale = bench.tensors(64, width, folded, "meta")
            rule = bench.rule(width)
            assert rule in bench.forms(width, folded)
            ours = recorded(partial(quantize_rows_operator, x, fold))
            theirs = recorded(partial(bench.launch, rule, x, fold, codes, scale))
            assert [launch.key for launch in ours] == [launch.key for launch in theirs]
            assert len(ours) == 1
