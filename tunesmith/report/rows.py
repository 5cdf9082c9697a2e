"""Rows of a comparison: the repeats of a cell joined into one, with intervals, and unequal work named."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tunesmith.bench.statistics import Estimate, estimate, ratio
from tunesmith.report.load import Node, Run

OWNERS = ("weights", "adapters", "gradients", "optimizer", "activations")


@dataclass(frozen=True)
class Row:
    """One cell of a matrix over all its repeats. None is: not measured."""

    name: str
    label: str
    parent: str | None
    gain: str | None
    status: str
    reason: str | None
    num_ok: int
    num_repeats: int
    step_samples: tuple[tuple[float, ...], ...]
    step_s: Estimate | None
    first_step_s: float | None
    total_s: float | None
    epoch_s: float | None
    tokens_per_s: float | None
    trained_tokens_per_s: float | None
    allocated_bytes: float | None
    reserved_bytes: float | None
    device_bytes: float | None
    resident_bytes: float | None
    owners: dict[str, float] | None
    training_losses: tuple[float, ...]
    validation_loss: float | None
    trainable: float | None
    parameters: float | None
    work: tuple[float | None, ...]
    unequal: bool
    random_weights: bool
    command: str | None
    on_cpu: bool

    @property
    def ok(self) -> bool:
        """Whether at least one repeat was measured."""
        return self.num_ok > 0

    @property
    def peak_bytes(self) -> float | None:
        """The memory that comparisons use: allocated."""
        return self.allocated_bytes


def rows_of(run: Run) -> list[Row]:
    """The rows of a bench run in the order of its matrix; cells that were planned and never ran are rows too."""
    groups: dict[str, list[Node]] = {str(name): [] for name in run.manifest.get("order") or []}
    for cell in run.cells:
        groups.setdefault(cell.text("name") or "?", []).append(cell)
    usual = _usual_work(run.cells)
    return [_row(name, cells, usual) for name, cells in groups.items()]


def _row(name: str, cells: Sequence[Node], usual: tuple[float | None, ...] | None) -> Row:
    good = [cell for cell in cells if cell.get("status") == "ok"]
    first = (good or list(cells) or [Node({})])[0]
    bad = next((cell for cell in cells if cell.get("status") != "ok"), None)
    samples = tuple(tuple(cell.numbers("times", "steps_s")) for cell in good)
    step_s, work = estimate(samples), _work(first)

    def median(*path: str) -> float | None:
        return _median(good, lambda cell: cell.number(*path))

    return Row(
        name=name,
        label=first.text("label") or name,
        parent=first.text("parent"),
        gain=first.text("gain"),
        status="ok" if good else (first.text("status") or "not run"),
        reason=None if bad is None else bad.text("reason"),
        num_ok=len(good),
        num_repeats=len(cells),
        step_samples=samples,
        step_s=step_s,
        first_step_s=median("times", "first_step_s"),
        total_s=median("times", "total_s"),
        epoch_s=median("times", "epoch_estimate_s"),
        tokens_per_s=_rate(work, 1, step_s),
        trained_tokens_per_s=_rate(work, 2, step_s),
        allocated_bytes=median("memory", "allocated_peak_bytes"),
        reserved_bytes=median("memory", "reserved_peak_bytes"),
        device_bytes=median("memory", "device_peak_bytes"),
        resident_bytes=median("memory", "resident_peak_bytes"),
        owners=_owners(good),
        training_losses=tuple(first.numbers("losses", "training")),
        validation_loss=median("losses", "validation"),
        trainable=first.number("parameters", "trainable"),
        parameters=first.number("parameters", "total"),
        work=work,
        unequal=bool(good) and usual is not None and work != usual,
        random_weights=first.get("recipe", "model", "weights") == "random",
        command=first.text("command"),
        on_cpu=first.text("memory", "allocated_source") != "cuda",
    )


def _rate(work: tuple[float | None, ...], at: int, step_s: Estimate | None) -> float | None:
    """A step's tokens per second of the median step: the speed that the time beside it tells, not a mean's."""
    steps, done = work[0], work[at]
    return None if step_s is None or not steps or done is None or not step_s.median else done / steps / step_s.median


def _median(cells: Sequence[Node], value: Callable[[Node], float | None]) -> float | None:
    found = [number for number in map(value, cells) if number is not None]
    return statistics.median(found) if found else None


def _owners(cells: Sequence[Node]) -> dict[str, float] | None:
    """Median bytes by owner; None unless every owner was measured."""
    values = {}
    for owner in OWNERS:
        median = _median(cells, _owner_bytes(owner))
        if median is not None:
            values[owner] = median
    return values if len(values) == len(OWNERS) else None


def _owner_bytes(owner: str) -> Callable[[Node], float | None]:
    return lambda cell: cell.number("owners", f"{owner}_bytes")


def _work(cell: Node) -> tuple[float | None, ...]:
    return tuple(cell.number("work", key) for key in ("steps", "tokens", "trained_tokens"))


def _usual_work(cells: Sequence[Node]) -> tuple[float | None, ...] | None:
    """The work that most measured cells did; the others are flagged."""
    done = [_work(cell) for cell in cells if cell.get("status") == "ok"]
    return statistics.mode(done) if done else None


@dataclass(frozen=True)
class Change:
    """How one row compares with another, as ratios (1: equal).

    noise: the interval of the time's ratio, `time_range`, holds 1.
    """

    memory: float | None
    time: float | None
    loss: float | None
    noise: bool
    losses: tuple[float, float] | None = None
    time_range: tuple[float, float] | None = None


def change(new: Row, old: Row) -> Change:
    """What changed from `old` to `new`."""
    time = ratio(new.step_samples, old.step_samples)
    return Change(
        memory=_ratio(new.peak_bytes, old.peak_bytes),
        time=None if time is None else time.median,
        loss=_ratio(new.validation_loss, old.validation_loss),
        noise=time is not None and time.low <= 1 <= time.high,
        losses=_both(old.validation_loss, new.validation_loss),
        time_range=None if time is None else (time.low, time.high),
    )


def _both(old: float | None, new: float | None) -> tuple[float, float] | None:
    return None if old is None or new is None else (old, new)


def _ratio(new: float | None, old: float | None) -> float | None:
    return None if new is None or not old else new / old
