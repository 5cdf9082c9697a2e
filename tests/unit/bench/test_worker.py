"""Jobs in fresh processes: results, crashes, kills, timeouts, and processes that share nothing."""

from __future__ import annotations

import json
import os
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tunesmith.bench.worker import Worker
from tunesmith.errors import TunesmithError

JOBS = """
import json, os, signal, sys, time
from pathlib import Path

calls = 0

def tell(path):
    global calls
    calls += 1
    print("out"); print("err", file=sys.stderr)
    Path(path).write_text(json.dumps({"pid": os.getpid(), "calls": calls, "torch": "torch" in sys.modules}))

def fail():
    raise ValueError("a reason")

def leave():
    os._exit(7)

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def hang():
    time.sleep(60)

def multiply():
    import torch
    torch.set_num_threads(2)
    assert (torch.ones(400, 400) @ torch.ones(400, 400)).sum().item() == 400**3
"""


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    folder = tmp_path_factory.mktemp("jobs")
    (folder / "bench_jobs.py").write_text(textwrap.dedent(JOBS), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(folder))
        with Worker(folder / "worker.log", ["torch", "bench_jobs"]) as started:
            yield started


def test_every_job_has_a_fresh_process_with_torch_imported(worker: Worker, tmp_path: Path) -> None:
    told = []
    for index in range(2):
        outcome = worker.run(["bench_jobs", "tell", str(tmp_path / f"{index}.json")], tmp_path / "log", 20)
        assert outcome.verdict(20) is None
        told.append(json.loads((tmp_path / f"{index}.json").read_text()))
    assert told[0]["pid"] != told[1]["pid"] != os.getpid()
    assert [t["calls"] for t in told] == [1, 1]
    assert all(t["torch"] for t in told)
    assert (tmp_path / "log").read_text() == "out\nerr\n" * 2


def test_a_parallel_product_runs_after_the_fork(worker: Worker, tmp_path: Path) -> None:
    for _ in range(2):
        assert worker.run(["bench_jobs", "multiply"], tmp_path / "log", 30).exit == 0


def test_an_exception_is_in_the_log(worker: Worker, tmp_path: Path) -> None:
    outcome = worker.run(["bench_jobs", "fail"], tmp_path / "log", 20)
    assert outcome.verdict(20) == ("failed", "the process exited with code 1; see its log")
    assert "ValueError: a reason" in (tmp_path / "log").read_text()


def test_an_exit_code_is_told(worker: Worker, tmp_path: Path) -> None:
    assert worker.run(["bench_jobs", "leave"], tmp_path / "log", 20).exit == 7


def test_a_kill_is_told_by_its_signal(worker: Worker, tmp_path: Path) -> None:
    outcome = worker.run(["bench_jobs", "die"], tmp_path / "log", 20)
    verdict = outcome.verdict(20)
    assert verdict is not None
    assert verdict[0] == "killed"
    assert "SIGKILL" in verdict[1]


def test_a_job_that_takes_too_long_is_stopped(worker: Worker, tmp_path: Path) -> None:
    """By itself it ends after 60 s."""
    began = time.monotonic()
    outcome = worker.run(["bench_jobs", "hang"], tmp_path / "log", 0.2)
    assert time.monotonic() - began < 50
    assert outcome.verdict(0.2) == ("timeout", "stopped after 0.2 s (bench.timeout_s)")


def test_a_worker_that_can_not_start_says_why(tmp_path: Path) -> None:
    with pytest.raises(TunesmithError, match="no_such_module"), Worker(tmp_path / "log", ["no_such_module"]):
        pass


def test_leaving_the_worker_ends_a_running_job(tmp_path: Path) -> None:
    """The child is in a process group of its own, so nothing but the server could stop it."""
    (tmp_path / "bench_jobs_end.py").write_text(
        "import os, time, pathlib\n"
        "def hang(path):\n    pathlib.Path(path).write_text(str(os.getpid()))\n    time.sleep(600)\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(tmp_path))
        worker = Worker(tmp_path / "log", ["json"])
        with worker:
            request = {
                "job": ["bench_jobs_end", "hang", str(tmp_path / "pid")],
                "log": str(tmp_path / "l"),
                "timeout_s": 600,
            }
            assert worker._process is not None
            assert worker._process.stdin is not None
            worker._process.stdin.write(json.dumps(request) + "\n")
            worker._process.stdin.flush()
            deadline = time.monotonic() + 60
            while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
                assert time.monotonic() < deadline
                time.sleep(0.02)
    pid = int((tmp_path / "pid").read_text())
    deadline = time.monotonic() + 60
    while Path(f"/proc/{pid}").exists() and "Z" not in Path(f"/proc/{pid}/stat").read_text().split(")")[1]:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_job_whose_time_is_over_before_its_first_line_is_killed_too(worker: Worker, tmp_path: Path) -> None:
    """The group that is killed must be there, however late the new process runs."""
    for index in range(20):
        began = time.monotonic()
        outcome = worker.run(["bench_jobs", "hang"], tmp_path / f"{index}.log", 0.0)
        assert outcome.timed_out
        assert outcome.exit is None
        assert time.monotonic() - began < 30
