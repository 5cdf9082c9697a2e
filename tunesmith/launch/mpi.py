"""A launch under Open MPI: mpirun starts a process per slot, and the processes find themselves by its variables."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import FrameType

from tunesmith.errors import ParallelError
from tunesmith.launch.causes import STOPPED, Ending, Verdict, judge, read_ending
from tunesmith.launch.plan import Plan

_PASSED_ON = ("NCCL_", "GLOO_", "OMP_", "TORCH_", "CUDA_", "UCX_", "HF_", "TUNESMITH_")
_BY_NAME = ("PATH", "LD_LIBRARY_PATH", "PYTHONPATH", "XDG_CACHE_HOME", "MASTER_ADDR", "MASTER_PORT")
_KILLED = 128


def read_hosts(hostfile: Path) -> list[str]:
    """The machines of a hostfile, a line each: NAME [slots=N]. Raises: ParallelError."""
    try:
        lines = hostfile.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ParallelError(f"the hostfile {hostfile} can't be read: {error}") from None
    hosts = [line.split()[0] for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if not hosts:
        raise ParallelError(f"the hostfile {hostfile} names no machine; a line is NAME slots=8")
    return hosts


def meeting_place(hosts: list[str]) -> dict[str, str]:
    """Where the processes meet: on the first machine. A free port can only be asked for on this one."""
    if hosts:
        return {"MASTER_ADDR": hosts[0], "MASTER_PORT": str(20000 + os.getpid() % 20000)}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}


def mpirun_command(plan: Plan, hostfile: Path | None, environment: dict[str, str]) -> list[str]:
    """The mpirun command of a plan. Args: environment: what the processes get on every machine, by -x.

    Without a hostfile mpirun counts a core as a slot and refuses more processes (a container with four GPUs and two
    cores); root it refuses unless told. Both are allowed here; slots that a hostfile states are heeded.
    """
    machines = 1 if hostfile is None else len(read_hosts(hostfile))
    mapping = f"ppr:{plan.nproc}:node" + (":OVERSUBSCRIBE" if hostfile is None else "")
    command = ["mpirun", "-np", str(plan.nproc * machines), "--map-by", mapping, "--bind-to", "none"]
    command += [] if hostfile is None else ["--hostfile", str(hostfile)]
    command += ["--allow-run-as-root"] if os.geteuid() == 0 else []
    names = [name for name in os.environ if name.startswith(_PASSED_ON) or name in _BY_NAME]
    for name in sorted({*names, *environment}):
        command += ["-x", name]
    return [*command, *plan.command]


def run_by_mpi(plan: Plan, hostfile: Path | None, say: Callable[[str], None]) -> int:
    """Run the plan under mpirun, again as often as it allows where that can help. Returns the exit code.

    Raises: ParallelError naming the rank that failed.
    """
    if shutil.which("mpirun") is None:
        raise ParallelError("there is no mpirun here: install Open MPI (Debian: apt install openmpi-bin)")
    plan.logs.mkdir(parents=True, exist_ok=True)
    hosts = [] if hostfile is None else read_hosts(hostfile)
    left = plan.max_restarts
    while True:
        for path in plan.logs.glob("rank-*.end.json"):
            path.unlink(missing_ok=True)
        environment = {**plan.environment, **meeting_place(hosts)}
        code, asked = _run(mpirun_command(plan, hostfile, environment), environment)
        if code == 0:
            return 0
        verdict = _verdict(plan, code)
        if asked or verdict.exit_code in STOPPED:
            return verdict.exit_code
        if not verdict.restart or left == 0:
            raise ParallelError(f"{verdict.line}; the logs of all ranks: {plan.logs}")
        left -= 1
        say(f"{verdict.line}; starting all again from the last checkpoint ({left} more restarts allowed)")


def _run(command: list[str], environment: dict[str, str]) -> tuple[int, bool]:
    """The exit code of a command to which SIGTERM and Ctrl-C are passed on, and whether there was one."""
    process = subprocess.Popen(command, env={**os.environ, **environment}, start_new_session=True)
    asked = False

    def forward(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        asked = True
        process.send_signal(signal.SIGTERM)

    before = {number: signal.signal(number, forward) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        return process.wait(), asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _verdict(plan: Plan, code: int) -> Verdict:
    endings = []
    for path in sorted(plan.logs.glob("rank-*.end.json")):
        number = int(path.name.split("-")[1].split(".")[0])
        endings.append(read_ending(path, number, 1))
    if code > _KILLED and code not in STOPPED:
        endings.append(Ending(-1, _KILLED - code))
    return judge(endings or [Ending(-1, code)])
