"""Whether other programs take the cores, now."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tunesmith.bench import machine
from tunesmith.bench.machine import machine_load

STARTED = 1_000
"""Ticks that a core had worked before it is looked at."""


@pytest.fixture
def two_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two usable cores of four, and a minute that was full of work."""
    monkeypatch.setattr(os, "getloadavg", lambda: (7.5, 3.0, 1.0))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 2}, raising=False)
    monkeypatch.setattr(machine, "usable_cores", lambda: 2)


def write(stat: Path, *busy_idle: tuple[int, int]) -> Path:
    """/proc/stat with each core's ticks of work and of rest since it was looked at first."""
    lines = [f"cpu{i} {STARTED + busy} 0 0 {idle} 0 0 0 0 5 0" for i, (busy, idle) in enumerate(busy_idle)]
    stat.write_text("\n".join(["cpu  1 2 3 4 5 6 7 8 9 10", *lines, "intr 5 6", ""]), encoding="ascii")
    return stat


@pytest.mark.usefixtures("two_cores")
@pytest.mark.parametrize(
    ("first", "third", "busy_cores", "is_busy"),
    [((0, 30), (0, 30), 0.0, False), ((15, 15), (6, 24), 0.7, False), ((30, 0), (15, 15), 1.5, True)],
)
def test_work_that_has_ended_is_not_counted(
    first: tuple[int, int],
    third: tuple[int, int],
    busy_cores: float,
    is_busy: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The load average of the last minute was compared: right after an installation every machine was busy."""
    stat = write(tmp_path / "stat", *[(0, 0)] * 4)
    monkeypatch.setattr(machine.time, "sleep", lambda _: write(stat, first, (30, 0), third, (30, 0)))
    found = machine_load(stat=stat)
    assert found["busy_cores"] == pytest.approx(busy_cores)
    assert (found["is_busy"], found["cores"], found["load_average"]) == (is_busy, 2, 7.5)


@pytest.mark.usefixtures("two_cores")
def test_the_load_average_stands_in_where_cores_do_not_tell_their_times(tmp_path: Path) -> None:
    found = machine_load(stat=tmp_path / "nothing")
    assert (found["busy_cores"], found["is_busy"]) == (7.5, True)
    still = write(tmp_path / "stat", (0, 0), (0, 0), (0, 0))
    assert machine_load(0, still)["busy_cores"] == 7.5


def test_this_machine_tells() -> None:
    found = machine_load()
    assert 0 <= found["busy_cores"] <= max(found["cores"], found["load_average"])
