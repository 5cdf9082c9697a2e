"""What torch's flight recorder holds, written out; tests/e2e/test_launch.py has a real hang."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from torch._C import _distributed_c10d as native

from tunesmith.parallel.flight import SIZE, write_flight


def _broken() -> bytes:
    raise RuntimeError("no recorder")


@pytest.mark.parametrize("size", ["", "0"])
def test_nothing_is_written_where_nothing_is_kept(size: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SIZE, size)
    monkeypatch.setattr(native, "_dump_fr_trace_json", lambda: b'{"entries": [{}]}', raising=False)
    assert write_flight(tmp_path, 3) == []
    assert list(tmp_path.iterdir()) == []


def test_each_recorder_has_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a CUDA build, whose hosts talk through gloo; one that fails, or holds nothing, leaves no file."""
    entries = [{"profiling_name": "gloo:all_reduce"}]
    monkeypatch.setenv(SIZE, "2000")
    monkeypatch.setattr(native, "_dump_fr_trace_json", lambda: json.dumps({"entries": entries}).encode(), raising=False)
    monkeypatch.setattr(native, "_dump_nccl_trace_json", lambda: b'{"entries": [1]}', raising=False)
    names = ["flight-rank-3.json", "flight-nccl-rank-3.json"]
    assert [path.name for path in write_flight(tmp_path, 3)] == names
    assert json.loads((tmp_path / names[0]).read_text(encoding="utf-8"))["entries"] == entries
    monkeypatch.setattr(native, "_dump_fr_trace_json", _broken, raising=False)
    monkeypatch.setattr(native, "_dump_nccl_trace_json", lambda: b'{"version": 1}', raising=False)
    assert write_flight(tmp_path, 4) == []
