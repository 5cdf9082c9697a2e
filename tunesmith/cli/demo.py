"""`tunesmith demo`: doctor, five methods measured, one trained to the end, the report, answers before and after."""

from __future__ import annotations

import contextlib
import json
import shlex
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tunesmith.cli import console
from tunesmith.errors import RunDirError

if TYPE_CHECKING:
    from rich.text import Text

    from tunesmith.bench.quality import Accuracy, Example, QualityResult
    from tunesmith.recipe.schema import Recipe

app = typer.Typer(add_completion=False)
RECIPES = Path(__file__).parent / "recipes"
BASE = "builtin:tiny"
ANSWER_TOKENS = 48
_ENTRY = r"'Plimbro lamp\ncolour: pale green\nprice: 12 coins\n\nWhat colour is the Plimbro lamp?'"
SHOWN = 5
METHODS = 5


@dataclass(frozen=True)
class Size:
    """How much the demo does: cells of the matrix, questions asked, and changes of the two recipes."""

    questions: int = 50
    shuffled: int = 20
    matrix: tuple[str, ...] = ()
    quality: tuple[str, ...] = ()


FULL = Size()
QUICK = Size(
    questions=10,
    shuffled=5,
    matrix=("bench.steps=2", "bench.warmup_steps=1", "bench.repeats=1"),
    quality=("train.max_steps=4", "data.train=['builtin:shop?rows=40']"),
)


@dataclass(frozen=True)
class Quality:
    """A model on held-out questions, and on the same questions with their contexts shuffled."""

    heldout: QualityResult
    shuffled: QualityResult

    @property
    def accuracy(self) -> float:
        """Share of held-out questions answered exactly."""
        return _accuracy(self.heldout).accuracy

    @property
    def shuffled_accuracy(self) -> float:
        """The same where every question stands under another product's entry."""
        return _accuracy(self.shuffled).accuracy

    @property
    def perplexity(self) -> float:
        """Perplexity of the shop's held-out answers."""
        assert self.heldout.perplexity is not None
        return self.heldout.perplexity.perplexity


@app.command()
def demo(
    output: Annotated[Path | None, typer.Option(help="a new or empty folder; else runs/demo-<time>")] = None,
    model: Annotated[str, typer.Option(help="the model to start from")] = BASE,
    quick: Annotated[bool, typer.Option(help="a smoke test: few steps and questions, nothing is learnt")] = False,
    language: Annotated[str, typer.Option(help="the report's language: en, zh; auto: of your locale")] = "auto",
) -> int:
    """Fine-tune a small model in five ways on this machine, compare them, and ask it questions before and after.

    Exit codes: 0 done; 1 the machine is not ready, or no cell of the matrix could be measured.
    """
    from tunesmith.report.strings import words_for

    words_for(language)
    began, folder, size = time.monotonic(), _folder(output), QUICK if quick else FULL
    with _says_what_is_kept(folder):
        _announce()
        if not _doctor():
            console.emit({"ready": False})
            return 1
        _write_shop(folder)
        matrix_dir, num_ok = _matrix(folder, model, size)
        before, after, run_dir, train_s = _learn(folder, model, size)
        page = _report(matrix_dir, run_dir, folder, language)
    _side_by_side(before, after)
    duration_s = time.monotonic() - began
    _closing(run_dir, folder, page, duration_s)
    console.emit(_facts(before, after, folder, run_dir, matrix_dir, page, train_s, duration_s))
    return 0 if num_ok else 1


def _folder(output: Path | None) -> Path:
    folder = output or Path("runs") / time.strftime("demo-%Y%m%d-%H%M%S")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise RunDirError(f"{folder} is not empty: give --output a new folder, or leave it out")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextlib.contextmanager
def _says_what_is_kept(folder: Path) -> Iterator[None]:
    """Ctrl-C ends the demo with a line that says what is in `folder`, and how to go on."""
    try:
        yield
    except KeyboardInterrupt:
        raise console.StoppedError(kept_line(folder)) from None


def kept_line(folder: Path) -> str:
    """What an interrupted demo left in `folder`, with the command that takes each thing up."""
    from tunesmith.rundir.layout import RunDir, is_run

    matrix, quality = RunDir(folder / "matrix"), RunDir(folder / "quality")
    kept = []
    if num_methods := len({path.stem.rpartition("-")[0] for path in matrix.cells.glob("*.json")}):
        kept.append(f"{num_methods} of {METHODS} methods measured: tunesmith report {shlex.quote(str(matrix.path))}")
    if is_run(quality.path):
        what, verb = ("the trained model", "chat") if quality.final.is_dir() else ("the training", "train --resume")
        kept.append(f"{what}: tunesmith {verb} {shlex.quote(str(quality.path))}")
    kept.append("for the whole demo again: tunesmith demo")
    return f"kept in {folder}: {'; '.join(kept)}"


def _stage(number: int, title: str, *lines: str) -> None:
    """Announce a stage: what happens, and why."""
    console.err.print(f"\n[bold cyan]{number}/5  {title}[/bold cyan]")
    for line in lines:
        console.err.print(line, markup=False)


def _announce() -> None:
    """What is going to happen, and whether the machine has time for it."""
    from tunesmith.bench.machine import machine_load
    from tunesmith.cli.demo_clock import busy_line, outline

    for line in outline(METHODS):
        console.err.print(line, markup=False)
    if (warning := busy_line(machine_load())) is not None:
        console.err.print(warning, style="yellow", markup=False)


def _doctor() -> bool:
    """Whether the machine is ready."""
    from tunesmith.cli.doctor import show
    from tunesmith.watch.doctor import check_up, has_errors

    _stage(1, "Is this machine ready?")
    findings = check_up()
    show(findings)
    return not has_errors(findings)


def _write_shop(folder: Path) -> None:
    """The data of the demo as files, to look at and to try the other verbs on."""
    from tunesmith.text.sources import builtin_rows

    for name, address in (("shop.jsonl", "shop?rows=800"), ("questions.jsonl", "shop-heldout?rows=50")):
        lines = (json.dumps(row, ensure_ascii=False) for row in builtin_rows(address))
        (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")


def _recipe(name: str, model: str, overrides: tuple[str, ...]) -> Recipe:
    from tunesmith.recipe.load import load_recipe

    return load_recipe(RECIPES / f"{name}.yaml", [f"model.path={json.dumps(model)}", *overrides])


def _matrix(folder: Path, model: str, size: Size) -> tuple[Path, int]:
    """The run directory of the five methods, and how many of them were measured."""
    from tunesmith.bench.display import BenchDisplay
    from tunesmith.bench.matrix import bench
    from tunesmith.cli.demo_clock import DemoClock

    _stage(
        2,
        "Five methods, equal conditions",
        "full trains every number (weight) of the model. LoRA leaves them as they are and trains a small add-on,",
        "the adapter. QLoRA does the same on a model squeezed to 4 bits a weight. Checkpointing saves memory by",
        "computing things again instead of keeping them. Each method trains the same model on the same rows for a few",
        "steps, twice. Allocated is the memory of model and training; resident is that of the whole program, most of",
        "it PyTorch where the model is so small. Validation loss: how wrong the model is on rows kept out of training.",
    )
    recipe = _recipe("demo", model, size.matrix)
    with BenchDisplay(console.err) as display:
        clock = DemoClock(display, lambda line: console.err.print(line, style="dim", markup=False))
        result = bench(
            recipe, run_dir=folder / "matrix", command="tunesmith bench train recipes/demo.yaml", progress=clock
        )
    return result.run_dir, result.num_ok


def _learn(folder: Path, model: str, size: Size) -> tuple[Quality, Quality, Path, float]:
    """Quality before and after a LoRA fine-tuning, its run directory and its seconds."""
    from tunesmith.train.run import train

    _stage(
        3,
        "Learn one shop's manner with LoRA",
        "Customers ask about a catalogue entry; the shop answers from it, in words of its own. The questions asked",
        "here are held out: their products, values and phrasings occur nowhere in training. Perplexity says how much",
        "the right answers surprise the model (1: not at all). To check that it reads, questions are also asked with",
        "the entries shuffled, each under another product's: an answer that is right there was not read.",
    )
    before = _measure(model, size)
    _say_quality("before", before)
    began = time.monotonic()
    result = train(_recipe("demo-quality", model, size.quality), run_dir=folder / "quality")
    if result.exit_code:
        raise console.StoppedError(kept_line(folder), result.exit_code)
    train_s = time.monotonic() - began
    after = _measure(str(result.run_dir), size)
    _say_quality("before", before)
    _say_quality("after", after)
    _write_evaluation(result.run_dir, before, after)
    return before, after, result.run_dir, train_s


def _measure(model: str, size: Size) -> Quality:
    from tunesmith.bench.quality import evaluate
    from tunesmith.engine.llm import LLM

    llm = LLM(model, dtype="float32", device="auto", max_running=8)
    heldout = f"builtin:shop-heldout?rows={size.questions}"
    shuffled = f"builtin:shop-shuffled?rows={size.shuffled}"
    return Quality(
        evaluate(llm, data=heldout, questions=heldout, max_new_tokens=ANSWER_TOKENS, comparison="exact"),
        evaluate(llm, questions=shuffled, max_new_tokens=ANSWER_TOKENS, comparison="exact"),
    )


def _accuracy(result: QualityResult) -> Accuracy:
    assert result.accuracy is not None
    return result.accuracy


def _say_quality(when: str, quality: Quality) -> None:
    found = _accuracy(quality.heldout)
    console.err.print(
        f"[bold]{when:>6}[/bold]  {found.num_right} of {found.num_questions} held-out questions answered exactly "
        f"({quality.accuracy:.0%}), perplexity {quality.perplexity:.2f}; with entries shuffled "
        f"{quality.shuffled_accuracy:.0%}"
    )


def _write_evaluation(run_dir: Path, before: Quality, after: Quality) -> None:
    """Before and after as one JSON file in the run directory, where the report finds it."""
    from tunesmith.rundir.io import write_json_atomic

    sides = {"before": before, "after": after}
    write_json_atomic(run_dir / "eval-heldout.json", {name: _side(quality) for name, quality in sides.items()})


def _side(quality: Quality) -> dict[str, Any]:
    found = _accuracy(quality.heldout)
    return {
        "accuracy": found.accuracy,
        "accuracy_low": found.low,
        "accuracy_high": found.high,
        "num_questions": found.num_questions,
        "shuffled_accuracy": quality.shuffled_accuracy,
        "perplexity": quality.perplexity,
        "answers": [
            {"question": one.question, "expected": one.expected[0], "answer": one.said, "correct": one.right}
            for one in found.examples
        ],
    }


def _report(matrix_dir: Path, run_dir: Path, folder: Path, language: str) -> Path:
    from rich.markup import escape

    from tunesmith.report.write import write_report

    _stage(4, "The report")
    files = write_report([matrix_dir, run_dir], folder / "report.html", language)
    console.err.print(f"[bold]{escape(files.headline)}[/bold]")
    for sentence in files.sentences:
        console.err.print(f"  {escape(sentence)}")
    console.err.print(f"written: {files.html}", markup=False)
    return files.html


def _side_by_side(before: Quality, after: Quality) -> None:
    """Held-out questions of both languages with the answer that is right, as the shop says it, and both answers."""
    from rich.table import Table
    from rich.text import Text

    _stage(5, "The same questions, before and after")
    table = Table(show_lines=True, expand=False)
    for title in ("entry and question", "the shop's own answer", "before", "after"):
        table.add_column(title, overflow="fold")
    pairs = zip(_accuracy(before.heldout).examples, _accuracy(after.heldout).examples, strict=True)
    for old, new in _both_languages(list(pairs)):
        table.add_row(Text(old.question), Text(old.expected[0]), *(_verdict(one) for one in (old, new)))
    console.print_table(table)


def _both_languages(pairs: list[Any]) -> list[Any]:
    """The first questions: three English, two Chinese."""
    chinese = [pair for pair in pairs if not pair[0].question.isascii() and "£" not in pair[0].question]
    english = [pair for pair in pairs if pair not in chinese]
    return english[: SHOWN - 2] + chinese[:2]


def _verdict(one: Example) -> Text:
    from rich.text import Text

    mark, style = ("✓", "green") if one.right else ("✗", "red")
    return Text(f"{mark} {one.said.strip()}", style=style)


def _closing(run_dir: Path, folder: Path, page: Path, duration_s: float) -> None:
    from tunesmith.units import format_seconds

    chat, data, questions = (
        shlex.quote(str(path)) for path in (run_dir, folder / "shop.jsonl", folder / "questions.jsonl")
    )
    try_next = {
        "ask it about an entry of your own": f"printf {_ENTRY} | tunesmith chat {chat} --prompt - --temperature 0",
        "talk to it": f"tunesmith chat {chat}",
        "open the report in a browser": str(page),
        "fine-tune on your own JSON (this file shows the format)": f"tunesmith train {BASE} --data {data}",
        "measure it once more": f"tunesmith eval {chat} --questions {questions}",
    }
    console.err.print(f"\n[bold]Done in {format_seconds(duration_s)}.[/bold] Try next:")
    for what, command in try_next.items():
        console.err.print(f"  {what}", style="dim", markup=False)
        console.err.print(f"    {command}", markup=False)


def _facts(
    before: Quality,
    after: Quality,
    folder: Path,
    run_dir: Path,
    matrix: Path,
    page: Path,
    train_s: float,
    total_s: float,
) -> dict[str, Any]:
    sides = {
        name: {
            "accuracy": quality.accuracy,
            "shuffled_accuracy": quality.shuffled_accuracy,
            "perplexity": quality.perplexity,
        }
        for name, quality in (("before", before), ("after", after))
    }
    paths = {"output": folder, "matrix": matrix, "quality": run_dir, "report": page}
    return {"ready": True, **sides, **paths, "train_s": train_s, "duration_s": total_s}
