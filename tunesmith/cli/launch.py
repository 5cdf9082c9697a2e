"""`tunesmith launch [OPTIONS] train RECIPE.yaml ...`: the same command as several processes."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import typer.main

from tunesmith.cli import console
from tunesmith.errors import LaunchError, nearest

if TYPE_CHECKING:
    from tunesmith.launch.plan import Plan
    from tunesmith.launch.slurm import Job
    from tunesmith.recipe.schema import Recipe

app = typer.Typer(add_completion=False)
LAUNCHABLE = ("train",)
RANK = f"{__package__}.rank"
"""The module that every process is started with."""
_PASS = {"allow_interspersed_args": False, "ignore_unknown_options": False}


@app.command(context_settings=_PASS)
def launch(
    command: Annotated[
        list[str], typer.Argument(metavar="train RECIPE ... | SCRIPT.py ...", help="what every process runs")
    ],
    nproc: Annotated[str, typer.Option(help="processes on each machine; auto: one for each GPU")] = "auto",
    cpu: Annotated[bool, typer.Option("--cpu", help="use no GPU")] = False,
    nnodes: Annotated[str, typer.Option(help="machines: a number, or least:most")] = "1",
    rdzv: Annotated[str | None, typer.Option(help="HOST:PORT where several machines meet: one of them")] = None,
    rdzv_id: Annotated[str, typer.Option(help="a name that tells this launch from others there")] = "tunesmith",
    max_restarts: Annotated[int, typer.Option(min=0, help="how often the group may be started again")] = 3,
    run_dir: Annotated[Path | None, typer.Option(help="the run directory: made, or gone on with")] = None,
    mpi: Annotated[bool, typer.Option("--mpi", help="start the processes by mpirun (Open MPI)")] = False,
    hostfile: Annotated[Path | None, typer.Option(help="mpi: the machines, a line each: NAME slots=N")] = None,
    slurm: Annotated[bool, typer.Option("--slurm", help="write a script for SLURM's sbatch instead")] = False,
    submit: Annotated[bool, typer.Option("--submit", help="slurm: hand the script to sbatch")] = False,
    per_process: Annotated[
        bool, typer.Option("--per-process", help="slurm: a task for each process, started by srun; no restarts")
    ] = False,
    time: Annotated[str | None, typer.Option(help="slurm: the limit, as 12:00:00")] = None,
    partition: Annotated[str | None, typer.Option(help="slurm: the queue to wait in")] = None,
    account: Annotated[str | None, typer.Option(help="slurm: whom the hours are charged to")] = None,
    qos: Annotated[str | None, typer.Option(help="slurm: the quality of service")] = None,
    constraint: Annotated[str | None, typer.Option(help="slurm: features that the nodes must have")] = None,
    cpus_per_task: Annotated[int | None, typer.Option(min=1, help="slurm: cores of each task")] = None,
    mem: Annotated[str | None, typer.Option(help="slurm: memory of each node, as 200G")] = None,
    setup: Annotated[Path | None, typer.Option(help="slurm: a file of shell commands to source first")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print what would be run, and run nothing")] = False,
) -> int:
    """Run `tunesmith train ...` (or a Python script) as several processes, and start them again when one dies.

    Exit codes: 0 done, 130 and 143 stopped by Ctrl-C or SIGTERM after saving, 1 and 2 as the process that failed.
    """
    from tunesmith.launch.plan import check_endpoint, parse_nodes

    nodes = parse_nodes(nnodes)
    _check_order(command)
    target = Target(command, run_dir, cpu=cpu)
    _check_kind(mpi=mpi, slurm=slurm, hostfile=hostfile, submit=submit)
    if slurm:
        from tunesmith.launch.slurm import Job

        count = _processes_of_a_node(nproc)
        job = Job(
            name=target.name,
            nodes=nodes,
            processes_per_node=count,
            gpus_per_node=0 if target.uses_no_gpu else count,
            cpus_per_task=cpus_per_task,
            per_process=per_process,
            max_restarts=max_restarts,
            partition=partition,
            account=account,
            qos=qos,
            constraint=constraint,
            time=time,
            mem=mem,
            setup=setup,
        )
        return _slurm(job, target, submit=submit, dry_run=dry_run)
    if nodes != (1, 1) and not target.is_named:
        raise LaunchError("machines share one run directory: name it with --run-dir, the same on each")
    plan = _local_plan(target, nproc, max_restarts, nodes, check_endpoint(rdzv, nodes), rdzv_id, make=not dry_run)
    if dry_run:
        return _show(plan, mpi, hostfile)
    for note in plan.notes:
        console.err.print(note, markup=False)
    where = f"run directory {plan.run_dir}, logs of all ranks in {plan.logs}"
    console.err.print(f"{plan.nproc} processes; {where}", markup=False)
    if mpi:
        from tunesmith.launch.mpi import run_by_mpi

        return run_by_mpi(plan, hostfile, _say)
    from tunesmith.launch.agent import run_here

    return run_here(plan, _say)


def _meant(command: list[str]) -> str:
    """The command to type where `train` was left out or misspelt; empty where something else was meant."""
    if command[0].endswith((".yaml", ".yml")) or command[0].startswith("builtin:"):
        return f"; type: tunesmith launch train {shlex.join(command)}"
    return f"; type: tunesmith launch {shlex.join(['train', *command[1:]])}" if nearest(command[0], LAUNCHABLE) else ""


def _check_order(command: list[str]) -> None:
    """Raises: LaunchError for launch's own options behind `train`, with the command in the right order."""
    from tunesmith.cli.train import app as train_app

    if command[0] not in LAUNCHABLE:
        return  # a script's options are its own
    ours, theirs = (_options(typer.main.get_command(each)) for each in (app, train_app))
    moved, kept, words = [], [command[0]], iter(command[1:])
    for word in words:
        name, _, value = word.partition("=")
        if name not in ours or name in theirs:
            kept.append(word)
            continue
        moved.append(word)
        if not ours[name] and not value and (following := next(words, None)) is not None:
            moved.append(following)
    if moved:
        right = shlex.join(["tunesmith", "launch", *moved, *kept])
        raise LaunchError(f"options of launch stand before {command[0]}; type: {right}")


def _options(command: Any) -> dict[str, bool]:
    """The long options of a verb, and whether each is a switch, which takes no value."""
    return {name: bool(each.is_flag) for each in command.params for name in each.opts if name.startswith("--")}


def _check_kind(*, mpi: bool, slurm: bool, hostfile: Path | None, submit: bool) -> None:
    """Raises: LaunchError for options that do not go together."""
    if mpi and slurm:
        raise LaunchError("--mpi and --slurm are two ways to start: leave one out")
    if hostfile is not None and not mpi:
        raise LaunchError("--hostfile goes with --mpi; torch's launcher wants --nnodes and --rdzv instead")
    if submit and not slurm:
        raise LaunchError("--submit goes with --slurm")


class Target:
    """What is launched, and the run directory that all its processes and restarts share.

    Raises: LaunchError for what can't be launched; RecipeError, before any process is started.
    """

    def __init__(self, command: list[str], run_dir: Path | None, *, cpu: bool) -> None:
        from tunesmith.launch.plan import is_script

        self.is_script = is_script(command[0])
        if not self.is_script and command[0] not in LAUNCHABLE:
            raise LaunchError(f"launch runs train RECIPE ... or SCRIPT.py ..., not '{command[0]}'{_meant(command)}")
        self.command, self._run_dir, self._cpu = list(command), run_dir, cpu
        self.recipe: Recipe | None = None
        self.switches = [word for word in command if word in ("--verify", "--no-verify")]
        self.is_named = run_dir is not None
        if self.is_script:
            self._check_script()
        else:
            self._read_train(cpu)

    @property
    def name(self) -> str:
        """What the run is called."""
        return Path(self.command[0]).stem if self.recipe is None else self.recipe.name

    @property
    def uses_no_gpu(self) -> bool:
        """Whether --cpu or the recipe says so."""
        return self._cpu or (self.recipe is not None and self.recipe.model.device == "cpu")

    def _check_script(self) -> None:
        if not Path(self.command[0]).is_file():
            raise LaunchError(f"there is no script {self.command[0]}")

    def _read_train(self, cpu: bool) -> None:
        """The recipe and, where it is named, the run directory of `train ...`."""
        from tunesmith.cli.train import read_target

        if cpu:
            self.command += ["--set", "model.device=cpu"]
        if self._run_dir is not None:
            self.command += ["--run-dir", str(self._run_dir)]
        self.recipe, named = read_target(self.command[1:])
        if named is not None:
            self._run_dir, self.is_named = named, True

    def claim(self, *, make: bool) -> Path:
        """The run directory; from here on the command names it. Args: make: whether the folder is made."""
        from tunesmith.rundir.layout import claim_run, new_run_path

        output = "runs" if self.recipe is None else self.recipe.output
        path = claim_run(output, self.name, self._run_dir) if make else self._run_dir or new_run_path(output, self.name)
        if self._run_dir is None and not self.is_script:
            self.command += ["--run-dir", str(path)]
        self._run_dir = path
        return path

    def arguments(self) -> list[str]:
        """What every process is told."""
        return self.command if self.is_script else [self.command[0], *_flags(), *self.command[1:]]

    def frozen_arguments(self, logs: Path, *, make: bool) -> list[str]:
        """As `arguments`, by a copy of the recipe: one that is edited while the job waits does not change the job."""
        from tunesmith.rundir.io import write_text_atomic

        if make:
            logs.mkdir(parents=True, exist_ok=True)
        if self.recipe is None:
            return self.arguments()
        copy = logs / "recipe.yaml"
        if make:
            write_text_atomic(copy, self.recipe.to_yaml())
        assert self._run_dir is not None
        return ["train", *_flags(), str(copy), *self.switches, "--run-dir", str(self._run_dir.resolve())]


def _flags() -> list[str]:
    return (["--debug"] if console.is_debug() else []) + (["--json"] if console.is_json() else [])


def _local_plan(
    target: Target,
    nproc: str,
    max_restarts: int,
    nodes: tuple[int, int],
    rendezvous: str | None,
    rendezvous_id: str,
    *,
    make: bool,
) -> Plan:
    from tunesmith.launch import cards
    from tunesmith.launch.plan import (
        DEBUG_NOTE,
        LOGS,
        Plan,
        count_processes,
        debug_environment,
        environment_for,
        rank_command,
    )

    cpu = target.uses_no_gpu
    library = None if cpu else cards.driver()
    count, note = count_processes(nproc, cpu=cpu, gpus=cards.gpu_count(library))
    environment, notes = environment_for(count, cpu=cpu, library=library)
    run_dir = target.claim(make=make)
    if console.is_debug():
        environment |= debug_environment(run_dir.resolve() / LOGS)
        notes = [*notes, DEBUG_NOTE]
    return Plan(
        command=rank_command(RANK, target.arguments(), run_dir / LOGS),
        run_dir=run_dir,
        nproc=count,
        nodes=nodes,
        rendezvous=rendezvous,
        rendezvous_id=rendezvous_id,
        max_restarts=max_restarts,
        environment=environment,
        notes=tuple(line for line in (note, *notes) if line is not None),
    )


def _processes_of_a_node(nproc: str) -> int:
    """Raises: LaunchError for "auto": the nodes are not there to be asked."""
    if not nproc.isdigit() or int(nproc) < 1:
        raise LaunchError(f"with --slurm say how many processes, and so GPUs, a node has: --nproc 8; got {nproc!r}")
    return int(nproc)


def _slurm(job: Job, target: Target, *, submit: bool, dry_run: bool) -> int:
    """Write the job's script into the run directory, or with `dry_run` to stdout; submit it if asked."""
    from tunesmith.launch.plan import LOGS
    from tunesmith.launch.slurm import script
    from tunesmith.launch.slurm import submit as submit_script

    run_dir = target.claim(make=not dry_run).resolve()
    logs = run_dir / LOGS
    text = script(job, RANK, target.frozen_arguments(logs, make=not dry_run), run_dir, Path.cwd())
    if dry_run:
        console.out.print(text, markup=False)
        return 0
    path = logs / "job.sbatch"
    path.write_text(text, encoding="utf-8")
    number = submit_script(path) if submit else None
    if number is None:
        console.err.print(f"written: {path}\nsubmit it with: sbatch {shlex.quote(str(path))}", markup=False)
    else:
        console.err.print(f"job {number}, its script and logs: {logs}", markup=False)
    console.emit({"script": path, "job": number, "run_dir": run_dir})
    return 0


def _show(plan: Plan, mpi: bool, hostfile: Path | None) -> int:
    """Print what a launch would run: mpirun's command, or the same as a command of torch's own launcher."""
    from tunesmith.launch.mpi import meeting_place, mpirun_command, read_hosts
    from tunesmith.launch.plan import shell_line

    for note in plan.notes:
        console.err.print(note, markup=False)
    command, environment = plan.torchrun(), dict(plan.environment)
    if mpi:
        environment |= meeting_place([] if hostfile is None else read_hosts(hostfile))
        command = mpirun_command(plan, hostfile, environment)
    if not console.is_json():
        console.out.print(shell_line(command, environment), markup=False)
    console.emit({"command": command, "environment": environment, "run_dir": plan.run_dir})
    return 0


def _say(line: str) -> None:
    console.err.print(f"tunesmith: {line}", markup=False)
