"""The processes that share a model, from outside: their messages, and their end, expected or not."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from tunesmith.engine import tensor_team
from tunesmith.engine.tensor_messages import Reader, send
from tunesmith.engine.tensor_team import TensorTeam
from tunesmith.errors import ParallelError

WORKER = """
import os, socket, struct, sys, time
import msgpack
link = socket.socket(fileno=int(sys.argv[1]))
def say(**message):
    packed = msgpack.packb(message)
    link.sendall(struct.pack("<Q", len(packed)) + packed)
"""


def team_of(tmp_path: Path, script: str) -> TensorTeam:
    path = tmp_path / "worker.py"
    path.write_text(WORKER + script, encoding="utf-8")
    return TensorTeam(3, command=[sys.executable, str(path)])


STOPPED = """
import os, signal, subprocess, sys, time
child = "import os, signal; from tunesmith.engine.tensor_worker import end_with; end_with(int({parent})); print(os.getpid(), flush=True); os.kill(os.getpid(), signal.SIGSTOP)"
subprocess.Popen([sys.executable, "-c", child.replace("{parent}", str(os.getpid()))])
time.sleep(60)
"""  # noqa: E501


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
def test_a_process_that_stands_still_ends_with_the_first() -> None:
    """It can't read that its socket is closed."""
    with subprocess.Popen([sys.executable, "-c", STOPPED], stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout is not None
        stopped = psutil.Process(int(first.stdout.readline()))
        first.kill()
    with contextlib.suppress(psutil.NoSuchProcess):
        deadline = time.monotonic() + 10
        while stopped.status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_messages_arrive_whole() -> None:
    here, there = socket.socketpair()
    reader = Reader(there)
    for message in ({"kind": "a", "bytes": b"x" * 100_000, "list": [1, None]}, {"kind": "b"}):
        send(here, message)
        assert reader.next() == message
    here.close()
    assert reader.next() is None
    there.close()


def test_a_process_that_ends_is_named_with_what_it_said_last(tmp_path: Path) -> None:
    team = team_of(tmp_path, "say(kind='hello')\nif sys.argv[2] == '2': sys.exit('no memory left')\ntime.sleep(60)")
    told = threading.Event()
    team.when_failed(told.set)
    with pytest.raises(ParallelError, match=r"process 2 of the 3 .* ended \(exit code 1\). It said last: no memory"):
        for _ in range(2):
            team.hear("hello", 20)
    assert told.wait(20)
    assert team.workers[0].process.wait(20) is not None, "the others are ended too"
    with pytest.raises(ParallelError, match="start the engine again"):
        team.tell({"kind": "pass"})
    team.close()


def test_a_process_that_is_killed_is_noticed(tmp_path: Path) -> None:
    team = team_of(tmp_path, "say(kind='hello')\ntime.sleep(60)")
    team.hear("hello", 20)
    os.kill(team.workers[0].process.pid, signal.SIGKILL)
    deadline = time.monotonic() + 10
    while team.failure is None and time.monotonic() < deadline:
        time.sleep(0.01)
    with pytest.raises(ParallelError, match=r"process 1 .* ended \(exit code -9\)"):
        team.check()
    team.close()


def test_work_that_is_broken_off_ends_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor_team, "WAIT_S", 0.05)
    team = team_of(tmp_path, "say(kind='hello')\ntime.sleep(60)")
    team.hear("hello", 20)
    team.give_up("KeyboardInterrupt: ")
    with pytest.raises(ParallelError, match=r"the 3 processes .* are out of step \(KeyboardInterrupt"):
        team.check()
    assert all(worker.process.poll() is not None for worker in team.workers)
    team.close()


def test_a_process_that_says_nothing_and_one_that_says_why(tmp_path: Path) -> None:
    team = team_of(tmp_path, "time.sleep(60)")
    with pytest.raises(ParallelError, match="has not said 'hello' within 0 s"):
        team.hear("hello", 0.1)
    team.close()
    team = team_of(tmp_path, "say(kind='failed', reason='ModelError: no such folder')")
    with pytest.raises(ParallelError, match="failed: ModelError: no such folder"):
        team.hear("hello", 20)
    team.close()
    team.close()
