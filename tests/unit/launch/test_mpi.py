"""The command that mpirun is started with."""

from __future__ import annotations

import os
from itertools import pairwise
from pathlib import Path

import pytest

from tunesmith.launch.mpi import mpirun_command
from tunesmith.launch.plan import Plan


def _plan(nproc: int) -> Plan:
    return Plan(command=("python", "x.py"), run_dir=Path("run"), nproc=nproc)


def test_more_processes_than_cores_are_let_start() -> None:
    """Four processes on two cores were refused: "There are not enough slots available"."""
    command = mpirun_command(_plan(4), None, {})
    assert command[:7] == ["mpirun", "-np", "4", "--map-by", "ppr:4:node:OVERSUBSCRIBE", "--bind-to", "none"]
    assert command[-2:] == ["python", "x.py"]


def test_a_hostfile_s_slots_are_heeded(tmp_path: Path) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text("# ours\none slots=8\ntwo slots=8\n", encoding="utf-8")
    command = mpirun_command(_plan(8), hosts, {})
    assert command[1:5] == ["-np", "16", "--map-by", "ppr:8:node"]
    assert command[command.index("--hostfile") + 1] == str(hosts)


@pytest.mark.parametrize("user", [0, 1000])
def test_root_in_a_container_is_let_start(user: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: user)
    assert ("--allow-run-as-root" in mpirun_command(_plan(2), None, {})) is (user == 0)


def test_what_processes_need_goes_to_every_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    monkeypatch.setenv("SECRET", "x")
    command = mpirun_command(_plan(2), None, {"MASTER_PORT": "1"})
    passed = {name for flag, name in pairwise(command) if flag == "-x"}
    assert {"NCCL_DEBUG", "MASTER_PORT", "PATH"} <= passed and "SECRET" not in passed
