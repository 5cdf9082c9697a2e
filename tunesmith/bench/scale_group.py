"""All processes of one scaling cell, by the launcher that `tunesmith launch` uses; the job of a fresh process."""

from __future__ import annotations

import sys
from pathlib import Path

from tunesmith.launch.agent import run_here
from tunesmith.launch.cards import driver
from tunesmith.launch.plan import Plan, environment_for


def run_group(plan_file: str, folder: str, processes: str, cpu: str) -> None:
    """Run `scale_rank` as so many processes, once; cpu: "cpu" or "".

    Raises: SystemExit where a process failed; what it wrote says why.
    """
    count, on_cpu = int(processes), cpu == "cpu"
    environment, notes = environment_for(count, cpu=on_cpu, library=None if on_cpu else driver())
    command = (sys.executable, "-m", "tunesmith.bench.scale_rank", plan_file, folder)
    for note in notes:
        print(note, flush=True)
    plan = Plan(command, Path(folder), count, max_restarts=0, environment=environment)
    code = run_here(plan, lambda line: print(line, flush=True))
    if code:
        raise SystemExit(code)
