"""`bench serve`: latency, throughput and goodput of a server under load: tunesmith's, or any that speaks OpenAI's."""

from __future__ import annotations

import contextlib
import os
import shlex
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tunesmith.cli import console

if TYPE_CHECKING:
    from tunesmith.bench.serve.arrivals import Mode, Point
    from tunesmith.bench.serve.workload import Workload
    from tunesmith.cli.bench_watch import LoadProgress

HIDDEN = "***"
QUICK_CONCURRENCY, QUICK_REQUESTS = "1,4", 16
"""What is sent where no load is named: a look of seconds to minutes, also at a server on a CPU."""
KEY_VARIABLES = ("TUNESMITH_API_KEY", "OPENAI_API_KEY")


def serve(
    model: Annotated[
        str | None, typer.Argument(help="a model that tunesmith serves for this run; or see --url and --start")
    ] = None,
    url: Annotated[str | None, typer.Option(help="a server that is up, as http://127.0.0.1:8000")] = None,
    start: Annotated[
        str | None, typer.Option(help="a server to start, as 'vllm serve DIR --port {port}'; ended after the run")
    ] = None,
    serve_args: Annotated[str, typer.Option(help="options for tunesmith serve MODEL, in one text")] = "",
    served_model: Annotated[str | None, typer.Option(help="the model's name there; else the first it lists")] = None,
    api_key: Annotated[str | None, typer.Option(help="else TUNESMITH_API_KEY or OPENAI_API_KEY")] = None,
    workload: Annotated[str, typer.Option(help="synthetic, sharegpt, azure or gsm8k")] = "synthetic",
    data: Annotated[Path | None, typer.Option(help="the data's file or folder, for all but synthetic")] = None,
    num: Annotated[
        int | None, typer.Option(min=1, help="requests of every load; else 256, or 16 if none is named")
    ] = None,
    prompt_tokens: Annotated[
        str | None, typer.Option(help="synthetic: prompt lengths, from..to; else 100..1024, or what the context holds")
    ] = None,
    output_tokens: Annotated[str | None, typer.Option(help="tokens asked for, from..to; else as the data say")] = None,
    max_model_len: Annotated[
        int | None, typer.Option(help="leave longer requests out; else as the server says")
    ] = None,
    num_ids: Annotated[int | None, typer.Option(help="token ids stay below it; else what the server takes")] = None,
    rate: Annotated[str | None, typer.Option(help="open loop: requests a second, as 1,2,4,inf (all at once)")] = None,
    concurrency: Annotated[
        str | None, typer.Option(help="closed loop: requests in flight, as 1,8,32; 1,4 if no load is named")
    ] = None,
    replay: Annotated[str | None, typer.Option(help="the data's own times, this many times as fast, as 1,2")] = None,
    max_seconds: Annotated[float | None, typer.Option(help="no load sends for longer (rate, replay)")] = None,
    slo: Annotated[str, typer.Option(help="what counts as good, as ttft:200ms,tpot:50ms,e2e:10s")] = "",
    warmup: Annotated[int, typer.Option(min=0, help="requests before every load, not counted")] = 8,
    repeats: Annotated[int, typer.Option(min=1, help="times that every load runs")] = 1,
    temperature: Annotated[float | None, typer.Option(help="what is asked for")] = 0.6,
    ignore_eos: Annotated[bool, typer.Option(help="answers as long as asked for; not every server knows it")] = True,
    timeout: Annotated[float, typer.Option(min=1, help="seconds for one request")] = 600.0,
    start_timeout: Annotated[float, typer.Option(min=1, help="seconds for the server to come up")] = 600.0,
    client_processes: Annotated[int, typer.Option(min=1, help="processes that send, a core each")] = 1,
    seed: Annotated[int, typer.Option(help="of lengths, ids and arrivals")] = 0,
    name: Annotated[str, typer.Option(help="what the report calls this server")] = "serve",
    output: Annotated[Path | None, typer.Option(help="the run directory (new or empty)")] = None,
    report: Annotated[bool, typer.Option(help="write report.html into the run directory")] = True,
    language: Annotated[str, typer.Option(help="the report's language: en, zh; auto: of your locale")] = "auto",
) -> int:
    """Load a server and say what its callers see: TTFT, TPOT, ITL, end to end, throughput, goodput, errors.

    Latencies count from when a request was due, not from when it could be sent. Without a load, a short look: 16
    requests at 1 and at 4 in flight. Exit codes: 0 every load had answers, 1 at least one had none.
    """
    from tunesmith.bench.serve.measures import parse_slo
    from tunesmith.bench.serve.run import ServeBench, Watch, bench_serve
    from tunesmith.bench.serve.target import normal_url
    from tunesmith.cli.bench_watch import LoadProgress
    from tunesmith.report.strings import words_for

    words_for(language)
    loads = points(rate, concurrency, replay)
    is_quick = not loads
    if is_quick:
        loads = points(None, QUICK_CONCURRENCY, None)
        num = num or QUICK_REQUESTS

    def begin(run_dir: Path) -> None:
        kept.append(run_dir)
        if is_quick:
            _say_note(
                f"no load was named: a short look of {num} requests at 1 and at 4 in flight; for a measurement: "
                "--concurrency 1,8,32 --num 256, or --rate 1,2,4"
            )

    progress = LoadProgress()
    with whole_cells_kept() as kept, progress.running():
        result = bench_serve(
            ServeBench(
                points=loads,
                workload=_workload(
                    workload,
                    data,
                    num or 256,
                    is_quick,
                    prompt_tokens,
                    output_tokens,
                    seed,
                    _ids(num_ids, model),
                    max_model_len,
                ),
                url=None if url is None else normal_url(url),
                start=_start(model, url, start, serve_args),
                model=served_model,
                api_key=api_key or next((os.environ[k] for k in KEY_VARIABLES if os.environ.get(k)), None),
                objectives=parse_slo(slo),
                warmup=warmup,
                repeats=repeats,
                temperature=temperature,
                ignore_eos=ignore_eos,
                timeout_s=timeout,
                start_timeout_s=start_timeout,
                max_seconds=max_seconds,
                client_processes=client_processes,
                seed=seed,
                name=name,
                command=_typed(),
            ),
            run_dir=output,
            watch=Watch(begin, _say_note, progress.begin, lambda cell: _say_ended(progress, cell)),
        )
    points_found = [_brief(cell) for cell in result.cells]
    if not result.num_ok:
        reason = result.cells[0]["reason"]
        console.err.print(f"tunesmith: error: {reason}; what was sent is in {result.run_dir}", markup=False)
        console.emit({"error": reason, "run_dir": result.run_dir, "report": None, "points": points_found})
        return 1
    page = write_page(result.run_dir, language) if report else None
    console.emit({"run_dir": result.run_dir, "report": page, "points": points_found})
    return 0 if result.num_ok == len(result.cells) else 1


@contextlib.contextmanager
def whole_cells_kept() -> Iterator[list[Path]]:
    """Ctrl-C and SIGTERM end the processes that were started; what was measured stays in the run directory, which the
    list that this gives is told of."""
    from tunesmith.train.stopping import sigterm_exits

    kept: list[Path] = []
    try:
        with sigterm_exits():
            yield kept
    except (KeyboardInterrupt, SystemExit) as stop:
        code = stop.code if isinstance(stop, SystemExit) and isinstance(stop.code, int) else 130
        raise console.StoppedError(_what_is_kept(kept), code) from None


def _what_is_kept(runs: list[Path]) -> str:
    if not runs:
        return "nothing was measured yet"
    run = runs[-1]
    if not any((run / "cells").glob("*.json")):
        return f"nothing was measured yet; the settings are in {run}"
    return f"what was measured is kept in {run}; to see it: tunesmith report {run}"


def points(rate: str | None, concurrency: str | None, replay: str | None) -> tuple[Point, ...]:
    """The loads, in the order of the options. Raises: RecipeError."""
    from tunesmith.bench.serve.arrivals import Point

    given: tuple[tuple[Mode, str | None], ...] = (("open", rate), ("closed", concurrency), ("trace", replay))
    return tuple(Point(mode, value) for mode, text in given if text for value in _values(mode, text))


def _values(mode: str, text: str) -> list[float]:
    from tunesmith.errors import RecipeError

    try:
        values = [float(word) for word in text.replace(",", " ").split()]
    except ValueError:
        values = []
    whole = mode != "closed" or all(value == int(value) for value in values if value < float("inf"))
    if not values or min(values) <= 0 or not whole or (mode != "open" and max(values) == float("inf")):
        raise RecipeError(f"a load is numbers above 0, as 1,2,4 (whole ones for --concurrency); got {text!r}")
    return values


def span(text: str) -> tuple[int, int]:
    """The two bounds of "100..1024", or of one number. Raises: RecipeError."""
    from tunesmith.errors import RecipeError

    low, _, high = text.partition("..")
    words = (low, high or low)
    if not all(word.isdecimal() and int(word) > 0 for word in words) or int(words[0]) > int(words[1]):
        raise RecipeError(f"lengths are FROM..TO or one number, as 100..1024; got {text!r}")
    return int(words[0]), int(words[1])


def _workload(
    kind: str,
    data: Path | None,
    num: int,
    is_quick: bool,
    prompt_tokens: str | None,
    output_tokens: str | None,
    seed: int,
    num_ids: int | None,
    max_model_len: int | None,
) -> Workload:
    from tunesmith.bench.serve.workload import KINDS, Workload
    from tunesmith.errors import RecipeError, nearest

    found = next((known for known in KINDS if known == kind), None)
    if found is None:
        raise RecipeError(f"--workload {kind!r} is not one of {', '.join(KINDS)}{nearest(kind, KINDS)}")
    outputs = None if output_tokens is None else span(output_tokens)
    prompts = None if prompt_tokens is None else span(prompt_tokens)
    return Workload(found, data, num, prompts, outputs, seed, num_ids, max_model_len, is_quick)


def _ids(num_ids: int | None, model: str | None) -> int | None:
    """The vocabulary's size, where a model is named whose configuration is here."""
    from tunesmith.arch import read_raw_config
    from tunesmith.checkpoint.source import resolve_model
    from tunesmith.rundir.layout import is_run

    if num_ids is not None or model is None or is_run(Path(model)):
        return num_ids
    size = read_raw_config(resolve_model(model)).get("vocab_size")
    return size if isinstance(size, int) else None


def _start(model: str | None, url: str | None, start: str | None, serve_args: str) -> tuple[str, ...]:
    from tunesmith.bench.serve.target import PORT, serve_command
    from tunesmith.errors import RecipeError

    if sum(one is not None for one in (model, url, start)) != 1:
        raise RecipeError("name one server: a MODEL that tunesmith serves, --url of one that is up, or --start COMMAND")
    if model is not None:
        return tuple(serve_command(model, shlex.split(serve_args)))
    if start is not None and PORT not in start:
        raise RecipeError(f"--start must say where the port goes: write {PORT} in it")
    return tuple(shlex.split(start)) if start is not None else ()


def _typed() -> str:
    """The command line; a key in it is hidden there too, since a run directory keeps it."""
    for index, word in enumerate(sys.argv):
        if word.startswith("--api-key="):
            sys.argv[index] = f"--api-key={HIDDEN}"
        elif index and sys.argv[index - 1] == "--api-key":
            sys.argv[index] = HIDDEN
    return shlex.join(["tunesmith", *sys.argv[1:]])


def _brief(cell: Mapping[str, Any]) -> dict[str, Any]:
    measures, client = cell["measures"], cell["client"]
    keys = ("requests", "completed", "requests_per_s", "output_tokens_per_s", "ttft_s", "tpot_s", "e2e_s", "goodput")
    found = {key: measures[key] for key in keys}
    return {"name": cell["name"], "status": cell["status"], "saturated": client["saturated"], **found}


def _say_note(note: str) -> None:
    console.err.print(note, markup=False)


def _say_ended(progress: LoadProgress, cell: Mapping[str, Any]) -> None:
    progress.end()
    _say_point(cell)


def _say_point(cell: Mapping[str, Any]) -> None:
    """A line on stderr for a load that has ended."""
    from rich.markup import escape

    from tunesmith.units import format_count, format_seconds

    measures, saturated = cell["measures"], cell["client"]["saturated"]
    if cell["status"] == "ok":
        ttft, tpot = measures["ttft_s"], measures["tpot_s"]
        parts = [f"{format_count(measures['output_tokens_per_s'])} output tokens/s"]
        parts.append(f"TTFT p50 {format_seconds(ttft['p50'])}, p99 {format_seconds(ttft['p99'])}")
        parts += [f"TPOT p50 {format_seconds(tpot['p50'])}"] if tpot["p50"] is not None else []
        ratio = measures["goodput"]["good_ratio"]
        parts += [f"good {ratio * 100:.1f} %"] if ratio is not None else []
        bad = measures["requests"] - measures["completed"]
        parts += [f"{bad} errors"] if bad else []
        how = ", ".join(parts)
    else:
        how = f"{cell['status']}: {cell['reason']}"
    console.err.print(f"{cell['name']}: {escape(how)}")
    if whole := measures["answers_whole"]:
        console.err.print(
            f"  {whole} of {measures['completed']} answers came whole, faster than they were read: "
            "their time per token is unknown",
            markup=False,
        )
    if saturated:
        console.err.print(f"  [yellow]may have measured the client, not the server:[/yellow] {escape(saturated)}")


def write_page(run_dir: Path, language: str) -> Path:
    """The report of a run, its verdict on stderr and its path on stdout."""
    from rich.markup import escape

    from tunesmith.report.write import write_report

    files = write_report([run_dir], language=language)
    console.err.print(f"\n[bold]{escape(files.headline)}[/bold]")
    for sentence in files.sentences:
        console.err.print(f"  {escape(sentence)}")
    console.out.print(str(files.html), markup=False)
    return files.html
