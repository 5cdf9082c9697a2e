"""`tunesmith launch` with real processes: restarts, stops, hangs, logs."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

CLI = Callable[..., subprocess.CompletedProcess[str]]
GUILTY = """
import os, signal, sys, time
from pathlib import Path
import torch
import torch.distributed as dist
from tunesmith.parallel.mesh import joined
from tunesmith.parallel.watchdog import watched
from tunesmith.recipe.parallel import ParallelSection

how, guilty = sys.argv[1], int(sys.argv[2])
first = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
asked = []
signal.signal(signal.SIGTERM, lambda *_: asked.append(1))
settings = ParallelSection(timeout_s=3)
state = Path("state")

def misbehave():
    if how == "kill" and first:
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "always":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "raise":
        raise ZeroDivisionError("a mistake of the script")
    if how == "sleep":
        time.sleep(1000)
    if how == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    if how == "slow":
        with progress.long("a save"):
            time.sleep(5)

with joined(settings, "cpu") as mesh, watched(mesh, settings, Path("stacks")) as progress:
    begin = int(state.read_text()) if state.exists() else 0
    dist.barrier()
    print(f"rank {mesh.rank} of {mesh.world_size} from {begin}", flush=True)
    for step in range(begin, 6):
        if step == 3 and mesh.rank == guilty:
            misbehave()
        flag = torch.tensor(float(bool(asked)))
        dist.all_reduce(flag)
        if mesh.is_first:
            state.write_text(str(step))
        progress.step_done(step)
        if flag.item():
            sys.exit(143)
        time.sleep(0.5 if how == "wait" else 0.0)
print("all is well", flush=True)
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "guilty.py"
    path.write_text(GUILTY, encoding="utf-8")
    return path


def _launch(
    cli: CLI, script: Path, *arguments: str, nproc: int = 2, restarts: int = 1, debug: bool = False
) -> subprocess.CompletedProcess[str]:
    options = [
        *(["--debug"] if debug else []),
        "--cpu",
        "--nproc",
        nproc,
        "--max-restarts",
        restarts,
        "--run-dir",
        "run",
    ]
    return cli("launch", *map(str, options), script, *arguments, timeout=110)


@pytest.mark.long  # as does every run of tests/long/test_rank_kills.py, one of whose kills `make test` has
def test_a_killed_rank_starts_the_group_again(tunesmith_cli: CLI, script: Path, tmp_path: Path) -> None:
    done = _launch(tunesmith_cli, script, "kill", "1")
    assert done.returncode == 0, done.stderr
    assert "rank 1 was ended by SIGKILL; starting all again from the last checkpoint (0 more" in done.stderr
    assert done.stdout.splitlines()[0] == "rank 0 of 2 from 0"
    assert "rank 0 of 2 from 2" in done.stdout and "all is well" in done.stdout
    log = (tmp_path / "run" / "logs" / "rank-1.log").read_text(encoding="utf-8")
    assert "start 1, process" in log and "start 2, process" in log and "all is well" in log
    assert "rank 0 of 2 from 2" in (tmp_path / "run" / "logs" / "rank-0.log").read_text(encoding="utf-8")


def test_restarts_are_bounded(tunesmith_cli: CLI, script: Path) -> None:
    done = _launch(tunesmith_cli, script, "always", "0", restarts=1)
    assert done.returncode == 1
    assert done.stderr.count("starting all again") == 1
    assert "rank 0 was ended by SIGKILL (the only restart)" in done.stderr.splitlines()[-1]


def test_what_would_fail_again_is_not_tried_again(tunesmith_cli: CLI, script: Path) -> None:
    done = _launch(tunesmith_cli, script, "raise", "1", restarts=3)
    assert done.returncode == 1
    assert "starting all again" not in done.stderr
    assert "rank 1: ZeroDivisionError: a mistake of the script" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("how", "rank", "nproc"),
    [
        ("sleep", 1, 2),
        *(pytest.param(how, rank, 3, marks=pytest.mark.long) for how in ("sleep", "stop") for rank in (0, 1)),
    ],
)
def test_a_rank_that_hangs_is_named(
    how: str, rank: int, nproc: int, tunesmith_cli: CLI, script: Path, tmp_path: Path
) -> None:
    """With a limit of 3 s; a stopped process is ended by the launcher, a few seconds later."""
    began = time.monotonic()
    done = _launch(tunesmith_cli, script, how, str(rank), nproc=nproc, restarts=0)
    assert done.returncode == 1
    assert time.monotonic() - began < 60
    line = done.stderr.splitlines()[-1]
    assert re.search(rf"rank {rank} hangs in (starting|step \d): no progress for \d", line)
    if how == "sleep":
        number = 1 + GUILTY.splitlines().index("        time.sleep(1000)")
        assert "hangs in step 3" in line and f"rank {rank} is at {script}:{number} in misbehave" in line
        assert "time.sleep(1000)" in (tmp_path / "stacks" / f"hang-rank-{rank}.txt").read_text(encoding="utf-8")
    else:
        assert f"rank {rank} does not answer" in line


@pytest.mark.long
def test_with_debug_a_hang_leaves_the_last_collectives_of_all(tunesmith_cli: CLI, script: Path, tmp_path: Path) -> None:
    """The bug: torch's recorder was on, but nobody wrote it: the watchdog ends processes before torch's own limit."""
    done = _launch(tunesmith_cli, script, "sleep", "1", restarts=0, debug=True)
    assert done.returncode == 1
    assert "when a rank hangs, all write their stacks" in done.stderr
    assert "their last collectives: stacks/flight-*.json" in done.stderr
    for rank in (0, 1):
        path = tmp_path / "stacks" / f"flight-rank-{rank}.json"
        entries = json.loads(path.read_text(encoding="utf-8"))["entries"]
        assert entries[-1]["profiling_name"] == "gloo:all_reduce", "the last that all began: that of step 2"
        assert [entry["input_sizes"] for entry in entries if "all_reduce" in entry["profiling_name"]] == [[[]]] * 3


@pytest.mark.long
def test_a_slow_rank_is_let_be(tunesmith_cli: CLI, script: Path) -> None:
    done = _launch(tunesmith_cli, script, "slow", "1")
    assert done.returncode == 0, done.stderr


def test_sigterm_goes_to_all_and_is_not_a_reason_to_restart(script: Path, tmp_path: Path) -> None:
    process = _started(script, tmp_path, "wait")
    _until(lambda: (tmp_path / "state").exists())
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 143, err
    assert "passed on to all ranks" in err
    assert "all is well" not in out


def test_ranks_do_not_outlive_their_launcher(script: Path, tmp_path: Path) -> None:
    process = _started(script, tmp_path, "wait")
    _until(lambda: (tmp_path / "state").exists())
    log = (tmp_path / "run" / "logs" / "rank-1.log").read_text(encoding="utf-8")
    rank = int(log.split("process ")[1].split()[0])
    process.kill()
    process.communicate(timeout=60)
    _until(lambda: not Path(f"/proc/{rank}").exists())


def _started(script: Path, folder: Path, how: str) -> subprocess.Popen[str]:
    options = ["--cpu", "--nproc", "2", "--run-dir", "run"]
    command = [sys.executable, "-m", "tunesmith", "launch", *options, str(script), how, "0"]
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def _until(ready: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not ready():
        assert time.monotonic() < end, "it did not happen within a minute"
        time.sleep(0.1)


def test_a_dry_run_makes_nothing(tunesmith_cli: CLI, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("name: shop\nmodel: {device: cpu}\n", encoding="utf-8")
    done = tunesmith_cli("launch", "--json", "--nproc", "2", "--dry-run", "train", "r.yaml", "--set", "train.seed=3")
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["command"][:4] == [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    assert said["command"][-7:] == ["train", "--json", "r.yaml", "--set", "train.seed=3", "--run-dir", said["run_dir"]]
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian", "x.yaml"], "type: tunesmith launch train x.yaml"),
        (["x.yaml", "--set", "train.epochs=2"], "type: tunesmith launch train x.yaml --set train.epochs=2"),
        (["missing.py"], "there is no script missing.py"),
        (["train", "missing.yaml"], "there is no such file"),
        (["--nnodes", "2", "train", "builtin:tiny", "--data", "builtin:shop"], "name it with --run-dir"),
        (["--nproc", "x", "train", "builtin:tiny", "--data", "builtin:shop"], "--nproc is auto"),
        (["--submit", "train", "builtin:tiny", "--data", "builtin:shop"], "--submit goes with --slurm"),
        (["--mpi", "--slurm", "train", "builtin:tiny", "--data", "builtin:shop"], "leave one out"),
    ],
)
def test_mistakes_are_a_line_before_any_process(arguments: list[str], message: str, tunesmith_cli: CLI) -> None:
    done = tunesmith_cli("launch", "--cpu", *arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.skipif(shutil.which("mpirun") is None, reason="Open MPI's mpirun is not installed")
@pytest.mark.parametrize("nproc", [2, pytest.param(5, marks=pytest.mark.long)])
def test_under_mpirun(nproc: int, tunesmith_cli: CLI, script: Path) -> None:
    """As root too, and with more processes than there may be cores, as in a container."""
    done = tunesmith_cli("launch", "--mpi", "--cpu", "--nproc", str(nproc), "--run-dir", "run", script, "none", "0")
    assert done.returncode == 0, done.stderr
    assert f"rank 0 of {nproc} from 0" in done.stdout and "all is well" in done.stdout


def test_where_mpirun_is_missing_it_says_so(tunesmith_cli: CLI, script: Path, tmp_path: Path) -> None:
    environment = {"PATH": os.fspath(tmp_path)}
    done = tunesmith_cli("launch", "--mpi", "--cpu", "--nproc", "2", script, "none", "0", env=environment)
    assert done.returncode == 1
    assert "there is no mpirun here" in done.stderr
