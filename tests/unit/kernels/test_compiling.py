"""A worker that compiles ahead: what it answers becomes a line, and it can't hurt."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tunesmith.kernels import compiling, compiling_worker
from tunesmith.kernels.compiling import Compiling, can_compile, marker_of, start_worker

WORKER = "tunesmith.verify.warm_up_worker"
REQUEST = {"recipe": {"model": {"path": "builtin:tiny"}}}


def _process(code: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)


def test_its_answer_becomes_a_line() -> None:
    answer = {"kernels": 3, "processes": 2, "duration_s": 1.5, "failed": []}
    worker = Compiling(_process(f"print({json.dumps(json.dumps(answer))})"))
    line = worker.wait()
    assert line is not None
    assert line.startswith("kernels: 3 compiled ahead in 1.5")
    assert (worker.wait() or line).startswith("kernels: 3 compiled ahead")  # who waits again is not held up


@pytest.mark.parametrize(("code", "patience_s"), [("print('no JSON')", 20.0), ("import time; time.sleep(60)", 0.3)])
def test_a_worker_that_says_nothing_or_hangs_is_no_error(code: str, patience_s: float) -> None:
    process = _process(code)
    assert Compiling(process).wait(patience_s=patience_s) is None
    assert process.poll() is not None


def test_a_worker_that_fails_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A worker of the product, in whose way lies a module that can't be imported."""
    (tmp_path / "ctypes.py").write_text("raise OSError('no such library')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    worker = start_worker(WORKER, REQUEST, tmp_path / "marker")
    assert worker is not None
    first, *rest = (worker.wait() or "").splitlines()
    assert first == "kernels: not compiled ahead, exit code 1; they are compiled when launched"
    assert 1 < len(rest) <= compiling.LAST_LINES
    assert rest[-1] == "  OSError: no such library"


def test_a_worker_ends_with_all_that_it_started(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its forks would have gone on compiling beside the program that no longer waits."""
    (tmp_path / "hanging.py").write_text(
        "import subprocess, sys, time\n"
        "child = subprocess.Popen(['sleep', '600'])\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(600)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    worker = start_worker("hanging", {}, tmp_path / "marker")
    assert worker is not None
    assert worker._process.stdout is not None
    child = int(worker._process.stdout.readline())
    worker.stop()
    for _ in range(100):  # whoever takes up orphans may take a moment to bury it
        if not _runs(child):
            break
        time.sleep(0.05)
    assert not _runs(child)


def _runs(pid: int) -> bool:
    try:
        return " Z " not in Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
    except OSError:
        return False


def test_a_worker_without_a_gpu_has_nothing_to_say(tmp_path: Path) -> None:
    if compiling_worker.chip_numbers() is not None:
        pytest.skip("there is a GPU here")
    worker = start_worker(WORKER, REQUEST, tmp_path / "marker")
    assert worker is not None
    assert worker.wait() is None
    assert not (tmp_path / "marker").exists()


def test_a_cpu_and_an_interpreter_compile_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling.ctypes, "CDLL", lambda name: name)
    monkeypatch.setattr(compiling.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(compiling, "usable_cores", lambda: 2)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert can_compile("auto") and can_compile("cuda:1")
    assert not can_compile("cpu")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert not can_compile("auto")


def test_one_core_has_no_worker_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it imports and takes down, 5 s, came on top of what the program did that waited for it."""
    monkeypatch.setattr(compiling.ctypes, "CDLL", lambda name: name)
    monkeypatch.setattr(compiling.importlib.util, "find_spec", lambda name: name)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(compiling, "usable_cores", lambda: 1)
    assert not can_compile("cuda")


def test_a_machine_that_starts_no_worker_is_no_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It ended the program: no memory for another process, or no place for its messages."""
    monkeypatch.setattr(compiling.sys, "executable", str(tmp_path / "none"))
    assert start_worker(WORKER, REQUEST, tmp_path / "marker") is None


def test_a_worker_that_is_gone_before_it_was_asked_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It was dropped without a word, and stayed as a process that nobody had waited for."""
    program = tmp_path / "program"
    program.write_text("#!/bin/sh\nexec 0<&-\necho no such thing >&2\nexit 3\n")
    program.chmod(0o755)
    monkeypatch.setattr(compiling.sys, "executable", str(program))
    worker = start_worker(WORKER, {"much": "x" * 2**20}, tmp_path / "marker")
    assert worker is not None
    assert "exit code 3" in (worker.wait() or "")
    assert worker._process.returncode == 3


def test_another_gpu_has_another_marker(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Machines that share a home share Triton's cache."""
    pytest.importorskip("triton")
    monkeypatch.setattr(compiling, "_DRIVER", tmp_path)
    card = tmp_path / "gpus" / "0000:01:00.0"
    card.mkdir(parents=True)
    markers = [marker_of("a")]
    for name in ("NVIDIA H200", "NVIDIA A100"):
        (card / "information").write_text(f"Model: \t\t {name}\nIRQ:   \t\t 47\n")
        markers.append(marker_of("a"))
    assert len(set(markers)) == 3


def test_the_marker_lies_in_tritons_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    assert marker_of({"a": 1}) == marker_of({"a": 1}) != marker_of({"a": 2})
    assert marker_of("a").parent == tmp_path
