"""The HTTP process's side of the engine: requests out, answers in, and a dead engine started again."""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import Any, Literal, cast

from tunesmith.engine.request import SamplingParams
from tunesmith.errors import TunesmithError
from tunesmith.serve import messages
from tunesmith.serve.errors import ApiError, engine_down
from tunesmith.serve.mailbox import Choices, Mailbox
from tunesmith.serve.messages import Delta, End, Message
from tunesmith.serve.options import EngineOptions
from tunesmith.serve.params import params_to_plain
from tunesmith.serve.process import EngineLink, end_process, exit_words
from tunesmith.serve.pulse import Pulse, TokenGaps
from tunesmith.serve.wire import EngineWire

log = logging.getLogger(__name__)
Status = Literal["starting", "ready", "restarting", "stopped"]
_FIRST_BACKOFF_S, _LONGEST_BACKOFF_S = 0.5, 30.0
# An engine that has lived this long had not failed to start: the next restart waits no longer than the first.
_PROVEN_S = 60.0


class EngineStartError(TunesmithError, RuntimeError):
    """The engine process can't load the model. `exit_code` is what the command ends with."""

    def __init__(self, message: str, is_user_error: bool) -> None:
        super().__init__(message)
        self.exit_code = 2 if is_user_error else 1


@dataclass(frozen=True)
class Job:
    """One answer that is wanted, of so many to its prompt, side by side. See `messages.Submit`."""

    prompt_ids: Sequence[int]
    params: SamplingParams
    stream: bool = False
    continues: bool = False
    priority: int = 0
    adapter: str | None = None
    cache_salt: str = ""
    num_choices: int = 1


class AsyncEngine:
    """The engine behind the socket. Everything here runs on the event loop."""

    def __init__(
        self,
        launch: Callable[[], EngineLink],
        options: EngineOptions,
        *,
        stall_s: float = 10.0,
        hang_s: float = 300.0,
    ) -> None:
        self.launch = launch
        self.options = options
        self.stall_s = stall_s
        self.hang_s = hang_s
        self.status: Status = "starting"
        self.trouble: str | None = None
        self.failure: str | None = None
        self.num_restarts = 0
        self.source: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self.facts: dict[str, Any] = {}
        self.pulse = Pulse()
        self.on_stats: Callable[[dict[str, Any]], None] = lambda _: None
        self.on_end: Callable[[End, Choices], None] = lambda *_: None
        self.gaps = TokenGaps()
        self.on_restart: Callable[[], None] = lambda: None
        self.link: EngineLink | None = None
        self._ids = itertools.count(1)
        self._boxes: dict[int, tuple[Mailbox, int]] = {}
        self._orders: dict[int, asyncio.Future[Any]] = {}
        self._asked: list[asyncio.Future[dict[str, Any]]] = []
        self._transport: asyncio.Transport | None = None
        self._first: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._retry_at_s = self._down_s = 0.0
        self._supervisor: asyncio.Task[None] | None = None

    # -- its life ---------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin to load. `loaded` waits for the end of it."""
        self._supervisor = asyncio.create_task(self._supervise())

    async def loaded(self) -> None:
        """Wait until the engine answers. Raises EngineStartError when it can't load the model."""
        await asyncio.shield(self._first)

    async def stop(self) -> None:
        """End the engine process; whatever is under way fails."""
        was_ready, self.status = self.status == "ready", "stopped"
        self._fail_all(engine_down("the server is shutting down"))
        if self._supervisor is None:
            return
        if was_ready:
            self._send(messages.Shutdown())
            await asyncio.wait([self._supervisor], timeout=5)
        if not self._supervisor.done():  # it loads, hangs, or waits to be started again
            if self._transport is None:
                self._supervisor.cancel()
            elif self.link is not None:
                self.link.kill()
            await asyncio.wait([self._supervisor], timeout=5)
        self._supervisor.cancel()

    async def _supervise(self) -> None:
        failures = 0
        while True:
            began_s = time.monotonic()
            try:
                reason = await self._live()
            except Exception as error:
                log.exception("the engine process can't be run")
                reason = f"it can't be run: {error}"
            self._fail_all(engine_down(f"the engine stopped while it worked on this request ({reason}); send it again"))
            if self.status == "stopped":
                return
            if not self._first.done():
                self._cannot_start(EngineStartError(f"the engine process ended while it loaded: {reason}", False))
            if self._first.exception() is not None:
                return
            failures = 0 if time.monotonic() - began_s > _PROVEN_S else failures
            delay_s = min(_FIRST_BACKOFF_S * 2**failures, _LONGEST_BACKOFF_S)
            failures += 1
            self.status, self.trouble = "restarting", reason
            self.num_restarts += 1
            self._down_s = time.monotonic()
            self._retry_at_s = time.monotonic() + delay_s
            log.error("the engine stopped (%s); it is started again in %.1f s", reason, delay_s)
            await asyncio.sleep(delay_s)

    async def _live(self) -> str:
        """One engine process from its start to its end. Returns why it ended."""
        loop = asyncio.get_running_loop()
        self.failure = None
        link = self.link = self.launch()
        wire = EngineWire(self._take)
        self._transport, _ = cast(Any, await loop.create_connection(lambda: wire, sock=link.socket))
        watch = asyncio.create_task(self._watch(link))
        try:
            self._send(messages.Start(asdict(self.options)))
            await wire.closed
        finally:
            watch.cancel()
            self._transport.abort()
            self._transport = None
            code = await loop.run_in_executor(None, end_process, link)
        if wire.error is not None:
            return f"it sent what can't be read: {wire.error}"
        return self.failure or exit_words(code)

    async def _watch(self, link: EngineLink) -> None:
        """Kill a process whose loop hangs."""
        while True:
            await asyncio.sleep(min(0.5, self.hang_s / 4))
            if self.status == "ready" and (silent_s := self.pulse.silent_s()) > self.hang_s:
                self.failure = f"it got nowhere for {silent_s:.0f} s and was killed"
                log.error("the engine hangs: nothing from it for %.0f s", silent_s)
                link.kill()
                return

    def _cannot_start(self, error: EngineStartError) -> None:
        self._first.set_exception(error)
        if not self.source.done():
            self.source.set_exception(error)
            self.source.exception()

    def _fail_all(self, error: ApiError) -> None:
        boxes, self._boxes = self._boxes, {}
        for box, _ in boxes.values():
            box.fail(error)
        orders, self._orders = self._orders, {}
        asked, self._asked = self._asked, []
        for future in (*orders.values(), *asked):
            if not future.done():
                future.set_exception(error)

    def fail_all(self, error: ApiError) -> None:
        """End every request with an error; the engine is told to drop them."""
        for request_id in self._boxes:
            self._send(messages.Abort(request_id))
        self._fail_all(error)

    # -- messages ---------------------------------------------------------------------------------------------------

    def _send(self, message: Message) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(messages.pack(message))

    def _take(self, message: Message) -> None:
        match message:
            case messages.Outputs(rows):
                self._deliver(rows)
            case messages.Stats(stats):
                self._beat(stats)
            case messages.Rejected(request_id, text, is_user_error):
                self._reject(request_id, ApiError(400 if is_user_error else 500, text))
            case messages.Embedded(request_id, vectors):
                self._answer(request_id, vectors)
            case messages.Done(request_id):
                self._answer(request_id, None)
            case messages.Source(facts):
                if not self.source.done():
                    self.source.set_result(facts)
            case messages.Ready(facts):
                self.facts, self.status, self.trouble = facts, "ready", None
                self.pulse = Pulse()
                self.pulse.beat({})
                if self._first.done():
                    log.warning("the engine is ready again, %.1f s after it stopped", time.monotonic() - self._down_s)
                    self.on_restart()
                else:
                    self._first.set_result(None)
            case messages.Failed(text, is_user_error):
                self.failure = text
                if not self._first.done():
                    self._cannot_start(EngineStartError(text, is_user_error))

    def _beat(self, stats: dict[str, Any]) -> None:
        self.pulse.beat(stats)
        self.on_stats(stats)
        asked, self._asked = self._asked, []
        for future in asked:
            if not future.done():
                future.set_result(stats)

    def _deliver(self, rows: list[messages.Row]) -> None:
        """One step's outputs."""
        boxes, now, gaps = self._boxes, time.perf_counter(), self.gaps
        for row in rows:
            found = boxes.get(row[0])
            if found is None:
                continue  # it was aborted while this was on its way
            box, index = found
            if row[4] is not None and self._ends(row, box, index):
                continue
            if before := box.last_s[index]:
                gaps.add((now - before) / (len(row[1]) or 1))
            box.last_s[index] = now
            box.put(index, row)

    def _ends(self, row: messages.Row, box: Mailbox, index: int) -> bool:
        """An answer's end. Returns: whether it failed, and the whole request with it."""
        del self._boxes[row[0]]
        end = End(*row[4])
        self.on_end(end, box.choices[index])
        if end.finish_reason == "error":
            box.fail(_failure(end, box.is_structured))
        return end.finish_reason == "error"

    def _reject(self, request_id: int, error: ApiError) -> None:
        if (found := self._boxes.pop(request_id, None)) is not None:
            found[0].fail(error)
        if (order := self._orders.pop(request_id, None)) is not None and not order.done():
            order.set_exception(error)

    def _answer(self, request_id: int, value: Any) -> None:
        if (order := self._orders.pop(request_id, None)) is not None and not order.done():
            order.set_result(value)

    # -- what the routes call ---------------------------------------------------------------------------------------

    def check_up(self) -> None:
        """Raises: ApiError (503) while there is no engine."""
        if self.status == "ready" and self.failure is None:
            return
        if self.status == "ready":
            raise engine_down(f"the engine stopped and is being started again: {self.failure}", 1.0)
        if self.status == "restarting":
            wait_s = max(1.0, self._retry_at_s - time.monotonic())
            raise engine_down(f"the engine is being started again: {self.trouble}", wait_s)
        raise engine_down(f"the engine is {self.status}")

    @property
    def is_healthy(self) -> bool:
        """Whether the engine is there, has not said that it can't go on, and its loop makes progress."""
        return self.status == "ready" and self.failure is None and self.pulse.silent_s() <= self.stall_s

    @property
    def is_busy(self) -> bool:
        """Whether any answer is under way."""
        return bool(self._boxes or self._orders)

    def generate(self, jobs: Sequence[Job], deadline_s: float | None = None) -> Generation:
        """Submit the jobs. Raises: ApiError (503) while there is no engine.

        Args: `deadline_s`: on the event loop's clock; after it the answers are ended, and reading them raises (408).
        """
        self.check_up()
        return Generation(self, jobs, deadline_s)

    async def embed(self, inputs: list[list[int]], pooling: str) -> list[bytes]:
        """A vector for each input, as float32 bytes."""
        return cast("list[bytes]", await self._order(lambda order: messages.Embed(order, inputs, pooling)))

    async def load_adapter(self, name: str, path: str, follow: bool = False) -> None:
        """Load a LoRA adapter. Raises: ApiError when the engine refuses it."""
        await self._order(lambda order: messages.LoadAdapter(order, name, path, follow))

    async def unload_adapter(self, name: str) -> None:
        """Drop a LoRA adapter."""
        await self._order(lambda order: messages.UnloadAdapter(order, name))

    async def ask_stats(self) -> dict[str, Any]:
        """The engine's numbers as they are now."""
        self.check_up()
        future: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._asked.append(future)
        self._send(messages.AskStats())
        return await future

    async def _order(self, make: Callable[[int], Message]) -> Any:
        self.check_up()
        order = next(self._ids)
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._orders[order] = future
        self._send(make(order))
        try:
            return await future
        finally:
            if self._orders.pop(order, None) is not None:
                self._send(messages.Abort(order))


class Generation:
    """Answers under way. Leaving the `with` block aborts what has not ended."""

    def __init__(self, engine: AsyncEngine, jobs: Sequence[Job], deadline_s: float | None) -> None:
        self.engine = engine
        self.box = Mailbox(_choices(jobs), is_structured=any(job.params.structured is not None for job in jobs))
        self.ids: list[int] = []
        self._timer: asyncio.TimerHandle | None = None
        if deadline_s is not None:
            late = ApiError(408, "the request's time is over before its answer was complete", code="timeout")
            self._timer = asyncio.get_running_loop().call_at(deadline_s, self.box.fail, late)
        for index, job in enumerate(jobs):
            request_id = next(engine._ids)
            self.ids.append(request_id)
            engine._boxes[request_id] = (self.box, index)
            engine._send(_submit(request_id, job))

    async def take(self) -> dict[int, Delta]:
        """What is new, by the job's index; empty at the end. Raises: ApiError when the engine fails the request."""
        return await self.box.take()

    def __enter__(self) -> Generation:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        for request_id, choices in zip(self.ids, self.box.choices, strict=True):
            if self.engine._boxes.pop(request_id, None) is not None:
                self.engine._send(messages.Abort(request_id))
                self.engine.on_end(End("abort"), choices)


def _choices(jobs: Sequence[Job]) -> list[Choices]:
    """Those of each job: one for all answers to a prompt."""
    found: list[Choices] = []
    while len(found) < len(jobs):
        job = jobs[len(found)]
        found += [Choices(job.num_choices, job.params.max_tokens, job.num_choices)] * job.num_choices
    return found


def _submit(request_id: int, job: Job) -> messages.Submit:
    plain = params_to_plain(job.params)
    ids = list(job.prompt_ids)
    return messages.Submit(request_id, ids, plain, job.stream, job.continues, job.priority, job.adapter, job.cache_salt)


def _failure(end: End, is_structured: bool) -> ApiError:
    """The error of one answer; before its first token a constrained one can only have failed by its constraint."""
    status = 400 if is_structured and not end.completion_tokens else 500
    return ApiError(status, end.error or "the request failed in the engine", code="request_failed")
