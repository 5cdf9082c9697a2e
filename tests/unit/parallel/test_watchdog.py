"""The watchdogs' store: it is there until every rank has found it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from tunesmith.parallel import watchdog
from tunesmith.parallel.mesh import joined
from tunesmith.recipe.parallel import ParallelSection

SETTINGS = ParallelSection(timeout_s=3)


def fails_at_once(late_s: float) -> float:
    """Rank 1 comes `late_s` after the others know where to; nobody does anything there. Seconds it took."""
    broadcast, began = dist.broadcast_object_list, time.monotonic()

    def late(*arguments: Any, **named: Any) -> None:
        broadcast(*arguments, **named)
        time.sleep(late_s * int(os.environ["RANK"]))

    dist.broadcast_object_list = late
    try:
        with joined(SETTINGS, "cpu") as mesh, watchdog.watched(mesh, SETTINGS):
            pass
    finally:
        dist.broadcast_object_list = broadcast
    return time.monotonic() - began


def waits_in_vain() -> str:
    """Rank 1 never comes; what rank 0 is told."""
    watchdog._MEETING = timedelta(seconds=1)
    try:
        with joined(SETTINGS, "cpu") as mesh:
            if mesh.rank == 0:
                with watchdog.watched(mesh, SETTINGS):
                    return "all met"
            dist.broadcast_object_list([None], src=0)
            time.sleep(3)
    except watchdog.ParallelError as error:
        return str(error)
    finally:
        watchdog._MEETING = timedelta(seconds=60)
    return ""


def test_a_rank_that_comes_late_finds_the_store(ranks: Callable[..., list[Any]]) -> None:
    """Rank 0 waits 2 s for the others when it leaves; it used to count from before they had come."""
    assert all(2.5 <= seconds < 20 for seconds in ranks(fails_at_once, 2, 2.5))


def test_who_never_comes_is_waited_for_a_time(ranks: Callable[..., list[Any]]) -> None:
    (said, _) = ranks(waits_in_vain, 2)
    assert said.startswith("not every process has met rank 0")
