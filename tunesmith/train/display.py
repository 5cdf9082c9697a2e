"""What a person watching a run sees on stderr."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from rich.text import Text

from tunesmith.model.methods import MethodSummary
from tunesmith.recipe.schema import Recipe
from tunesmith.train.loop import LoopResult
from tunesmith.train.metrics import EvalMetrics, StepMetrics
from tunesmith.train.time_left import TimeLeft, TimeLeftColumn
from tunesmith.units import format_bytes, format_count

LOSS_LEGEND = "loss: how wrong the model is about the next token (a piece of text); it should fall"
VALIDATION_LEGEND = (
    "  (validation: rows kept out of training; perplexity: how much they surprise the model, 1 is not at all. "
    "Rising while the loss falls: it learns the rows by heart.)"
)

_RISEN = 0.02
"""By how much a validation loss must end above its lowest to be worth a word."""


class Display:
    """A progress line with rate, time left, loss and memory, and lines above it; silent when `quiet`."""

    def __init__(self, *, quiet: bool = False) -> None:
        self.console = Console(stderr=True, highlight=False, quiet=quiet)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[news]}"),
            TimeLeftColumn(),
            console=self.console,
            disable=quiet or not self.console.is_terminal,
        )
        self._task: TaskID | None = None
        self._total_steps = 0
        self._time_left = TimeLeft(0, 0)
        self._loading: dict[str, TaskID] = {}
        self._explained = False

    def __enter__(self) -> Display:
        self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._progress.stop()

    def say(self, text: str | Text) -> None:
        """A line above the progress line."""
        self.console.print(text, markup=False, soft_wrap=True)

    def warn(self, text: str) -> None:
        """A warning above the progress line."""
        self.console.print(Text(f"warning: {text}", style="yellow"), soft_wrap=True)

    def loading(self, what: str, done: int, total: int) -> None:
        """How far something before the first step is; a total of 0 is not known."""
        if what not in self._loading:
            self._loading[what] = self._progress.add_task(what, total=total or None, news="")
        self._progress.update(self._loading[what], completed=done, total=total or None)

    def start(self, done: int, total: int) -> None:
        """Show the progress line, and what its loss is."""
        if done < total:
            self.say(LOSS_LEGEND)
        for task in self._loading.values():
            self._progress.remove_task(task)
        self._loading.clear()
        self._total_steps = total
        self._time_left = TimeLeft(done, total)
        self._task = self._progress.add_task("train", total=total, completed=done, news="", left_s=None)

    def step(self, metrics: StepMetrics) -> None:
        """One more step is done."""
        if self._task is not None:
            left_s = self._time_left.step(metrics.step)
            self._progress.update(self._task, completed=metrics.step, news=_news(metrics), left_s=left_s)
        if self._progress.disable and _is_shown(metrics.step, self._total_steps):
            self.say(f"step {metrics.step}: {_news(metrics)}")

    def evaluation(self, metrics: EvalMetrics) -> None:
        """A validation is done; the first time, what it says."""
        self.say(
            f"step {metrics.step}: validation loss {metrics.loss:.4f}, perplexity {metrics.perplexity:.4g} "
            f"({format_count(metrics.trained_tokens)} tokens)"
        )
        if not self._explained:
            self._explained = True
            self.say(VALIDATION_LEGEND)


def _is_shown(step: int, total: int) -> bool:
    """Without a terminal: the first steps, the last, and then ever fewer, but at least ten in the whole run."""
    tenth = max(1, total // 10)
    power = 10 ** (len(str(tenth)) - 1)
    round_tenth = max(factor * power for factor in (1, 2, 5) if factor * power <= tenth)
    every = min(10 ** max(1, len(str(step)) - 1), round_tenth)
    return step <= 3 or step % every == 0 or step == total


def _news(metrics: StepMetrics) -> str:
    memory = metrics.device_peak_bytes or metrics.host_resident_bytes
    parts = [
        f"loss {metrics.loss:.4f}",
        f"{format_count(metrics.tokens_per_s)} tokens/s",
        "" if memory is None else format_bytes(memory),
        "" if metrics.mfu_ratio is None else f"MFU {metrics.mfu_ratio:.0%}",
        "skipped: float16 overflow" if metrics.skipped else "",
    ]
    return "  ".join(part for part in parts if part)


def method_line(recipe: Recipe, summary: MethodSummary) -> str:
    """What is trained, in one line."""
    share = summary.trainable_parameters / summary.total_parameters
    train = recipe.train
    held = {"fp8": ", held in fp8"}.get(recipe.method.base, ", products in fp8" if recipe.method.fp8_compute else "")
    return (
        f"{recipe.method.kind} on {recipe.model.path}{held}: {format_count(summary.trainable_parameters)} of "
        f"{format_count(summary.total_parameters)} parameters trained ({share:.2%}); {recipe.model.device}, "
        f"{train.precision}, {train.micro_batch_tokens} tokens x {train.accumulation} a step"
    )


def plan_line(recipe: Recipe, total_steps: int) -> str:
    """How long and how fast it learns, in one line."""
    train = recipe.train
    length = (
        ""
        if train.max_steps is not None or train.epochs is None
        else f", {train.epochs:g} epoch{'' if train.epochs == 1 else 's'} (passes over the data)"
    )
    return f"{total_steps} steps{length}; learning rate up to {train.learning_rate:.2g} ({train.schedule} schedule)"


def pace_line(loop: LoopResult) -> str | None:
    """What the training waited for, in plain words; None where no step was made."""
    if loop.data_wait_ratio is None:
        return None
    if loop.bottleneck == "data":
        return f"speed: held up by preparing the data; {loop.data_verdict}"
    return f"speed: set by the computing itself; {loop.data_wait_ratio:.1%} of the time went into waiting for data"


def best_line(validations: Sequence[tuple[int, float]]) -> str | None:
    """What a validation loss that has risen again means, and what to do; None where it ended near its lowest.

    Args: validations: step and loss of each.
    """
    if not validations:
        return None
    (step, best), (_, last) = min(validations, key=lambda one: one[1]), validations[-1]
    if last < best + _RISEN:
        return None
    return (
        f"validation loss was lowest at step {step} ({best:.4f}) and ended at {last:.4f}: since then the model learnt "
        f"the training rows by heart. Good if they are what it will be asked; if it will be asked other things, stop "
        f"earlier (--set train.max_steps={step}) or add rows"
    )


def closing_lines(commands: Sequence[str]) -> list[str]:
    """The commands to type next."""
    return ["next:", *(f"  {command}" for command in commands)]
