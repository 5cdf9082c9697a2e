"""`tunesmith eval`: perplexity on text, exact-answer accuracy on a question file."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from tunesmith.cli.console import emit, err
from tunesmith.cli.unfinished import use_checkpoint
from tunesmith.errors import DataError, nearest
from tunesmith.units import format_seconds

if TYPE_CHECKING:
    from tunesmith.bench.quality import Accuracy, Example, QualityResult
    from tunesmith.bench.quality import Progress as Report

app = typer.Typer(add_completion=False)
SHOWN_WRONG, SHOWN_RIGHT = 5, 3


@app.command(name="eval")
def evaluate_model(
    model: Annotated[str, typer.Argument(help="a model directory, builtin:tiny, a Hub id, or a run directory")],
    data: Annotated[
        list[str] | None, typer.Option(help="text or conversations for perplexity (may be repeated)")
    ] = None,
    questions: Annotated[
        str | None, typer.Option(help="a JSONL, JSON or CSV file: rows with question (or messages, prompt) and answer")
    ] = None,
    adapter: Annotated[Path | None, typer.Option(help="an adapter directory, put on top of the model")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="so many rows and questions at most")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="longest answer in tokens")] = 256,
    max_length: Annotated[int | None, typer.Option(min=2, help="tokens of a window of text")] = None,
    train_on: Annotated[str, typer.Option(help="answers or all: which tokens of a conversation count")] = "answers",
    comparison: Annotated[str, typer.Option(help="auto, exact, number (the last one, or after ####)")] = "auto",
    quantize: Annotated[str | None, typer.Option(help="nf4, nf4-double or fp8")] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16, float16")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N")] = "auto",
    run_dir: Annotated[Path | None, typer.Option(help="write evaluations/NAME.json into this run directory")] = None,
    name: Annotated[str, typer.Option(help="the evaluation's name")] = "quality",
) -> None:
    """Measure a model: perplexity on --data, accuracy with a 95 % interval on --questions. Answers are greedy."""
    from tunesmith.bench.quality import evaluate

    _check_choice("--train-on", train_on, ("answers", "all"))
    _check_choice("--comparison", comparison, ("auto", "exact", "number"))
    counted: Literal["answers", "all"] = "all" if train_on == "all" else "answers"
    compared: Literal["exact", "number"] | None = None if comparison == "auto" else _comparison(comparison)
    use_checkpoint(model, adapter)
    with _progress() as report:
        result = evaluate(
            model,
            data=data or None,
            questions=questions,
            adapter=adapter,
            limit=limit,
            max_new_tokens=max_new_tokens,
            max_length=max_length,
            train_on=counted,
            comparison=compared,
            run_dir=run_dir,
            name=name,
            progress=report,
            quantize=quantize,
            dtype=dtype,
            device=device,
        )
    show(result)
    emit({**result.to_json(), "path": result.path})


def _check_choice(option: str, given: str, allowed: tuple[str, ...]) -> None:
    if given not in allowed:
        raise DataError(f"{option} must be {', '.join(allowed)}, got {given!r}{nearest(given, allowed)}")


def _comparison(name: str) -> Literal["exact", "number"]:
    return "number" if name == "number" else "exact"


@contextlib.contextmanager
def _progress() -> Iterator[Report | None]:
    """A bar per kind of work on stderr, where it is a terminal."""
    if not err.is_terminal:
        yield None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err, transient=True) as bar:
        tasks = {}

        def report(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what)
            bar.update(tasks[what], completed=done, total=total)

        yield report


def show(result: QualityResult) -> None:
    """Print what was measured, and some answers (wrong ones first), on stderr."""
    text, answers = result.perplexity, result.accuracy
    if text is not None:
        err.print(
            f"perplexity  [bold]{text.perplexity:.4g}[/bold]  loss {text.loss:.4f} over {text.num_tokens:,} tokens of "
            f"{text.num_documents:,} documents, windows of {text.window_tokens}, {format_seconds(text.duration_s)}"
        )
    if answers is not None:
        cut = f", {answers.num_cut} cut at the token limit" if answers.num_cut else ""
        err.print(
            f"accuracy    [bold]{answers.accuracy:.1%}[/bold]  {answers.num_right} of {answers.num_questions} right "
            f"({answers.comparison}; 95 % interval {answers.low:.1%} to {answers.high:.1%}){cut}, "
            f"{answers.new_tokens_per_s:,.0f} tokens/s"
        )
        _show_answers(answers)
    if result.path is not None:
        before = "" if result.path.stem == result.name else f" (an earlier one named {result.name!r} stays)"
        err.print(f"written to {result.path}{before}", markup=False)


def _show_answers(answers: Accuracy) -> None:
    """Wrong ones first, then some that were right; how many there are of each that are not shown."""
    for right, most, total in (
        (False, SHOWN_WRONG, answers.num_questions - answers.num_right),
        (True, SHOWN_RIGHT, answers.num_right),
    ):
        shown = [example for example in answers.examples if example.right is right][:most]
        for example in shown:
            _show_answer(example)
        if len(shown) < total:
            err.print(f"       ... {total - len(shown)} more {'right' if right else 'wrong'}", style="dim")


def _show_answer(example: Example) -> None:
    mark = ("right", "green") if example.right else ("wrong", "red")
    cut = "  (cut at the token limit)" if example.finish_reason == "length" else ""
    err.print(
        Text.assemble(mark, "  ", _short(example.question), "\n       said ", (_short(example.said), "bold"), cut),
        Text(f"       expected {_short(example.expected[0])}", style="dim"),
        sep="\n",
    )


def _short(text: str, length: int = 160) -> str:
    line = " ".join(text.split())
    return line if len(line) <= length else f"{line[: length // 2]} ... {line[-length // 2 :]}"
