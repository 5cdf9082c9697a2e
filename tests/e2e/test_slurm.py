"""Jobs through a real SLURM of one node, started here in a temporary folder; skips where it is not installed."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tunesmith.launch.slurm import submit
from tunesmith.rundir.io import read_jsonl

TOOLS = ("slurmctld", "slurmd", "munged", "sbatch", "srun", "scancel", "scontrol", "squeue")
MISSING = [tool for tool in TOOLS if shutil.which(tool, path=f"{os.environ['PATH']}:/usr/sbin:/sbin") is None]
pytestmark = [
    pytest.mark.skipif(bool(MISSING), reason=f"SLURM is not installed: no {', '.join(MISSING)}"),
    pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="slurmd starts jobs as root only"),
    pytest.mark.skipif(sys.platform != "linux", reason="SLURM runs on Linux"),
]
CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmdPort={node_port}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
MpiDefault=none
SwitchType=switch/none
SchedulerParameters=batch_sched_delay=0,sched_interval=1
ReturnToService=2
KillWait=30
RebootProgram=/bin/true
NodeName={host} NodeAddr=127.0.0.1 CPUs=8 RealMemory=1000 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
RECIPE = """
name: 店 shop
output: my runs 中
model: {device: cpu}
data: {train: ["builtin:shop?rows=24"], max_length: 128}
train: {max_steps: 4, micro_batch_tokens: 256}
checkpoint: {every_steps: 2}
log: {trackers: []}
"""
TWICE = """
import signal, sys, time
from pathlib import Path
if Path("saved").exists():
    Path("went-on").touch()
    sys.exit(0)
def stop(*_):
    Path("saved").touch()
    sys.exit(143)
signal.signal(signal.SIGTERM, stop)
Path("started").touch()
time.sleep(300)
"""


class Cluster:
    """The daemons, and where their configuration is."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.configuration = folder, folder / "slurm.conf"
        self._daemons: list[subprocess.Popen[bytes]] = []

    def start(self, port: int, node_port: int) -> None:
        for name in ("state", "spool"):
            (self.folder / name).mkdir()
        (self.folder / "munge.key").write_bytes(os.urandom(1024))
        (self.folder / "munge.key").chmod(0o600)
        settings = {"host": socket.gethostname().split(".")[0], "port": port, "node_port": node_port}
        self.configuration.write_text(CONFIGURATION.format(folder=self.folder, **settings), encoding="utf-8")
        (self.folder / "setup.sh").write_text(f"export SLURM_CONF={self.configuration}\n", encoding="utf-8")
        files = [f"--{kind}-file={self.folder}/munge.{kind}" for kind in ("key", "log", "pid", "seed")]
        self._run("munged", "--foreground", "--force", f"--socket={self.folder}/munge.sock", *files)
        _until(lambda: (self.folder / "munge.sock").exists(), 20)
        self._run("slurmctld", "-D", "-f", str(self.configuration))
        self._run("slurmd", "-D", "-f", str(self.configuration))
        _until(lambda: "idle" in self.ask("sinfo", "-h", "-o", "%T"), 180)

    def stop(self) -> None:
        for daemon in reversed(self._daemons):
            daemon.terminate()
        for daemon in self._daemons:
            try:
                daemon.wait(timeout=10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()

    def ask(self, *command: str) -> str:
        """What one of SLURM's commands prints; nothing where it fails."""
        environment = {**os.environ, "SLURM_CONF": str(self.configuration)}
        return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60).stdout

    def state_of(self, job: str) -> str:
        found = [word for word in self.ask("scontrol", "show", "job", job).split() if word.startswith("JobState=")]
        return found[0].partition("=")[2] if found else ""

    def _run(self, tool: str, *arguments: str) -> None:
        path = shutil.which(tool, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
        assert path is not None
        log = (self.folder / f"{tool}.out").open("wb")
        environment = {**os.environ, "SLURM_CONF": str(self.configuration)}
        self._daemons.append(subprocess.Popen([path, *arguments], stdout=log, stderr=log, env=environment))
        log.close()


def _until(ready: Callable[[], bool], limit_s: float) -> None:
    end = time.monotonic() + limit_s
    while not ready():
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.2)


@pytest.fixture(scope="module")
def cluster(free_ports: Callable[[int], list[int]]) -> Iterator[Cluster]:
    """Skips where the daemons do not come up: a machine may forbid what they need."""
    with tempfile.TemporaryDirectory(prefix="slurm-") as folder:  # short: a socket's path has an end
        cluster = Cluster(Path(folder))
        try:
            try:
                cluster.start(*free_ports(2))
            except AssertionError:
                logs = "; ".join(p.read_text(errors="replace")[-300:] for p in sorted(Path(folder).glob("*.log")))
                pytest.skip(f"SLURM does not start here: {logs}")
            yield cluster
        finally:
            cluster.stop()


@pytest.fixture
def launch(cluster: Cluster, tunesmith_cli: Callable[..., Any], tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Writes and submits a job; what `launch --json` says of it."""
    folder = tmp_path / "a b 中文"
    folder.mkdir()

    def run(*arguments: str) -> dict[str, Any]:
        options = ["--slurm", "--submit", "--cpu", "--setup", str(cluster.folder / "setup.sh"), "--time", "10:00"]
        environment = {"SLURM_CONF": str(cluster.configuration)}
        done = tunesmith_cli("launch", "--json", *options, *arguments, cwd=folder, env=environment, check=True)
        said = json.loads(done.stdout.splitlines()[-1])
        return {**said, "folder": folder, "logs": Path(said["run_dir"]) / "logs"}

    return run


def _told(job: dict[str, Any]) -> str:
    return "\n".join(f"{p.name}: {p.read_text(errors='replace')}" for p in job["logs"].glob("*.[ol]*"))


@pytest.mark.timeout(400)
def test_two_tasks_train(cluster: Cluster, launch: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    """builtin:tiny by two tasks that srun starts, in a folder with spaces and Chinese in its name."""
    (tmp_path / "a b 中文" / "r.yaml").write_text(RECIPE, encoding="utf-8")
    job = launch("--per-process", "--nproc", "2", "train", "r.yaml", "--no-verify")
    _until(lambda: cluster.state_of(job["job"]) in ("COMPLETED", "FAILED", "TIMEOUT", "CANCELLED"), 300)
    assert cluster.state_of(job["job"]) == "COMPLETED", _told(job)
    steps = [row["step"] for row in read_jsonl(Path(job["run_dir"]) / "metrics.jsonl") if row["event"] == "step"]
    assert steps == [1, 2, 3, 4]
    assert (Path(job["run_dir"]) / "final").is_dir()
    assert {path.name for path in job["logs"].glob("rank-*.log")} == {"rank-0.log", "rank-1.log"}


@pytest.mark.long
def test_a_job_that_is_asked_to_stop_goes_back_to_the_queue(
    cluster: Cluster, launch: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    """SIGTERM to the script, as before the end of its time: it saves, is requeued, and goes on."""
    folder = tmp_path / "a b 中文"
    (folder / "twice.py").write_text(TWICE, encoding="utf-8")
    job = launch("--nproc", "1", "twice.py")
    _until(lambda: (folder / "started").exists(), 180)
    cluster.ask("scancel", "--batch", "--signal=TERM", job["job"])
    _until(lambda: (folder / "saved").exists(), 180)
    _until(lambda: "Restarts=1" in cluster.ask("scontrol", "show", "job", job["job"]), 180)
    # A requeued job waits two minutes before it may begin; this one may at once.
    _begin(cluster, job["job"])
    _until(lambda: (folder / "went-on").exists(), 120)
    _until(lambda: cluster.state_of(job["job"]) == "COMPLETED", 180)


def _begin(cluster: Cluster, job: str) -> None:
    """Let a requeued job begin. Asked again only after a while: each time the scheduler looks at it anew."""
    for _ in range(18):
        cluster.ask("scontrol", "update", f"JobId={job}", "StartTime=now")
        with contextlib.suppress(AssertionError):
            _until(lambda: cluster.state_of(job) in ("RUNNING", "COMPLETED", "COMPLETING"), 10)
            return
    raise AssertionError(f"the requeued job did not begin: {cluster.ask('scontrol', 'show', 'job', job)}")


@pytest.mark.long
def test_a_job_that_is_cancelled_stays_so(
    cluster: Cluster, launch: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    folder = tmp_path / "a b 中文"
    (folder / "twice.py").write_text(TWICE, encoding="utf-8")
    job = launch("--nproc", "1", "twice.py")
    _until(lambda: (folder / "started").exists(), 180)
    cluster.ask("scancel", job["job"])
    _until(lambda: cluster.state_of(job["job"]) == "CANCELLED", 180)
    assert (folder / "saved").exists()
    assert not (folder / "went-on").exists()


def test_slurm_accepts_a_script_and_refuses_a_foreign_partition(
    cluster: Cluster, tunesmith_cli: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_CONF", str(cluster.configuration))
    (tmp_path / "x.py").touch()
    plain = ["launch", "--json", "--slurm", "--cpu", "--nproc", "2", "--cpus-per-task", "2", "--mem", "500M"]
    done = tunesmith_cli(*plain, "--partition", "all", "x.py", check=True)
    path = Path(json.loads(done.stdout.splitlines()[-1])["script"])
    assert "to start at" in submit(path, test_only=True)
    refused = tunesmith_cli(*plain, "--partition", "none", "--submit", "x.py")
    assert refused.returncode == 1
    assert "sbatch refuses" in refused.stderr and "partition" in refused.stderr
