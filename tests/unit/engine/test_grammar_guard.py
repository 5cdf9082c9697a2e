"""The child that tries grammars out."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict

import pytest

from tunesmith.engine.grammar_library import GrammarLimits

pytest.importorskip("llguidance")


def test_an_engine_that_ended_meanwhile_leaves_no_traceback() -> None:
    """A server that refused to start ended with one of BrokenPipeError, below its own line."""
    arguments = [sys.executable, "-m", "tunesmith.engine.grammar_guard", "5", json.dumps(asdict(GrammarLimits()))]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(arguments, **pipes) as child:  # type: ignore[call-overload]
        child.stdout.close()
        child.stdin.write(b'{"grammar": ""}\n')
        child.stdin.close()
        assert child.stderr.read() == b""
        assert child.wait(30) == 0
