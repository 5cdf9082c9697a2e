"""What a training run was, in short: method, model, data, length, speed, memory, and the command that made it."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from statistics import median

from tunesmith.report.load import Node, Run
from tunesmith.report.strings import Words
from tunesmith.report.verdict import UNFINISHED
from tunesmith.units import format_bytes, format_count, format_seconds

_KINDS = {"lora": "LoRA", "qlora": "QLoRA"}


@dataclass(frozen=True)
class Training:
    """A training run. facts: (name, text), those that are known; command: what was typed, None where it is unknown."""

    run: Run
    facts: tuple[tuple[str, str], ...]
    command: str | None


def training_of(run: Run, words: Words) -> Training:
    """The facts of a run that has metrics."""
    found = (
        ("method", _method(run, words)),
        ("model", run.recipe.text("model", "path")),
        ("data", _data(run)),
        ("length", _length(run, words)),
        ("status", words(f"run_{run.status}") if run.status in UNFINISHED else None),
        ("learning_rate", _learning_rate(run, words)),
        ("throughput", _speed(run, words)),
        *_memory(run),
        ("duration", _seconds(run.manifest.number("duration_s"))),
    )
    facts = tuple((words(f"run_{name}"), text) for name, text in found if text is not None)
    return Training(run, facts, shlex.join(run.command) if run.command else None)


def _method(run: Run, words: Words) -> str | None:
    kind = run.recipe.text("method", "kind")
    if kind is None:
        return None
    name = "DoRA" if kind == "lora" and run.recipe.get("method", "dora") is True else _KINDS.get(kind, words.data(kind))
    rank = run.recipe.number("method", "rank")
    text = name if kind not in _KINDS or rank is None else words("run_rank", method=name, rank=int(rank))
    trained, total = (run.manifest.number(f"{which}_parameters") for which in ("trainable", "total"))
    if trained is None or not total:
        return text
    shares = {"trained": format_count(trained), "total": format_count(total)}
    return words("run_with", text=text, more=words("run_share", **shares))


def _data(run: Run) -> str | None:
    files = run.recipe.get("data", "train")
    names = [name for name in files if isinstance(name, str)] if isinstance(files, list) else []
    return ", ".join(names) or None


def _length(run: Run, words: Words) -> str | None:
    steps = [step for node in run.metrics if (step := node.number("step")) is not None]
    epochs = [epoch for node in run.metrics if (epoch := node.number("epoch")) is not None]
    if not steps:
        return None
    text = words("run_steps", steps=f"{max(steps):,.0f}")
    return words("run_with", text=text, more=words("run_epochs", epochs=f"{max(epochs):.3g}")) if epochs else text


def _learning_rate(run: Run, words: Words) -> str | None:
    rate = run.recipe.number("train", "learning_rate")
    schedule = words.data(run.recipe.text("train", "schedule") or "?")
    return None if rate is None else f"{rate:.2g}{words('comma')}{schedule}"


def _speed(run: Run, words: Words) -> str | None:
    speeds = _numbers(run.metrics, "tokens_per_s")
    return words("run_speed", tokens=f"{median(speeds):,.0f}") if speeds else None


def _memory(run: Run) -> list[tuple[str, str]]:
    """The device's peak where it was measured, else the process's memory."""
    for column, name in (("device_peak_bytes", "peak"), ("host_resident_bytes", "resident")):
        if sizes := _numbers(run.metrics, column):
            return [(name, format_bytes(int(max(sizes))))]
    return []


def _numbers(rows: tuple[Node, ...], column: str) -> list[float]:
    return [value for row in rows if (value := row.number(column)) is not None]


def _seconds(seconds: float | None) -> str | None:
    return None if seconds is None else format_seconds(seconds)
