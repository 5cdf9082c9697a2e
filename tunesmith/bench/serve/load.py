"""One point in one process: sends requests when they are due, and watches whether the client keeps up."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import importlib
import importlib.util
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp

from tunesmith.bench.serve.client import Ask, open_session, send
from tunesmith.bench.serve.measures import percentile
from tunesmith.bench.serve.record import Record
from tunesmith.bench.serve.workload import Item

PROBE_S = 0.01
Tell = Callable[[Record], None]
"""Is told every request that has ended, when it has."""


@dataclass(frozen=True)
class Share:
    """What one process sends: its items and their numbers, at given times, or `concurrency` at once.

    times_s: when each is due from the point's start; None in a closed loop.
    """

    items: tuple[Item, ...]
    indices: tuple[int, ...]
    times_s: tuple[float, ...] | None
    concurrency: int = 1


@dataclass(frozen=True)
class Sent:
    """The records of a share, and how busy its process was: seconds of CPU and of the wall, late timers."""

    records: list[Record]
    cpu_s: float
    wall_s: float
    loop_late_s: float


def unheard(record: Record) -> None:
    """Tells nobody."""


def run_load(ask: Ask, share: Share, began: float, tell: Tell = unheard) -> Sent:
    """Send a share whose point starts at `began` on time.monotonic(), and wait for all answers."""
    with _no_collection():
        return _run(_load(ask, share, began, tell))


async def warm_up(ask: Ask, items: Sequence[Item]) -> list[Record]:
    """Send requests all at once, to be forgotten."""
    async with open_session() as session:
        began = time.monotonic()
        return list(
            await asyncio.gather(*(send(session, ask, item, index=i, began=began) for i, item in enumerate(items)))
        )


def run_warm_up(ask: Ask, items: Sequence[Item]) -> list[Record]:
    """`warm_up` in a loop of its own."""
    return _run(warm_up(ask, items))


def loop_name() -> str:
    """The event loop that requests are sent with."""
    return "asyncio" if importlib.util.find_spec("uvloop") is None else "uvloop"


def _run(work: Coroutine[Any, Any, Any]) -> Any:
    """By uvloop where it is installed, which halves the client's work."""
    if loop_name() == "uvloop":
        return importlib.import_module("uvloop").run(work)
    return asyncio.run(work)


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """A collection of garbage would stop all streams at once, and look like a slow server."""
    was = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


async def _load(ask: Ask, share: Share, began: float, tell: Tell) -> Sent:
    late: list[float] = []
    async with open_session() as session:
        await _sleep_until(began)
        cpu, wall = time.process_time(), time.monotonic()
        probe = asyncio.create_task(_watch(late))
        try:
            sender = _closed if share.times_s is None else _open
            records = await sender(session, ask, share, began, tell)
        finally:
            probe.cancel()
        cpu, wall = time.process_time() - cpu, time.monotonic() - wall
    return Sent(records, cpu, wall, percentile(late, 99) or 0.0)


async def _open(session: aiohttp.ClientSession, ask: Ask, share: Share, began: float, tell: Tell) -> list[Record]:
    """Each request at its time, whatever became of those before."""
    tasks = []

    async def one(item: Item, index: int, due: float) -> Record:
        record = await send(session, ask, item, index=index, began=began, intended_s=due)
        tell(record)
        return record

    for item, index, due in zip(share.items, share.indices, share.times_s or (), strict=True):
        await _sleep_until(began + due)
        tasks.append(asyncio.create_task(one(item, index, due)))
    return list(await asyncio.gather(*tasks))


async def _closed(session: aiohttp.ClientSession, ask: Ask, share: Share, began: float, tell: Tell) -> list[Record]:
    """As many workers as the concurrency says, each with one request in flight."""
    queue = iter(zip(share.items, share.indices, strict=True))
    records: list[Record] = []

    async def work() -> None:
        for item, index in queue:
            record = await send(session, ask, item, index=index, began=began)
            records.append(record)
            tell(record)

    await asyncio.gather(*(work() for _ in range(min(share.concurrency, len(share.items)))))
    return records


async def _sleep_until(moment: float) -> None:
    wait = moment - time.monotonic()
    if wait > 0:
        await asyncio.sleep(wait)


async def _watch(late: list[float]) -> None:
    """How late a short timer fires: what the loop adds to every time that it takes."""
    while True:
        due = time.monotonic() + PROBE_S
        await asyncio.sleep(PROBE_S)
        late.append(max(0.0, time.monotonic() - due))
