"""A launch as a SLURM job: the script for sbatch, which can be read, kept and submitted by hand.

By default one task per node runs `tunesmith launch`, whose elastic agent starts a process per GPU and restarts the
group; the first node of the job is where they meet. With `per_process` SLURM starts each process itself, without
restarts. A job that is preempted, or whose time is nearly over, has its processes save and stop, goes back to the
queue, and goes on from its checkpoint in the same run directory.
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from tunesmith.errors import ParallelError
from tunesmith.launch.plan import LOGS, rank_command

WARNING_S = 120
_FORMS = {
    "partition": (r"[A-Za-z0-9][A-Za-z0-9_.,+-]{0,127}", "a name, or several with commas"),
    "account": (r"[A-Za-z0-9][A-Za-z0-9_.@-]{0,127}", "a name"),
    "qos": (r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}", "a name"),
    "constraint": (r"[A-Za-z0-9_.,:&|*()\[\]-]{1,255}", "features joined by & or |"),
    "time": (r"\d+|\d+:\d{2}(:\d{2})?|\d+-\d{1,2}(:\d{2}){0,2}", "minutes, HH:MM:SS or D-HH:MM:SS"),
    "mem": (r"\d+[KMGT]?", "a number with K, M, G or T"),
}


@dataclass(frozen=True)
class Job:
    """What is asked of SLURM. gpus_per_node: 0 for none; setup: a file of shell commands to source before all."""

    name: str
    nodes: tuple[int, int]
    processes_per_node: int
    gpus_per_node: int
    cpus_per_task: int | None = None
    per_process: bool = False
    max_restarts: int = 3
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    time: str | None = None
    mem: str | None = None
    setup: Path | None = None

    def __post_init__(self) -> None:
        for option, (form, meaning) in _FORMS.items():
            value = getattr(self, option)
            if value is not None and not re.fullmatch(form, value):
                raise ParallelError(f"--{option} is {meaning}; got {value!r}")
        if self.setup is not None and not self.setup.is_file():
            raise ParallelError(f"--setup names a file of shell commands; there is no file {self.setup}")


def script(job: Job, rank_module: str, arguments: list[str], run_dir: Path, folder: Path) -> str:
    """The job's script. Args: rank_module: see `rank_command`; arguments: what is launched; folder: where it runs.

    Raises: ParallelError for a path that a script can't hold.
    """
    parts = [_head(job, run_dir, folder), _environment(job), _step(job, rank_module, arguments, run_dir), _TAIL]
    return "\n".join(parts)


def _head(job: Job, run_dir: Path, folder: Path) -> str:
    low, high = job.nodes
    output = str(run_dir / LOGS).replace("%", "%%") + "/slurm-%j.out"
    options = {
        "job-name": re.sub(r"[^\w.-]", "-", job.name),
        "nodes": str(low) if low == high else f"{low}-{high}",
        "ntasks-per-node": str(job.processes_per_node if job.per_process else 1),
        "cpus-per-task": None if job.cpus_per_task is None else str(job.cpus_per_task),
        "gpus-per-node": str(job.gpus_per_node) if job.gpus_per_node else None,
        **{name: getattr(job, name) for name in ("mem", "time", "partition", "account", "qos", "constraint")},
        "chdir": _in_directive(str(folder)),
        "output": _in_directive(output),
        "open-mode": "append",
        "signal": f"B:TERM@{WARNING_S}",
    }
    lines = [f"#SBATCH --{name}={value}" for name, value in options.items() if value is not None]
    return "\n".join(["#!/bin/bash", *lines, "#SBATCH --requeue"])


def _in_directive(text: str) -> str:
    """A value for an #SBATCH line, which sbatch reads much as a shell would. Raises: ParallelError."""
    if any(ord(character) < 32 or ord(character) == 127 for character in text):
        raise ParallelError(f"a job script can't hold a path with a line break or control character: {text!r}")
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _environment(job: Job) -> str:
    setup = [] if job.setup is None else [f"source {shlex.quote(str(job.setup.resolve()))}"]
    return "\n".join([*setup, _MEETING.strip()])


_MEETING = """
set -u
# Where the processes meet: the job's first node.
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
export MASTER_ADDR MASTER_PORT
[ -z "${SLURM_CPUS_PER_TASK:-}" ] || export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"

# The network. NCCL finds InfiniBand and the fastest interface itself; where it finds the wrong one, say so here.
# export NCCL_SOCKET_IFNAME=ib0        # the interface for meeting, and for data without InfiniBand
# export NCCL_IB_HCA=mlx5              # the InfiniBand cards to use; a leading ^ leaves some out
# export NCCL_IB_DISABLE=1             # no InfiniBand or RoCE: sockets
# export NCCL_NET_GDR_LEVEL=PHB        # how far from its card a GPU may use GPUDirect RDMA
# export NCCL_DEBUG=INFO               # print what NCCL has chosen
# export GLOO_SOCKET_IFNAME=eth0       # the interface of the hosts' own group
"""


def _step(job: Job, rank_module: str, arguments: list[str], run_dir: Path) -> str:
    if job.per_process:
        command = _quoted(rank_command(rank_module, arguments, run_dir / LOGS))
    else:
        own = ["--nproc", str(job.processes_per_node), "--max-restarts", str(job.max_restarts)]
        cpu = [] if job.gpus_per_node else ["--cpu"]
        flags = [word for word in arguments if word in ("--debug", "--json")]
        rest = [word for word in arguments if word not in flags]
        command = _quoted([sys.executable, "-m", "tunesmith", "launch", *flags, *own, *cpu])
        if job.nodes != (1, 1):
            command += ' --nnodes "$SLURM_NNODES" --rdzv "$MASTER_ADDR:$MASTER_PORT"'
            command += ' --rdzv-id "$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}"'
        command += " " + _quoted(rest)
    return f"""
# SIGTERM comes {WARNING_S} s before the time is over, and may come when the job is preempted: pass it on, once.
asked=0
stop() {{ trap '' TERM; asked=1; scancel --signal=TERM "$SLURM_JOB_ID"; }}
trap stop TERM

srun --kill-on-bad-exit=1 {command} &
step=$!"""


def _quoted(words: tuple[str, ...] | list[str]) -> str:
    for word in words:
        if "\n" in word or "\0" in word:
            raise ParallelError(f"a job script can't hold an argument with a line break: {word!r}")
    return " ".join(map(shlex.quote, words))


_TAIL = """
code=0
wait "$step" || code=$?
if [ "$asked" = 1 ]; then  # the signal has interrupted the wait, not the step
  again=0
  wait "$step" || again=$?
  [ "$again" = 127 ] || code=$again
  # All have saved and stopped (143): back to the queue. From there the run goes on from its checkpoint.
  [ "$code" != 143 ] || scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
"""


def submit(path: Path, *, test_only: bool = False) -> str:
    """Hand a script to sbatch. Returns the job's id, or with `test_only` what SLURM says it would do with it.

    Raises: ParallelError where there is no sbatch, or it refuses.
    """
    sbatch = shutil.which("sbatch")
    if sbatch is None:
        raise ParallelError(f"there is no sbatch here: type this where there is: sbatch {shlex.quote(str(path))}")
    mode = "--test-only" if test_only else "--parsable"
    done = subprocess.run([sbatch, mode, str(path)], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise ParallelError(f"sbatch refuses {path}: {' '.join(done.stderr.split()) or done.returncode}")
    return (done.stderr if test_only else done.stdout).strip()
