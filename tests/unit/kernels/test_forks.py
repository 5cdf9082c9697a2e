"""Pieces of work by several forks: each is done once, and one that dies or may not be ended holds nobody up."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tunesmith.kernels.forks import MOST, done_in_forks


@pytest.mark.parametrize("processes", [1, 2, 5])
def test_each_piece_is_done_once(processes: int, tmp_path: Path) -> None:
    def work(number: int) -> bool:
        (tmp_path / str(number)).touch(exist_ok=False)
        return number != 3

    assert done_in_forks(work, 40, processes) == set(range(40)) - {3}
    assert len(list(tmp_path.iterdir())) == 40


def test_one_that_dies_takes_its_own_piece_with_it() -> None:
    """Python's pool waited for ever for what a process did that was killed, by the kernel for its memory, say."""

    def work(number: int) -> bool:
        if number == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return True

    assert done_in_forks(work, 30, 3) == set(range(30)) - {2}


def test_no_pieces_and_more_than_a_pipe_holds() -> None:
    assert done_in_forks(lambda number: True, 0, 2) == set()
    assert done_in_forks(lambda number: True, MOST + 1, 1) == set(range(MOST))


def test_a_program_that_ignores_signals_to_end_waits_for_nobody() -> None:
    """The engine's process of `serve` ignores SIGTERM, and so did its worker, whose pool never ended: 60 s a start."""
    code = (
        "import signal\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "from tunesmith.kernels.forks import done_in_forks\n"
        "for _ in range(20):\n"
        "    assert len(done_in_forks(lambda number: True, 20, 3)) == 20\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
    try:
        assert process.wait(timeout=60) == 0
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
