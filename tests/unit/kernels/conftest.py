"""Kernels under Triton's CPU interpreter, in one process of their own; those that write fp8 with its conversion."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

# Of one script.
TIMEOUT_S = 250

FP8_AS_INTERPRETED = """
import torch
import triton
import triton.language as tl
from tunesmith.kernels import fp8

@triton.jit
def cast(values, codes, count, SIZE: tl.constexpr):
    index = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    value = tl.load(values + index, mask=index < count)
    tl.store(codes + index, value.to(tl.float8e4nv), mask=index < count)

def to_codes_interpreted(wide, scale):
    '''The interpreter's conversion to fp8 loses the carry of a rounding: the truth is converted by it too.'''
    values = (wide * (1.0 / scale)).clamp(-448, 448).contiguous()
    codes = torch.empty(values.shape, dtype=torch.float8_e4m3fn)
    cast[(triton.cdiv(values.numel(), 1024),)](values, codes, values.numel(), SIZE=1024)
    return codes

fp8.to_codes = to_codes_interpreted  # before the modules that take it over
"""


@pytest.fixture(scope="session")
def interpreter() -> Iterator[Callable[[Path], tuple[int, str]]]:
    """Exit status and output of a script, run in a fork of a process that was started with TRITON_INTERPRET=1.

    The interpreter is chosen when Triton is imported; its imports would cost each script seconds.
    """
    pytest.importorskip("triton")
    process = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("interpreter.py"))],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    into, out_of = process.stdin, process.stdout

    def run(script: Path) -> tuple[int, str]:
        into.write(f"{script}\n")
        into.flush()
        if not select.select([out_of], [], [], TIMEOUT_S)[0]:
            os.killpg(process.pid, signal.SIGKILL)
            return -signal.SIGKILL, f"no answer in {TIMEOUT_S} s"
        answer = out_of.readline()
        assert answer, "Triton's interpreter could not be started"
        status, shown = json.loads(answer)
        return status, shown

    yield run
    into.close()
    out_of.close()
    process.wait()


@pytest.fixture
def check_interpreted(interpreter: Callable[[Path], tuple[int, str]], tmp_path: Path) -> Callable[[str], None]:
    """Runs a script under the interpreter; fails where an assertion in it does."""

    def check(source: str) -> None:
        script = tmp_path / "check.py"  # Triton reads its kernels' source
        script.write_text(source, encoding="utf-8")
        status, shown = interpreter(script)
        assert status == 0, shown

    return check


@pytest.fixture
def check_interpreted_fp8(check_interpreted: Callable[[str], None]) -> Callable[[str], None]:
    """Runs a script whose references round to fp8 as the interpreter does; fails where an assertion in it does."""
    return lambda source: check_interpreted(FP8_AS_INTERPRETED + source)
