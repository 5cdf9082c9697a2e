"""A runner's process from outside: noise, crashes, kills and silence are a status and one line."""

from __future__ import annotations

import textwrap
import time
from pathlib import Path

import pytest

from tunesmith.bench.peers.processes import Said, run_module

GOOD = """
    import json, sys
    from tunesmith.bench.peers.wire import serve

    def run(job, say):
        print("a banner on stdout")
        say({"event": "step", "seconds": 0.5, "loss": job["loss"], "grad_norm": float("nan")})
        return {"digest": "x"}

    serve(run)
"""
MISSING = """
    from tunesmith.bench.peers.wire import require, serve
    serve(lambda job, say: require("no_such_package_here", "no-such-package"))
"""
RAISING = """
    from tunesmith.bench.peers.wire import serve

    def run(job, say):
        say({"event": "step", "seconds": 1.0, "loss": 1.0, "grad_norm": 1.0})
        raise ValueError("two\\nlines")

    serve(run)
"""
OUT_OF_MEMORY = """
    from tunesmith.bench.peers.wire import serve

    def run(job, say):
        raise MemoryError("no more")

    serve(run)
"""
CRASHING = "import os, sys\nprint('last words', file=sys.stderr, flush=True)\nos._exit(3)"
KILLED = "import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)"
HUNG = "import subprocess, sys, time\nsubprocess.Popen(['sleep', '60'])\ntime.sleep(60)"


@pytest.fixture
def said(tmp_path: Path) -> object:
    """A function from a runner's source to what was heard of it."""

    def run(source: str, timeout_s: float = 60.0) -> Said:
        (tmp_path / "a_peer.py").write_text(textwrap.dedent(source), encoding="utf-8")
        return run_module("a_peer", {"loss": 2.5}, timeout_s=timeout_s, path=tmp_path)

    return run


def test_steps_and_result_are_heard_through_noise(said) -> None:  # type: ignore[no-untyped-def]
    heard = said(GOOD)
    assert heard.status == "ok"
    assert heard.steps == ({"seconds": 0.5, "loss": 2.5, "grad_norm": None},)
    assert heard.result["digest"] == "x"
    assert "torch" in heard.result["versions"]
    assert "a banner" in heard.log_tail


@pytest.mark.parametrize(
    ("source", "status", "reason"),
    [
        (MISSING, "missing", "no-such-package is not installed"),
        (RAISING, "failed", "ValueError: two lines"),
        (OUT_OF_MEMORY, "out_of_memory", "no more"),
        (CRASHING, "failed", "exited with code 3: last words"),
        (KILLED, "killed", "SIGSEGV"),
    ],
)
def test_every_end_has_a_status_and_one_line(said, source: str, status: str, reason: str) -> None:  # type: ignore[no-untyped-def]
    heard = said(source)
    assert heard.status == status
    assert reason in heard.reason
    assert "\n" not in heard.reason


def test_a_step_before_a_failure_is_kept(said) -> None:  # type: ignore[no-untyped-def]
    assert len(said(RAISING).steps) == 1


def test_a_hung_peer_is_stopped_with_its_children(said) -> None:  # type: ignore[no-untyped-def]
    """The child of the runner holds its stdout: waiting for the end of that would take its 60 s."""
    began = time.monotonic()
    heard = said(HUNG, timeout_s=1.5)
    assert time.monotonic() - began < 30
    assert (heard.status, heard.reason) == ("timeout", "stopped after 1.5 s (bench.timeout_s)")
