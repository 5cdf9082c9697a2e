"""A server under several loads: every point warmed up, with prompts that no cache knows, in one run directory.

    cells/<point>-<repeat>.json      what the point's requests saw (schema tunesmith.bench.serve, below)
    requests/<point>-<repeat>.jsonl  every request: see record.py
    server.log                       of a server that was started for the run

A load that was stopped is a cell too, of the requests that had ended, with status "interrupted".

A cell: point (mode, value), repeat, status, reason, command, target (model, version, start_s), workload, notes, client
(cpu_ratio, loop_late_s, send_late_s, processes, saturated), measures (see measures.py), environment.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tunesmith.bench.machine import machine_load
from tunesmith.bench.serve.arrivals import Point, intended_times
from tunesmith.bench.serve.client import Ask
from tunesmith.bench.serve.fit import fit
from tunesmith.bench.serve.load import loop_name, run_warm_up
from tunesmith.bench.serve.measures import ClientLoad, Objective, summarise
from tunesmith.bench.serve.record import Record
from tunesmith.bench.serve.shards import divide, run_shares
from tunesmith.bench.serve.target import Target, find_target, started
from tunesmith.bench.serve.workload import Item, Workload, fresh, make_requests
from tunesmith.errors import RecipeError
from tunesmith.rundir.io import jsonable, read_json, write_json_atomic, write_text_atomic
from tunesmith.rundir.layout import RunDir, create_run

CELL_SCHEMA, CELL_VERSION = "tunesmith.bench.serve", 1
Progress = Callable[[Mapping[str, Any]], None]
WARM_UP_TOKENS = 16


def _nothing(*said: Any) -> None:
    """Tells nobody."""


@dataclass(frozen=True)
class Watch:
    """Who is told what while a run is measured.

    run: its directory, before anything is measured. note: a sentence about what is sent. load: a load begins: its name,
    how many requests it has, and the list that every record goes into when it has ended. cell: a load has ended.
    """

    run: Callable[[Path], None] = _nothing
    note: Callable[[str], None] = _nothing
    load: Callable[[str, int, list[Record]], None] = _nothing
    cell: Progress = _nothing


@dataclass(frozen=True)
class ServeBench:
    """What is measured: the settings of `tunesmith bench serve`.

    url: a server that is there; start: the command of one to start, with {port}; exactly one of the two.
    max_seconds: a point sends no more requests than arrive in that time (open and trace).
    """

    points: tuple[Point, ...]
    workload: Workload = dataclasses.field(default_factory=Workload)
    url: str | None = None
    start: tuple[str, ...] = ()
    model: str | None = None
    api_key: str | None = None
    objectives: tuple[Objective, ...] = ()
    warmup: int = 8
    repeats: int = 1
    temperature: float | None = 0.6
    ignore_eos: bool = True
    timeout_s: float = 600.0
    start_timeout_s: float = 600.0
    max_seconds: float | None = None
    client_processes: int = 1
    seed: int = 0
    name: str = "serve"
    output: str = "runs"
    command: str = "tunesmith bench serve"

    def to_yaml(self) -> str:
        """The settings, without the key."""
        shown = {k: v for k, v in dataclasses.asdict(self).items() if k != "api_key"}
        return yaml.safe_dump({"bench_serve": json.loads(json.dumps(jsonable(shown), default=str))}, sort_keys=False)


@dataclass(frozen=True)
class ServeResult:
    """Where the run is, and its cells in the order they ran."""

    run_dir: Path
    cells: tuple[dict[str, Any], ...]

    @property
    def num_ok(self) -> int:
        """Points of which at least one request was answered to the end."""
        return sum(cell["status"] == "ok" for cell in self.cells)


def bench_serve(bench: ServeBench, *, run_dir: Path | None = None, watch: Watch | None = None) -> ServeResult:
    """Measure a server at every point.

    Raises: RecipeError for settings that can't be; TunesmithError where the server can't be started or reached.
    """
    if (bench.url is None) == (not bench.start):
        raise RecipeError("name a server that is up with --url, or what to start: a MODEL, or --start COMMAND")
    if not bench.points:
        raise RecipeError("name a load: --rate 1,2,4, --concurrency 1,8,32 or --replay 1")
    make_requests(bench.workload)  # mistakes before a server is started
    run = create_run(bench, kind="serve", path=run_dir)
    run.cells.mkdir()
    (run.path / "requests").mkdir()
    watch = watch or Watch()
    watch.run(run.path)
    run.set_status("running", points=[point.name for point in bench.points], machine=machine_load())
    try:
        with _target(bench, run) as target:
            cells = list(_run_all(bench, run, target, watch))
    except BaseException as error:
        run.set_status(
            "interrupted" if isinstance(error, KeyboardInterrupt | SystemExit) else "failed", error=str(error) or None
        )
        raise
    run.set_status("finished", start_s=target.start_s, model=target.model)
    return ServeResult(run.path, tuple(cells))


@contextlib.contextmanager
def _target(bench: ServeBench, run: RunDir) -> Iterator[Target]:
    if bench.url is not None:
        yield find_target(bench.url, bench.model, bench.api_key)
        return
    log = run.path / "server.log"
    key, timeout_s = bench.api_key, bench.start_timeout_s
    with started(bench.start, log=log, timeout_s=timeout_s, api_key=key, model=bench.model) as target:
        yield target


def _run_all(bench: ServeBench, run: RunDir, target: Target, watch: Watch) -> Iterator[dict[str, Any]]:
    workload, changes = fit(bench.workload, target, bench.api_key, bench.timeout_s)
    requests = make_requests(workload)
    notes = [*changes, *requests.notes]
    for note in notes:
        watch.note(note)
    environment = read_json(run.environment)
    salt = 0
    for repeat in range(bench.repeats):
        # Every second round backwards: what warms up or wears out the machine hits all loads alike.
        for point in bench.points if repeat % 2 == 0 else tuple(reversed(bench.points)):
            salt += 1
            cell = {**_start(bench, point, repeat, target, workload, notes), "environment": environment}
            cell = _run_point(bench, run, target, requests.items, point, cell, salt, watch)
            watch.cell(cell)
            yield cell


def _start(
    bench: ServeBench, point: Point, repeat: int, target: Target, workload: Workload, notes: Sequence[str]
) -> dict[str, Any]:
    described = dataclasses.asdict(workload)
    return {
        "schema": CELL_SCHEMA,
        "schema_version": CELL_VERSION,
        "name": point.name,
        "point": {"mode": point.mode, "value": point.value},
        "repeat": repeat,
        "status": "failed",
        "reason": None,
        "command": bench.command,
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "target": dataclasses.asdict(target),
        "workload": {**described, "data": None if workload.data is None else workload.data.name},
        "sampling": {"temperature": bench.temperature, "ignore_eos": bench.ignore_eos},
        "notes": list(notes),
    }


def _run_point(
    bench: ServeBench,
    run: RunDir,
    target: Target,
    items: Sequence[Item],
    point: Point,
    cell: dict[str, Any],
    salt: int,
    watch: Watch,
) -> dict[str, Any]:
    ask = Ask(target.url, target.model, bench.api_key, bench.temperature, bench.ignore_eos, bench.timeout_s)
    items = fresh(items, salt)
    times = intended_times(point, items, bench.seed + cell["repeat"])
    if times is not None and bench.max_seconds is not None:
        times = [at for at in times if at <= bench.max_seconds]
        items = items[: len(times)]
    failed = _warm_up(ask, items, bench.warmup, salt)
    concurrency = int(point.value) if point.mode == "closed" else len(items)
    cell["warm_up"] = {"sent": min(bench.warmup, len(items)), "failed": failed}
    ended: list[Record] = []
    watch.load(point.name, len(items), ended)
    try:
        records, client = run_shares(ask, divide(items, times, concurrency, bench.client_processes), ended.append)
    except (KeyboardInterrupt, SystemExit):
        if ended:
            _write_cell(run, {**cell, **_stopped(ended, len(items), bench.objectives)}, ended)
        raise
    return _write_cell(run, {**cell, **_judged(records, client, bench.objectives)}, records)


def _write_cell(run: RunDir, cell: dict[str, Any], records: Sequence[Record]) -> dict[str, Any]:
    name = f"{cell['name']}-{cell['repeat']}"
    _write_requests(run.path / "requests" / f"{name}.jsonl", records)
    write_json_atomic(run.cells / f"{name}.json", cell)
    return cell


def _stopped(ended: Sequence[Record], total: int, objectives: Sequence[Objective]) -> dict[str, Any]:
    """A load that was interrupted: what the requests saw that had ended. Nobody asked how busy the client was."""
    reason = f"stopped after {len(ended)} of {total} requests"
    measures = summarise(ended, objectives)
    return {"status": "interrupted", "reason": reason, "measures": measures, "client": {"saturated": None}}


def _warm_up(ask: Ask, items: Sequence[Item], count: int, salt: int) -> int:
    """Send some short requests with prompts of their own. Returns: how many failed."""
    first = fresh(items[:count], salt + 4000)
    short = [dataclasses.replace(item, max_tokens=min(item.max_tokens, WARM_UP_TOKENS)) for item in first]
    return sum(not record.is_ok for record in run_warm_up(ask, short)) if short else 0


def _judged(records: Sequence[Record], client: ClientLoad, objectives: Sequence[Objective]) -> dict[str, Any]:
    measures = summarise(records, objectives)
    busy = {**dataclasses.asdict(client), "saturated": client.saturated, "loop": loop_name()}
    if measures["completed"]:
        return {"status": "ok", "reason": None, "measures": measures, "client": busy}
    reason = next(iter(measures["errors"]), "no request was sent")
    reason += "; --num-ids N sends token ids below N" if "token id" in reason.lower() else ""
    return {"status": "failed", "reason": f"no request was answered: {reason}", "measures": measures, "client": busy}


def _write_requests(path: Path, records: Sequence[Record]) -> None:
    """Every request of a point; microseconds are kept, since no clock here knows more."""
    lines = []
    for record in records:
        plain = record.plain()
        plain["contents_s"] = [round(at, 6) for at in record.contents_s]
        lines.append(json.dumps(plain))
    write_text_atomic(path, "\n".join(lines) + "\n")
