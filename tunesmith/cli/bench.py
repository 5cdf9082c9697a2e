"""`bench train`: a matrix of methods in equal conditions; `peers`: beside other libraries; `scale`: on 1, 2, 4 GPUs;
`serve`: a server under load; `infer`: engines without one."""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tunesmith.cli import bench_infer, bench_serve, console

if TYPE_CHECKING:
    from tunesmith.bench.matrix import BenchResult
    from tunesmith.bench.scale import Extension, Modes, ScaleResult

app = typer.Typer(add_completion=False, no_args_is_help=True)


@app.callback()
def bench() -> None:
    """Measure training, serving and inference, each on equal terms and in fresh processes."""


@app.command()
def train(
    recipe: Annotated[Path, typer.Argument(help="the recipe; its bench section says how many steps and repeats")],
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="KEY=VALUE over the recipe, such as bench.repeats=3")
    ] = None,
    matrix: Annotated[str | None, typer.Option(help="methods, ladder or grid; else the recipe's")] = None,
    only: Annotated[str | None, typer.Option(help="cells to run, separated by spaces: --only 'full lora'")] = None,
    output: Annotated[Path | None, typer.Option(help="the run directory (new or empty)")] = None,
    report: Annotated[bool, typer.Option(help="write report.html into the run directory")] = True,
    language: Annotated[str, typer.Option(help="the report's language: en, zh; auto: of your locale")] = "auto",
) -> int:
    """Train every cell of a matrix for a few steps: time, memory by owner, losses, one JSON per cell.

    Exit codes: 0 at least one cell was measured, 1 none was.
    """
    from tunesmith.bench.display import BenchDisplay
    from tunesmith.bench.matrix import bench as run_bench
    from tunesmith.recipe.load import load_recipe
    from tunesmith.report.strings import words_for

    words_for(language)
    loaded = load_recipe(recipe, overrides or [])
    with BenchDisplay(console.err) as display:
        result = run_bench(
            loaded,
            matrix,
            only=split_names(only),
            run_dir=output,
            command=_command(recipe, overrides or [], matrix),
            progress=display,
        )
    page = _report(result, language) if report else None
    facts = {"run_dir": result.run_dir, "cells": len(result.cells), "ok": result.num_ok, "report": page}
    console.emit(facts)
    return 0 if result.num_ok else 1


@app.command()
def peers(
    recipe: Annotated[
        Path | None, typer.Argument(help="one row: a recipe with its method; not needed for --table")
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="KEY=VALUE over the recipe, such as bench.steps=30")
    ] = None,
    names: Annotated[
        str, typer.Option("--peers", help="who runs beside tunesmith")
    ] = "transformers,liger,bitsandbytes,unsloth,trl",
    rounds: Annotated[int, typer.Option(min=1, help="rounds of A B C, each run in a fresh process")] = 2,
    out: Annotated[Path, typer.Option(help="folder of the records, which add up")] = Path("benchmarks/results/peers"),
    peer_path: Annotated[
        list[str] | None, typer.Option("--peer-path", help="NAME=DIR: a folder of packages that only this peer gets")
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="tokenizer folder for peers that load a checkpoint of random weights")
    ] = None,
    table: Annotated[bool, typer.Option("--table", help="only draw the table again, from the stored records")] = False,
) -> int:
    """Train one row by tunesmith and by other libraries, alternating, and say who was faster on equal work.

    Every run is a record below --out, written after each whole round; peers.md and peers.json there are drawn from all
    of them. A peer that is missing or fails is a row that says why.

    Exit codes: 0 tunesmith's row was measured (or the table drawn), 1 it was not; 130 and 143 stopped by Ctrl-C or
    SIGTERM, whole rounds kept.
    """
    from tunesmith.bench.peers.compare import compare
    from tunesmith.bench.peers.table import write_table
    from tunesmith.errors import RecipeError
    from tunesmith.recipe.load import load_recipe

    if table:
        _show_table(write_table(out), out, None)
        return 0
    if recipe is None:
        raise RecipeError("name a recipe (recipes/peers has some), or say --table to draw the stored records")
    with _whole_rounds_kept(out):
        result = compare(
            load_recipe(recipe, overrides or []),
            names.replace(",", " ").split(),
            rounds=rounds,
            out=out,
            peer_paths=_peer_paths(peer_path or []),
            tokenizer=tokenizer,
            command=_peers_command(recipe, overrides or [], names, rounds),
            progress=_say_row,
        )
    _show_table(write_table(out), out, result.path)
    return 0 if result.ours_measured else 1


@contextlib.contextmanager
def _whole_rounds_kept(out: Path) -> Iterator[None]:
    """Ctrl-C and SIGTERM end the runner that is at work, and say what was kept."""
    from tunesmith.train.stopping import sigterm_exits

    try:
        with sigterm_exits():
            yield
    except (KeyboardInterrupt, SystemExit) as stop:
        code = stop.code if isinstance(stop, SystemExit) and isinstance(stop.code, int) else 130
        message = f"whole rounds are kept in {out}; to draw them: tunesmith bench peers --table --out {out}"
        raise console.StoppedError(message, code) from None


@app.command()
def scale(
    recipe: Annotated[Path, typer.Argument(help="the recipe; its parallel section says how states are shared")],
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="KEY=VALUE over the recipe, such as parallel.strategy=ddp")
    ] = None,
    gpus: Annotated[str, typer.Option(help="numbers of GPUs to measure")] = "1,2,4",
    mode: Annotated[
        str, typer.Option(help="weak: the batch grows with the GPUs; strong: it stays; both: one after the other")
    ] = "weak",
    cpu: Annotated[bool, typer.Option("--cpu", help="CPU processes instead of GPUs")] = False,
    nodes: Annotated[int | None, typer.Option(min=2, help="extend the curve to so many nodes")] = None,
    network: Annotated[
        str | None, typer.Option(help="what each node has in all: 400Gb, 8x400Gb (bits per second), 50GB (bytes)")
    ] = None,
    latency_us: Annotated[float, typer.Option(min=0, help="a message between nodes, microseconds")] = 5.0,
    per_node: Annotated[int | None, typer.Option(min=1, help="GPUs of a node; else as many as were measured")] = None,
    output: Annotated[Path | None, typer.Option(help="the run directory (new or empty)")] = None,
    report: Annotated[bool, typer.Option(help="write report.html into the run directory")] = True,
    language: Annotated[str, typer.Option(help="the report's language: en, zh; auto: of your locale")] = "auto",
) -> int:
    """Train a recipe on 1, 2, 4 ... GPUs, each in fresh processes: speed, where a step's time goes, and what limits.

    Exit codes: 0 at least one number of GPUs was measured, 1 none was.
    """
    from tunesmith.bench.scale import scale as run_scale
    from tunesmith.recipe.load import load_recipe
    from tunesmith.report.strings import words_for

    words_for(language)
    settings = [*(overrides or []), *(["model.device=cpu"] if cpu else [])]
    words = [word for setting in overrides or [] for word in ("--set", setting)]
    command = shlex.join(["tunesmith", "bench", "scale", str(recipe), *words, *(["--cpu"] if cpu else [])])
    result = run_scale(
        load_recipe(recipe, settings),
        gpus=_counts(gpus),
        mode=_mode(mode),
        extension=_extension(nodes, network, latency_us, per_node),
        run_dir=output,
        command=command,
        progress=_say_cell,
    )
    page = _report(result, language) if report else None
    facts = {"run_dir": result.run_dir, "cells": len(result.cells), "ok": result.num_ok, "report": page}
    console.emit({**facts, "curves": result.scaling["curves"], "projection": result.scaling["projection"]})
    return 0 if result.num_ok else 1


app.command("serve")(bench_serve.serve)
app.command("infer")(bench_infer.infer)


def _counts(text: str) -> list[int]:
    """The numbers of --gpus. Raises: RecipeError."""
    from tunesmith.errors import RecipeError

    words = text.replace(",", " ").split()
    if not words or not all(word.isdecimal() and int(word) > 0 for word in words):
        raise RecipeError(f"--gpus is numbers from 1 on, as 1,2,4; got {text!r}")
    return [int(word) for word in words]


def _mode(text: str) -> Modes:
    """Raises: RecipeError for a mode that is not there."""
    from tunesmith.errors import RecipeError, nearest

    known: tuple[Modes, ...] = ("weak", "strong", "both")
    found = next((mode for mode in known if mode == text), None)
    if found is None:
        raise RecipeError(f"--mode {text!r} is not one of weak, strong, both{nearest(text, known)}")
    return found


def _extension(nodes: int | None, network: str | None, latency_us: float, per_node: int | None) -> Extension | None:
    """What the curve is extended to. Raises: RecipeError."""
    from tunesmith.bench.scale import Extension
    from tunesmith.cost.collectives import parse_network
    from tunesmith.errors import RecipeError

    if nodes is None and network is None:
        return None
    if nodes is None or network is None:
        raise RecipeError("--nodes and --network go together: --nodes 8 --network 400Gb")
    return Extension(nodes, parse_network(network, latency_us * 1e-6), per_node)


def _say_cell(cell: Mapping[str, Any]) -> None:
    """A line on stderr for a cell that has ended."""
    from rich.markup import escape

    from tunesmith.units import format_count, format_seconds

    how = f"{cell['status']}: {cell['reason']}"
    if (found := cell["summary"]) is not None:
        how = f"{format_seconds(found['step_s'])} a step, {format_count(found['tokens_per_s'])} tokens/s"
    console.err.print(f"{cell['name']}: {escape(how)} ({cell['wall_s']:.0f} s)")


def _peer_paths(texts: list[str]) -> dict[str, Path]:
    """The folders of --peer-path, by peer. Raises: RecipeError for one that is not NAME=DIR."""
    from tunesmith.errors import RecipeError

    found = {}
    for text in texts:
        name, equals, folder = text.partition("=")
        if not equals or not Path(folder).is_dir():
            raise RecipeError(f"--peer-path must be NAME=DIR with a folder that exists, got {text!r}")
        found[name] = Path(folder)
    return found


def _peers_command(recipe: Path, overrides: list[str], names: str, rounds: int) -> str:
    words = ["tunesmith", "bench", "peers", str(recipe)]
    words += [word for override in overrides for word in ("--set", override)]
    return shlex.join([*words, "--peers", names, "--rounds", str(rounds)])


def _say_row(row: Mapping[str, Any]) -> None:
    """A line on stderr for a process that has ended."""
    from rich.markup import escape

    how = f"{len(row['steps'])} steps" if row["status"] == "ok" else f"{row['status']}: {row['reason']}"
    console.err.print(f"round {row['round'] + 1} {row['peer']}: {escape(how)} ({row['wall_s']:.0f} s)")


def _show_table(table: Mapping[str, Any], out: Path, record: Path | None) -> None:
    from tunesmith.bench.peers.store import TABLE
    from tunesmith.bench.peers.table import markdown

    console.out.print(markdown(table["groups"]), markup=False, highlight=False, soft_wrap=True)
    page = out / f"{TABLE}.md"
    console.emit({"table": page, "record": record, "groups": table["groups"]})


def split_names(only: str | None) -> list[str]:
    """The names of --only: separated by spaces, or by commas where no name of a grid cell can hold one."""
    if not only:
        return []
    return only.split() if "=" in only else only.replace(",", " ").split()


def _command(recipe: Path, overrides: list[str], matrix: str | None) -> str:
    """What was typed, without what chooses cells and folders."""
    words = ["tunesmith", "bench", "train", str(recipe)]
    words += [word for override in overrides for word in ("--set", override)]
    return shlex.join([*words, "--matrix", matrix] if matrix else words)


def _report(result: BenchResult | ScaleResult, language: str) -> Path:
    from rich.markup import escape

    from tunesmith.report.write import write_report

    files = write_report([result.run_dir], language=language)
    console.err.print(f"\n[bold]{escape(files.headline)}[/bold]")
    for sentence in files.sentences:
        console.err.print(f"  {escape(sentence)}")
    console.out.print(str(files.html), markup=False)
    return files.html
