"""The verdict in words, computed from the rows: what won, what each gain brought, and what to skip."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tunesmith.bench.statistics import Estimate
from tunesmith.report.load import Run
from tunesmith.report.rows import Change, Row, change
from tunesmith.report.strings import Words
from tunesmith.units import format_bytes, format_seconds

SAME = 0.01  # a change below one percent is called none
LARGE = 0.2  # beyond this a share of the loss says less than the two losses
CLEAR = 0.05  # an interval of a ratio within this of 1 is not worth showing
NOISY = 0.1  # times whose interval reaches further than this from their median are called noisy
SAVES = 0.02  # a gain that saves less than this share of memory, and no time, is to be skipped


@dataclass(frozen=True)
class Sentence:
    """One line of the verdict: about which row (None: all of them), and whether it is a warning."""

    text: str
    row: str | None = None
    kind: str = "fact"


@dataclass(frozen=True)
class Verdict:
    """A headline and what backs it."""

    headline: str
    sentences: tuple[Sentence, ...]


def bench_verdict(rows: Sequence[Row], words: Words) -> Verdict:
    """What a bench run showed."""
    comparable = [row for row in rows if row.ok and not row.unequal]
    sentences = [sentence for row in rows for sentence in _about(row, rows, words)]
    return Verdict(_headline(comparable, words), (*_noise(comparable, words), *sentences))


def _noise(rows: Sequence[Row], words: Words) -> list[Sentence]:
    """A warning where the times of a row vary so much that they tell little."""
    spreads = [(_spread(row.step_s), row) for row in rows if row.step_s is not None]
    spread, worst = max(spreads, key=lambda pair: pair[0], default=(0.0, None))
    if spread <= NOISY or worst is None or worst.step_s is None:
        return []
    low, high = (format_seconds(bound) for bound in (worst.step_s.low, worst.step_s.high))
    names = {"label": words.data(worst.label), "low": low, "high": high, "time": format_seconds(worst.step_s.median)}
    return [Sentence(words("noisy", **names), None, "warning")]


def _spread(time: Estimate) -> float:
    """How far the interval reaches from the median, as a share of it."""
    return max(time.high - time.median, time.median - time.low) / time.median if time.median else 0.0


def _headline(rows: Sequence[Row], words: Words) -> str:
    timed = [row for row in rows if row.step_s is not None]
    if not timed:
        return words("nothing")
    fast = min(timed, key=lambda row: row.step_s.median if row.step_s else 0.0)
    sized = [row for row in timed if row.peak_bytes is not None]
    small = min(sized, key=lambda row: row.peak_bytes or 0.0) if sized else None
    time = format_seconds(fast.step_s.median) if fast.step_s else ""
    names = {"fast": words.data(fast.label), "time": time}
    if small is None:
        return words("wins_time", **names)
    memory = format_bytes(small.peak_bytes or 0)
    if len(timed) == 1:
        return words("only_one", label=names["fast"], time=time, memory=memory)
    tied = [row for row in timed if row is fast or change(row, fast).noise]
    if len(tied) > 1:
        return words(_tie(tied, names, words), small=words.data(small.label), memory=memory, **names)
    if small is fast:
        return words("wins_both", label=names["fast"], memory=memory)
    return words("wins_each", small=words.data(small.label), memory=memory, **names)


def _tie(tied: Sequence[Row], names: dict[str, str], words: Words) -> str:
    """Name the tied rows and their times in `names`; which headline says it: where the times differ, they are shown."""
    names["fast"] = words("and").join(words.data(row.label) for row in tied)
    times = [row.step_s.median for row in tied if row.step_s is not None]
    if max(times) <= min(times) * (1 + CLEAR):
        return "wins_tied"
    names["time"] = words("range", low=format_seconds(min(times)), high=format_seconds(max(times)))
    return "wins_unclear"


def _about(row: Row, rows: Sequence[Row], words: Words) -> list[Sentence]:
    label = words.data(row.label)
    if not row.ok:
        status = words.status(row.status)
        key = "did_not_run_why" if row.reason else "did_not_run"
        return [Sentence(words(key, label=label, status=status, reason=_short(row.reason)), row.name, "warning")]
    if row.unequal:
        return [Sentence(words("not_compared", label=_capital(label)), row.name, "warning")]
    parent = _partner(row, rows)
    return [] if parent is None else [_compared(row, parent, rows[0], words)]


def _partner(row: Row, rows: Sequence[Row]) -> Row | None:
    """What a row is compared with: its parent, else the first row that did the same work; None for the first itself."""
    named = next((other for other in rows if other.name == row.parent), None)
    if named is not None and named.ok and not named.unequal:
        return named
    first = next((other for other in rows if other.ok and not other.unequal), None)
    return None if first is row else first


def _compared(row: Row, parent: Row, baseline: Row, words: Words) -> Sentence:
    difference = change(row, parent)
    quality = not (row.random_weights or parent.random_weights)
    parts = words("comma").join(change_parts(difference, words, quality=quality))
    names = {"label": words.data(row.label), "parent": words.data(parent.label), "parts": parts}
    if row.gain is None or parent.name != row.parent:
        return Sentence(words("sentence" if parent is baseline else "against", **names), row.name)
    useless = saves_nothing(difference)
    text = words("useless" if useless else "on_top", gain=_capital(words.data(row.gain)), **names)
    return Sentence(text, row.name, "warning" if useless else "fact")


def _short(reason: str | None) -> str:
    """The first line of a reason, at most 140 characters."""
    lines = (reason or "").strip().splitlines()
    first = lines[0] if lines else ""
    return first if len(first) <= 140 else first[:139] + "…"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def saves_nothing(difference: Change) -> bool:
    """Whether a gain brought neither memory nor time; noise that could hide much is no proof of it."""
    no_memory = difference.memory is not None and difference.memory > 1 - SAVES
    low = difference.time_range[0] if difference.time_range else 1.0
    no_time = difference.time is not None and (low > 1 - CLEAR if difference.noise else difference.time > 1 - SAVES)
    return no_memory and no_time


def change_parts(difference: Change, words: Words, *, quality: bool) -> list[str]:
    """The phrases of one comparison: memory, time, and loss where weights were not random."""
    parts = []
    if difference.memory is not None:
        parts.append(_memory(difference.memory, words))
    if difference.time is not None:
        parts.append(_time(difference, difference.time, words))
    if quality and difference.loss is not None:
        parts.append(_loss(difference, difference.loss, words))
    return parts or [words("not_measured")]


def _memory(ratio: float, words: Words) -> str:
    if abs(ratio - 1) < SAME:
        return words("same_memory")
    return words("less_memory" if ratio < 1 else "more_memory", x=_percent(abs(1 - ratio)))


def _time(difference: Change, ratio: float, words: Words) -> str:
    low, high = difference.time_range or (1.0, 1.0)
    if difference.noise and max(high - 1, 1 - low) > CLEAR:
        return words("unclear_time", low=f"{low:.2f}", high=f"{high:.2f}")
    if difference.noise or abs(ratio - 1) < SAME:
        return words("same_time")
    if ratio >= 2:
        return words("much_slower", x=f"{ratio:.1f}")
    if ratio <= 0.5:
        return words("much_faster", x=f"{1 / ratio:.1f}")
    return words("slower" if ratio > 1 else "faster", x=_percent(abs(ratio - 1)))


def _loss(difference: Change, ratio: float, words: Words) -> str:
    if abs(ratio - 1) < 0.0005:
        return words("same_loss")
    if abs(ratio - 1) > LARGE and difference.losses is not None:
        before, after = difference.losses
        return words("losses_differ", after=f"{after:.3f}", before=f"{before:.3f}")
    return words("loss_change", x=f"{(ratio - 1) * 100:+.1f} %")


def _percent(share: float) -> str:
    return f"{share * 100:.0f} %"


UNFINISHED = ("interrupted", "failed", "running")


def train_sentence(run: Run, words: Words) -> str | None:
    """Where a training run ended, or how far it came; None where it logged no loss."""
    steps = [int(step) for node in run.metrics if (step := node.number("step")) is not None]
    validation = [loss for node in run.metrics if (loss := node.number("validation_loss")) is not None]
    training = [loss for node in run.metrics if (loss := node.number("loss")) is not None]
    losses = validation or training
    if not losses or not steps:
        return None
    shown = {"name": run.name, "loss": f"{losses[-1]:.3f}", "steps": max(steps)}
    if run.status in UNFINISHED:
        key = "train_unfinished_validated" if validation else "train_unfinished"
        return words(key, **shown, status=words(f"run_{run.status}"))
    return words("train_verdict" if validation else "train_verdict_plain", **shown)
