"""Which of several bad ends is the cause, and whether another try can end otherwise."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from tunesmith.errors import NonFiniteError, ParallelError, RecipeError, TrainingError
from tunesmith.launch.causes import Ending, ending_path, judge, read_ending, write_ending

BROKEN = Ending(1, 1, "RuntimeError", "Connection closed by peer", 3.0)


@pytest.mark.parametrize(
    ("endings", "restart", "code", "line"),
    [
        ([Ending(2, -9, at=2.0), BROKEN], True, 1, "rank 2 was ended by SIGKILL"),
        ([BROKEN, Ending(0, -11, at=5.0)], True, 1, "rank 0 was ended by SIGSEGV"),
        ([BROKEN], True, 1, "rank 1: RuntimeError: Connection closed by peer"),
        ([Ending(3, 1)], True, 1, "rank 3 ended with exit code 1"),
        ([BROKEN, Ending(0, 1, "NonFiniteError", "NaN in step 3", 9.0)], False, 1, "rank 0: NaN in step 3"),
        ([Ending(0, 2, "RecipeError", "no such key", 1.0)], False, 2, "rank 0: no such key"),
        ([Ending(0, 143), Ending(1, 143)], False, 143, "rank 0 ended with exit code 143"),
        ([Ending(0, 130)], False, 130, "rank 0 ended with exit code 130"),
        ([BROKEN, Ending(0, 1, "ParallelError", "rank 1 hangs", 4.0)], True, 1, "rank 1 hangs"),
        ([Ending(0, 1, "ZeroDivisionError", "division by zero", 0.0)], False, 1, "ZeroDivisionError: division by zero"),
        ([Ending(-1, -9)], True, 1, "a rank was ended by SIGKILL"),
    ],
)
def test_the_cause(endings: list[Ending], restart: bool, code: int, line: str) -> None:
    verdict = judge(endings)
    assert (verdict.restart, verdict.exit_code) == (restart, code)
    assert line in verdict.line


@pytest.mark.parametrize(
    ("error", "is_final"),
    [
        (NonFiniteError("x"), True),
        (RecipeError("x"), True),
        (TrainingError("the disk is full"), True),
        (ParallelError("x"), False),
        (ConnectionResetError("x"), False),
        (RuntimeError("NCCL error"), False),
    ],
)
def test_an_ending_is_read_back(error: Exception, is_final: bool, tmp_path: Path) -> None:
    path = ending_path(tmp_path, 3)
    write_ending(path, 3, 1, error)
    ending = read_ending(path, 3, 1)
    assert (ending.rank, ending.error, ending.is_final) == (3, type(error).__name__, is_final)


def test_what_could_not_be_written_is_an_exit_code(tmp_path: Path) -> None:
    write_ending(tmp_path / "missing" / "x.json", 0, 1, None)
    ending = read_ending(tmp_path / "missing" / "x.json", 4, -signal.SIGKILL)
    assert (ending.rank, ending.exit_code, ending.error) == (4, -9, None)
    torn = tmp_path / "torn.json"
    torn.write_text(json.dumps({"rank": 0})[:-3], encoding="utf-8")
    assert read_ending(torn, 0, 1).error is None
