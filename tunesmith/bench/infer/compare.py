"""Engines x weight formats x rounds, each in a fresh process, in turn; one run directory with one table.

cells/<engine>-<format>-<round>.json   what one process measured (schema tunesmith.bench.infer.cell)
infer.json                             the key (chip, driver, torch, commit) and the rows of table.py
logs/<engine>-<format>-<round>.log     the end of what the process wrote
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tunesmith.arch import read_raw_config
from tunesmith.bench.infer.checkpoint import write_random
from tunesmith.bench.infer.processes import Heard, run_runner
from tunesmith.bench.infer.staging import stage_runners
from tunesmith.bench.infer.table import OURS, SCHEMA, VERSION, key_of, make_table
from tunesmith.bench.infer.workload import KINDS, InferWorkload, make_job_measures
from tunesmith.bench.machine import machine_load
from tunesmith.checkpoint.source import resolve_model
from tunesmith.errors import RecipeError, nearest
from tunesmith.hardware import cpu_name
from tunesmith.rundir.io import jsonable, read_json, write_json_atomic, write_text_atomic
from tunesmith.rundir.layout import RunDir, create_run

FORMATS = ("float32", "bf16", "fp16", "fp8", "int8", "w8a8", "int4", "nf4")
PEERS: Mapping[str, str] = {
    "vllm": "tunesmith.bench.infer.peers.vllm",
    "vllm-cpu": "tunesmith.bench.infer.peers.vllm_cpu",
    "transformers": "tunesmith.bench.infer.peers.transformers",
    "transformers-continuous": "tunesmith.bench.infer.peers.transformers_continuous",
    "llama.cpp": "tunesmith.bench.infer.peers.llama_cpp",
}
OURS_MODULE = "tunesmith.bench.infer.ours"
CACHES = (
    "TRITON_CACHE_DIR",
    "TORCHINDUCTOR_CACHE_DIR",
    "VLLM_CACHE_ROOT",
    "CUDA_CACHE_PATH",
    "FLASHINFER_WORKSPACE_BASE",
)
CELL_SCHEMA, CELL_VERSION = f"{SCHEMA}.cell", 1
Progress = Callable[[Mapping[str, Any]], None]


@dataclass(frozen=True)
class InferBench:
    """What is measured: the settings of `tunesmith bench infer`.

    weights     checkpoint: MODEL's own; random: each engine draws its own in place; written: drawn once, written to a
                temporary folder, loaded by all
    peer_python, peer_path   the interpreter, or a folder of packages for ours, that a peer is found in
    options     keywords of tunesmith.LLM; peer_options: of a peer's engine, by its name
    cold        every process finds its compile caches empty
    """

    model: str
    formats: tuple[str, ...] = ("bf16",)
    peers: tuple[str, ...] = ()
    weights: str = "checkpoint"
    device: str = "cpu"
    workload: InferWorkload = field(default_factory=InferWorkload)
    rounds: int = 1
    threads: int = 1
    temperature: float = 0.6
    max_model_len: int | None = None
    timeout_s: float = 1800.0
    cold: bool = True
    peer_python: Mapping[str, str] = field(default_factory=dict)
    peer_path: Mapping[str, Path] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    peer_options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    name: str = "infer"
    output: str = "runs"
    command: str = "tunesmith bench infer"

    def to_yaml(self) -> str:
        """The settings; questions by their number, and the weights as a recipe would say them."""
        shown = dataclasses.asdict(self)
        shown["workload"]["questions"] = len(self.workload.questions)
        random = "checkpoint" if self.weights == "checkpoint" else "random"
        plain = json.loads(json.dumps(jsonable(shown), default=str))
        return yaml.safe_dump({"bench_infer": plain, "model": {"weights": random}}, sort_keys=False)


@dataclass(frozen=True)
class InferResult:
    """Where the run is, its cells in the order they ran, and the rows of infer.json."""

    run_dir: Path
    cells: tuple[dict[str, Any], ...]
    rows: tuple[dict[str, Any], ...]

    @property
    def ours_measured(self) -> bool:
        """Whether tunesmith's own rows were measured in every format."""
        return all(row["status"] == "ok" for row in self.rows if row["engine"] == OURS)


def bench_infer(
    bench: InferBench,
    *,
    run_dir: Path | None = None,
    progress: Progress | None = None,
    modules: Mapping[str, str] | None = None,
    on_run: Callable[[Path], None] = lambda path: None,
) -> InferResult:
    """Measure tunesmith and peers in every format, round after round.

    Args: modules: the runners by name, ours included; None: all that there are. on_run: is told the run directory
    before anything is measured.
    Raises: RecipeError for what is not known; ModelError for a model that can't be read; TunesmithError where weights
    could not be written.
    """
    runners = modules or {OURS: OURS_MODULE, **PEERS}
    _check(bench, runners)
    directory = resolve_model(bench.model)
    measures = make_job_measures(bench.workload, int(read_raw_config(directory)["vocab_size"]))
    run = create_run(bench, kind="infer", path=run_dir)
    for folder in (run.cells, run.path / "logs"):
        folder.mkdir()
    on_run(run.path)
    busy = machine_load()
    run.set_status("running", machine=busy)
    cells: list[dict[str, Any]] = []
    try:
        with tempfile.TemporaryDirectory(prefix="tunesmith-infer-") as scratch:
            jobs = _Jobs(bench, directory, Path(scratch), measures, runners)
            for cell in _run_all(bench, jobs, run):
                cells.append(cell)
                rows = _write_table(run, bench, cells, busy)  # a run that is stopped keeps what it has
                (progress or (lambda cell: None))(cell)
    except BaseException as error:
        run.set_status(
            "interrupted" if isinstance(error, KeyboardInterrupt | SystemExit) else "failed", error=str(error) or None
        )
        raise
    run.set_status("finished")
    return InferResult(run.path, tuple(cells), tuple(rows))


def _check(bench: InferBench, runners: Mapping[str, str]) -> None:
    known = [name for name in runners if name != OURS]
    for name in [*bench.peers, *bench.peer_python, *bench.peer_path]:
        if name not in known:
            raise RecipeError(f"there is no peer {name!r}{nearest(name, known)} (there are: {', '.join(known)})")
    for name in bench.formats:
        if name not in FORMATS:
            raise RecipeError(f"there is no format {name!r}{nearest(name, FORMATS)} (there are: {', '.join(FORMATS)})")
    for kind in bench.workload.kinds:
        if kind not in KINDS:
            raise RecipeError(f"there is no measure {kind!r}{nearest(kind, KINDS)} (there are: {', '.join(KINDS)})")
    if bench.weights not in ("checkpoint", "random", "written"):
        raise RecipeError(f"--weights is checkpoint, random or written, got {bench.weights!r}")
    if not bench.formats or not bench.workload.kinds or bench.rounds < 1:
        raise RecipeError("an engine comparison takes at least one format, one measure and one round")


@dataclass(frozen=True)
class _Jobs:
    """What all processes of a run share."""

    bench: InferBench
    directory: Path
    scratch: Path
    measures: Mapping[str, Any]
    runners: Mapping[str, str]

    def job(self, engine: str, name: str) -> dict[str, Any]:
        """The job of one process. Weights that are to be written are, the first time that anyone wants them."""
        bench = self.bench
        directory = self.directory
        if bench.weights == "written":
            directory = self.scratch / "weights"
            if not directory.exists():
                write_random(self.directory, directory, "float32" if "float32" in bench.formats else "bfloat16")
        shared = self.scratch / "shared"
        shared.mkdir(exist_ok=True)
        return {
            "model": str(directory),
            "weights": "random" if bench.weights == "random" else "checkpoint",
            "format": name,
            "device": bench.device,
            "threads": bench.threads,
            "temperature": bench.temperature,
            "max_model_len": bench.max_model_len or bench.workload.longest,
            "scratch": str(shared),
            "options": dict(bench.options if engine == OURS else bench.peer_options.get(engine, {})),
            **self.measures,
        }

    def command(self, engine: str) -> list[str]:
        """What is started: the peer's own Python, or this one."""
        python = self.bench.peer_python.get(engine, sys.executable)
        return [python, "-m", self.runners[engine]]

    def environment(self, engine: str, cell: str) -> dict[str, str]:
        """Threads, no Hub, the packages that the engine gets, and caches that are empty where that is asked for."""
        paths = [str(Path(__file__).resolve().parents[3])] if engine == OURS else [str(self._staged())]
        if engine in self.bench.peer_path:
            paths.insert(0, str(self.bench.peer_path[engine].absolute()))
        if engine not in self.bench.peer_python and os.environ.get("PYTHONPATH"):
            paths.append(os.environ["PYTHONPATH"])
        caches = self.scratch / "caches" / (cell if self.bench.cold else "all")
        return {
            "PYTHONPATH": os.pathsep.join(paths),
            "PYTHONUNBUFFERED": "1",
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": str(self.bench.threads),
            **{variable: str(caches / variable.lower()) for variable in CACHES},
        }

    def _staged(self) -> Path:
        folder = self.scratch / "runners"
        return folder if folder.exists() else stage_runners(folder)


def _run_all(bench: InferBench, jobs: _Jobs, run: RunDir) -> Iterator[dict[str, Any]]:
    environment = read_json(run.environment)
    for round_ in range(bench.rounds):
        for name in bench.formats:
            engines = (OURS, *bench.peers)
            # Every second round backwards: what warms up or wears out the machine hits all engines alike.
            for engine in engines if round_ % 2 == 0 else tuple(reversed(engines)):
                cell = _run_one(bench, jobs, run, engine, name, round_)
                yield _keep(run, {**cell, "environment": environment})


def _run_one(bench: InferBench, jobs: _Jobs, run: RunDir, engine: str, name: str, round_: int) -> dict[str, Any]:
    stem = f"{engine}-{name}-{round_}"
    heard = run_runner(
        jobs.command(engine),
        jobs.job(engine, name),
        environment=jobs.environment(engine, stem),
        timeout_s=bench.timeout_s,
    )
    write_text_atomic(run.path / "logs" / f"{stem}.log", heard.log_tail)
    return {
        "schema": CELL_SCHEMA,
        "schema_version": CELL_VERSION,
        "name": stem,
        "engine": engine,
        "format": name,
        "round": round_,
        "status": heard.status,
        "reason": heard.reason,
        "command": bench.command,
        **_measured(heard),
    }


def _measured(heard: Heard) -> dict[str, Any]:
    ready, done = heard.event("ready"), heard.event("done")
    first = heard.at_s.get("first_token")
    samples = [{k: v for k, v in event.items() if k != "event"} for event in heard.events if event["event"] == "sample"]
    return {
        "first_token_s": None if first is None else first - ready.get("prepare_s", 0.0),
        "import_s": heard.at_s.get("started"),
        "start_s": ready.get("start_s"),
        "samples": samples,
        "facts": done.get("facts") or {},
        "versions": done.get("versions") or {},
        "resident_peak_bytes": heard.resident_peak_bytes,
        "device_used_peak_bytes": heard.device_used_peak_bytes,
        "wall_s": heard.wall_s,
    }


def _keep(run: RunDir, cell: dict[str, Any]) -> dict[str, Any]:
    write_json_atomic(run.cells / f"{cell['name']}.json", cell)
    return cell


def _write_table(
    run: RunDir, bench: InferBench, cells: Sequence[Mapping[str, Any]], busy: Mapping[str, Any]
) -> list[dict[str, Any]]:
    environment = read_json(run.environment)
    gpus = environment.get("gpus") or []
    chip = cpu_name() if bench.device == "cpu" or not gpus else gpus[0].get("name")
    rows = make_table(cells)
    table = {
        "schema": SCHEMA,
        "schema_version": VERSION,
        "key": {**key_of(environment, chip), "model": Path(bench.model).name, "weights": bench.weights},
        "command": bench.command,
        "machine": dict(busy),
        "rows": rows,
    }
    write_json_atomic(run.path / "infer.json", table)
    return rows
