"""What is started: how many processes of which command, where they meet, and what stands in their environment."""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tunesmith.errors import LaunchError
from tunesmith.hardware import usable_cores
from tunesmith.launch import cards

LOGS = "logs"
DEFAULT_RESTARTS = 3
DEBUG_NOTE = (
    "--debug: every collective is compared between the ranks (slow); when a rank hangs, all write their stacks "
    "(hang-rank-N.txt) and last collectives (flight-*rank-N.json); NCCL says what it does in nccl-HOST-PID.log"
)
_NODES = re.compile(r"(\d+)(?::(\d+))?")
_ENDPOINT = re.compile(r"[A-Za-z0-9._-]{1,253}:\d{1,5}|\[[0-9a-fA-F:]+\]:\d{1,5}")


@dataclass(frozen=True)
class Plan:
    """A launch, decided. `command` is what every process runs; `environment` is added to the launcher's own."""

    command: tuple[str, ...]
    run_dir: Path
    nproc: int
    nodes: tuple[int, int] = (1, 1)
    rendezvous: str | None = None
    rendezvous_id: str = "tunesmith"
    max_restarts: int = DEFAULT_RESTARTS
    environment: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def logs(self) -> Path:
        """The folder of one log per rank."""
        return self.run_dir / LOGS

    def torchrun(self) -> list[str]:
        """The same as a command of torch's own launcher."""
        low, high = self.nodes
        where = (
            ["--standalone"]
            if self.rendezvous is None
            else [
                f"--nnodes={low}:{high}",
                "--rdzv-backend=c10d",
                f"--rdzv-endpoint={self.rendezvous}",
                f"--rdzv-id={self.rendezvous_id}",
            ]
        )
        options = [f"--nproc-per-node={self.nproc}", f"--max-restarts={self.max_restarts}"]
        return [sys.executable, "-m", "torch.distributed.run", *where, *options, "--no-python", *self.command]


def rank_command(module: str, arguments: Sequence[str], logs: Path) -> tuple[str, ...]:
    """What one process runs: `tunesmith ARGUMENTS` or a script, by the module that gives each rank a log of its own."""
    return (sys.executable, "-m", module, str(logs), *arguments)


def is_script(word: str) -> bool:
    """Whether what is launched is a Python script rather than a verb."""
    return word.endswith(".py")


def parse_nodes(text: str) -> tuple[int, int]:
    """(least, most) machines of "2" or "2:4". Raises: LaunchError."""
    found = _NODES.fullmatch(text.strip())
    low, high = (0, 0) if found is None else (int(found[1]), int(found[2] or found[1]))
    if not 1 <= low <= high:
        raise LaunchError(f"--nnodes is a number of machines, as 2, or least:most, as 2:4; got {text!r}")
    return low, high


def check_endpoint(text: str | None, nodes: tuple[int, int]) -> str | None:
    """The place where several machines meet; None for one machine. Raises: LaunchError."""
    if text is None:
        if nodes != (1, 1):
            raise LaunchError(
                f"{nodes[1]} machines need a place to meet: type the same command on each, with --rdzv HOST:PORT "
                f"naming one of them, as --rdzv node1:29400"
            )
        return None
    if not _ENDPOINT.fullmatch(text):
        raise LaunchError(f"--rdzv is HOST:PORT, as node1:29400; got {text!r}")
    return text


def count_processes(text: str, *, cpu: bool, gpus: int) -> tuple[int, str | None]:
    """How many processes "auto" or a number is on this machine, and a line about the choice where one was made.

    Raises: LaunchError for more processes than GPUs.
    """
    if text == "auto":
        if cpu or gpus == 0:
            return 1, "one process: there is no GPU to count; name a number of CPU processes with --nproc"
        return gpus, None
    if not text.isdigit() or int(text) < 1:
        raise LaunchError(f"--nproc is auto, or a number of processes from 1 on; got {text!r}")
    if not cpu and 0 < gpus < int(text):
        raise LaunchError(
            f"--nproc {text} is more than this machine's {gpus} GPUs: each process takes one; lower it, or add --cpu"
        )
    return int(text), None


def environment_for(nproc: int, *, cpu: bool, library: object | None) -> tuple[dict[str, str], list[str]]:
    """What the processes' environment gets, and lines that say why. What the user has set stays."""
    wanted = {"OMP_NUM_THREADS": str(max(1, usable_cores() // nproc))}
    notes = []
    if cpu:
        wanted["CUDA_VISIBLE_DEVICES"] = ""
    blind = [] if cpu else cards.pairs_without_peer_access(library, nproc)
    if blind:
        names = ", ".join(f"{low}-{high}" for low, high in blind[:4]) + (" ..." if len(blind) > 4 else "")
        wanted["NCCL_P2P_DISABLE"] = "1"
        notes.append(f"GPUs {names} can't read each other's memory: NCCL_P2P_DISABLE=1, they talk through the host")
    kept = {key: value for key, value in wanted.items() if key == "CUDA_VISIBLE_DEVICES" or key not in os.environ}
    return kept, notes


def debug_environment(logs: Path) -> dict[str, str]:
    """What makes torch and NCCL tell more, into files in the logs' folder.

    Every collective is compared between the ranks before it runs (slow), and the last of them are kept (torch's flight
    recorder) and written out when a rank hangs (`parallel/flight.py`), or one of NCCL's times out.
    """
    return {
        "TORCH_DISTRIBUTED_DEBUG": "DETAIL",
        "TORCH_SHOW_CPP_STACKTRACES": "1",
        "TORCH_FR_BUFFER_SIZE": "2000",
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
        "TORCH_FR_DUMP_TEMP_FILE": str(logs / "flight-rank-"),
        "NCCL_DEBUG": "INFO",
        "NCCL_DEBUG_FILE": str(logs / "nccl-%h-%p.log"),
    }


def shell_line(command: Sequence[str], environment: Mapping[str, str]) -> str:
    """A command with its environment, as it may be pasted into a shell."""
    settings = [f"{key}={shlex.quote(value)}" for key, value in environment.items()]
    return " ".join([*settings, *(shlex.quote(part) for part in command)])
