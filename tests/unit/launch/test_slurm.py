"""The job script: what it says, what it refuses to hold."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tunesmith.errors import ParallelError
from tunesmith.launch.slurm import Job, script, submit

RUN = Path("/runs/a b 中文 $(touch x) 'q' 100%")


def text(arguments: list[str] | None = None, run: Path = RUN, **changed: Any) -> str:
    job = Job(**{"name": "my run", "nodes": (1, 1), "processes_per_node": 2, "gpus_per_node": 2, **changed})
    return script(job, "a.module", arguments or ["train", "r.yaml"], run, Path("/work dir"))


def test_what_is_asked_of_slurm() -> None:
    asked = text(partition="gpu", account="me", qos="high", constraint="h200&ib", time="1-12:00:00", mem="200G")
    for line in (
        "--job-name=my-run",
        "--nodes=1",
        "--ntasks-per-node=1",
        "--gpus-per-node=2",
        "--partition=gpu",
        "--account=me",
        "--qos=high",
        "--constraint=h200&ib",
        "--time=1-12:00:00",
        "--mem=200G",
        "--requeue",
        "--signal=B:TERM@120",
        "--open-mode=append",
        '--chdir="/work dir"',
    ):
        assert f"#SBATCH {line}\n" in asked


def test_a_task_for_each_process_or_for_each_node() -> None:
    per_node = text(nodes=(2, 4), max_restarts=5)
    assert "#SBATCH --nodes=2-4\n" in per_node
    assert f"{sys.executable} -m tunesmith launch --nproc 2 --max-restarts 5 --nnodes" in per_node
    assert '--rdzv "$MASTER_ADDR:$MASTER_PORT"' in per_node
    per_process = text(per_process=True)
    assert "#SBATCH --ntasks-per-node=2\n" in per_process
    assert f"{sys.executable} -m a.module" in per_process
    assert "tunesmith launch" not in per_process


def test_the_networks_settings_are_shown() -> None:
    shown = text()
    assert all(name in shown for name in ("# export NCCL_SOCKET_IFNAME", "# export NCCL_IB_HCA", "# export NCCL_DEBUG"))


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("partition", "gpu\n#SBATCH --uid=0"),
        ("partition", "a;b"),
        ("account", "$(id)"),
        ("qos", "a b"),
        ("constraint", "a b"),
        ("constraint", "`id`"),
        ("time", "soon"),
        ("time", "1:00\nx"),
        ("mem", "8 GB"),
    ],
)
def test_what_is_no_name_is_refused(option: str, value: str) -> None:
    with pytest.raises(ParallelError, match=f"--{option} is"):
        text(**{option: value})


def test_a_setup_file_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(ParallelError, match="--setup names a file"):
        text(setup=tmp_path / "missing")
    (tmp_path / "set up.sh").write_text("export X=1\n", encoding="utf-8")
    assert f"source '{tmp_path}/set up.sh'\n" in text(setup=tmp_path / "set up.sh")


@pytest.mark.parametrize("run", [Path("/a\n#SBATCH --uid=0"), Path("/a\tb")])
def test_a_path_that_breaks_a_line_is_refused(run: Path) -> None:
    with pytest.raises(ParallelError, match="line break"):
        text(run=run)


def test_an_argument_that_breaks_a_line_is_refused() -> None:
    with pytest.raises(ParallelError, match="line break"):
        text(["train", "r.yaml", "--set", "name=a\nb"])


def test_nothing_of_a_path_is_run_by_the_shell(tmp_path: Path) -> None:
    """The script under bash, with stand-ins for SLURM's commands that print what they were given."""
    shown = tmp_path / "shown"
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "srun").write_text(f'#!/bin/bash\nprintf "%s\\n" "$@" > {shown}\n', encoding="utf-8")
    (tools / "scontrol").write_text("#!/bin/bash\necho node1\n", encoding="utf-8")
    for tool in tools.iterdir():
        tool.chmod(0o755)
    arguments = ["train", "r.yaml", "--run-dir", str(RUN)]
    path = tmp_path / "job.sh"
    path.write_text(text(arguments), encoding="utf-8")
    environment = {"PATH": f"{tools}:/usr/bin:/bin", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node1"}
    subprocess.run(["bash", str(path)], check=True, env=environment, cwd=tmp_path)
    given = shown.read_text(encoding="utf-8").splitlines()
    assert given[-4:] == arguments
    assert not (tmp_path / "x").exists()
    assert "100%%" in next(line for line in path.read_text(encoding="utf-8").splitlines() if "--output" in line)


def test_without_sbatch_the_command_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ParallelError, match=r"sbatch 'a b\.sbatch'"):
        submit(Path("a b.sbatch"))
