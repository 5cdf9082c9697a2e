"""The engine process: `python -m tunesmith.serve.worker FD`. One loop owns the engine; threads only read and write.

reader thread --inbox--> loop: take messages, step the engine, hand over outputs --outbox--> writer thread
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any, Protocol

from tunesmith.engine.compiling import start_ahead
from tunesmith.engine.request import Completion, SamplingParams, StepOutput, TokenLogprobs
from tunesmith.errors import ParallelError, TunesmithError
from tunesmith.serve import messages
from tunesmith.serve.messages import End, Message
from tunesmith.serve.options import EngineOptions
from tunesmith.serve.params import params_from_plain

log = logging.getLogger(__name__)
BEAT_S = 0.25
LOADING_S = 0.02
ORPHAN_S = 10.0
_LEAVE = object()


class ServedEngine(Protocol):
    """What the loop asks of an engine (`engine.engine.Engine`)."""

    @property
    def has_work(self) -> bool:
        """Whether any request waits or runs."""

    def submit(
        self,
        prompt_ids: Any,
        params: SamplingParams,
        *,
        text_context: Any = (),
        priority: int = 0,
        adapter: str | None = None,
        cache_salt: str = "",
        streams: bool = True,
    ) -> int:
        """Queue a request."""

    def step(self) -> list[StepOutput]:
        """One step."""

    def idle(self) -> bool:
        """Something that makes later steps faster; False where nothing is left to do."""

    def abort(self, request_id: int) -> Completion | None:
        """End a request."""

    def stats(self) -> Any:
        """A dataclass of numbers."""


class Loaded(Protocol):
    """A model that is ready (`loading.LoadedModel`)."""

    facts: dict[str, Any]

    @property
    def engine(self) -> ServedEngine:
        """What serves it."""

    def text_context(self, prompt_ids: list[int]) -> list[int]:
        """The tokens of a prompt that an answer's text goes on from."""

    def embed(self, inputs: list[list[int]], pooling: str) -> Iterator[list[bytes]]:
        """The inputs' vectors, in portions of work."""

    def load_adapter(self, name: str, path: str, follow: bool) -> Callable[[], bool]:
        """Begin to load an adapter; what is returned tells, between steps, whether it is there, or raises why not."""

    def unload_adapter(self, name: str) -> None:
        """Drop an adapter."""

    def close(self) -> None:
        """End the processes that hold the model with this one."""


Load = Callable[[EngineOptions, Callable[[Message], None]], Loaded]


class Link:
    """The socket, with a thread that reads and one that writes. The loop never waits for the other side."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.inbox: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self.outbox: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self.closed = threading.Event()
        threading.Thread(target=self._read, name="reader", daemon=True).start()
        self.writer = threading.Thread(target=self._write, name="writer", daemon=True)
        self.writer.start()

    def send(self, message: Message) -> None:
        """Queue a message; it is packed in the writer's thread."""
        self.outbox.put(message)

    def _read(self) -> None:
        frames = messages.Frames()
        try:
            while data := self.connection.recv(2**20):
                for message in frames.feed(data):
                    self.inbox.put(message)
        except OSError:
            pass
        except Exception:
            log.exception("a message can't be read")
        self.closed.set()
        self.inbox.put(messages.Shutdown())

    def _write(self) -> None:
        with contextlib.suppress(OSError):
            while (message := self.outbox.get()) is not _LEAVE:
                self.connection.sendall(messages.pack(message))

    def close(self) -> None:
        """Send what is queued, then close."""
        self.outbox.put(_LEAVE)
        self.writer.join(timeout=2)
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)
        self.connection.close()


class Worker:
    """The loop."""

    def __init__(self, link: Link, model: Loaded) -> None:
        self.link = link
        self.model = model
        self.engine = model.engine
        self.engine_ids: dict[int, int] = {}  # the server's request -> the engine's
        self.requests: dict[int, messages.Submit] = {}  # the engine's -> the server's
        self.embeddings: dict[int, tuple[Iterator[list[bytes]], list[bytes]]] = {}
        self.loading: dict[int, Callable[[], bool]] = {}
        self.beat_at_s = 0.0
        self.num_failed_steps = 0
        self.is_leaving = False

    def run(self) -> None:
        """Until Shutdown, or the other side is gone. Raises what the engine can't go on after."""
        while not self.is_leaving:
            self._take_messages()
            if self.engine.has_work:
                self._step()
            self._embed()
            self._await_adapters()
            self._beat()

    def _prepare(self) -> bool:
        """Use a moment without work to make later steps faster; False where nothing is left to do."""
        return self.link.inbox.empty() and self.engine.idle()

    def _take_messages(self) -> None:
        """All that wait; where there is nothing else to do, sleep until the next."""
        idle = not (self.engine.has_work or self.embeddings)
        wait_s = LOADING_S if self.loading else BEAT_S
        if idle and self._prepare():
            idle = False
        with contextlib.suppress(queue.Empty):
            self._handle(self.link.inbox.get(timeout=wait_s) if idle else self.link.inbox.get_nowait())
            while not self.is_leaving:
                self._handle(self.link.inbox.get_nowait())

    def _handle(self, message: Message) -> None:
        match message:
            case messages.Submit():
                self._guarded(message.id, lambda: self._submit(message))
            case messages.Abort(request_id):
                self._abort(request_id)
            case messages.Embed(request_id, inputs, pooling):
                self.embeddings[request_id] = (self.model.embed(inputs, pooling), [])
            case messages.LoadAdapter(request_id, name, path, follow):
                self._guarded(request_id, lambda: self._load_adapter(request_id, name, path, follow))
            case messages.UnloadAdapter(request_id, name):
                self._guarded(request_id, lambda: self._unload_adapter(request_id, name))
            case messages.AskStats():
                self.beat_at_s = 0.0
            case messages.Shutdown():
                self.is_leaving = True

    def _guarded(self, request_id: int, work: Callable[[], None]) -> None:
        """What goes wrong with one request is that request's error."""
        try:
            work()
        except Exception as error:
            self._reject(request_id, error)

    def _load_adapter(self, request_id: int, name: str, path: str, follow: bool) -> None:
        self.loading[request_id] = self.model.load_adapter(name, path, follow)

    def _unload_adapter(self, request_id: int, name: str) -> None:
        self.model.unload_adapter(name)
        self.link.send(messages.Done(request_id))

    def _await_adapters(self) -> None:
        """Tell whoever waits for an adapter that is there now, or can't be loaded."""
        for request_id, is_loaded in list(self.loading.items()):
            try:
                if not is_loaded():
                    continue
                self.link.send(messages.Done(request_id))
            except Exception as error:
                self._reject(request_id, error)
            del self.loading[request_id]

    def _reject(self, request_id: int, error: Exception) -> None:
        is_user_error = isinstance(error, TunesmithError) and isinstance(error, ValueError)
        if not is_user_error:
            log.error("a request failed", exc_info=error)
        text = str(error) if isinstance(error, TunesmithError) else f"{type(error).__name__}: {error}"
        self.link.send(messages.Rejected(request_id, text, is_user_error))

    def _submit(self, message: messages.Submit) -> None:
        engine_id = self.engine.submit(
            message.prompt_ids,
            params_from_plain(message.params),
            text_context=self.model.text_context(message.prompt_ids) if message.continues else (),
            priority=message.priority,
            adapter=message.adapter,
            cache_salt=message.cache_salt,
            streams=message.stream,
        )
        self.engine_ids[message.id] = engine_id
        self.requests[engine_id] = message

    def _abort(self, request_id: int) -> None:
        self.embeddings.pop(request_id, None)
        self.loading.pop(request_id, None)
        engine_id = self.engine_ids.pop(request_id, None)
        if engine_id is not None:
            del self.requests[engine_id]
            self.engine.abort(engine_id)

    def _step(self) -> None:
        try:
            outputs = self.engine.step()
        except Exception as error:
            self._step_failed(error)
            return
        self.num_failed_steps = 0
        rows = [row for output in outputs if (row := self._row(output)) is not None]
        if rows:
            self.link.send(messages.Outputs(rows))

    def _step_failed(self, error: Exception) -> None:
        """Whoever was in the step is told. A second failure in a row ends this process, as do a device that is broken
        and the end of a process that shares the model."""
        log.error("a step failed; every request that was running ends", exc_info=error)
        self.num_failed_steps += 1
        is_final = isinstance(error, ParallelError) or type(error).__name__ == "AcceleratorError"
        is_final |= self.num_failed_steps > 1 or "CUDA error" in str(error)
        if is_final:  # before anyone is told of its request, so that /health is true by then
            self.link.send(messages.Failed(f"a step failed: {error}", False))
        for request_id in list(self.engine_ids):
            self._abort(request_id)
            self.link.send(messages.Rejected(request_id, f"a step of the engine failed: {error}", False))
        if is_final:
            raise error

    def _row(self, output: StepOutput) -> list[Any] | None:
        """What the server is told of an output; None where it waits for the end, or the request is gone."""
        message = self.requests.get(output.request_id)
        if message is None:
            return None
        done = output.completion
        if done is None:
            if not message.stream:
                return None
            return [message.id, output.token_ids, output.piece, plain_logprobs(output.logprobs), None]
        del self.requests[output.request_id]
        self.engine_ids.pop(message.id, None)
        if message.stream:
            return [message.id, output.token_ids, output.piece, plain_logprobs(output.logprobs), _end(done)]
        return [message.id, done.token_ids, done.text, plain_logprobs(done.logprobs), _end(done)]

    def _embed(self) -> None:
        """One portion of the oldest embedding request: the steps of other requests go on between portions."""
        if not self.embeddings:
            return
        request_id, (portions, done) = next(iter(self.embeddings.items()))
        try:
            done += next(portions)
        except StopIteration:
            del self.embeddings[request_id]
            self.link.send(messages.Embedded(request_id, done))
        except Exception as error:
            del self.embeddings[request_id]
            self._reject(request_id, error)

    def _beat(self) -> None:
        now = time.monotonic()
        if now - self.beat_at_s >= BEAT_S:
            self.beat_at_s = now
            self.link.send(messages.Stats({**asdict(self.engine.stats()), "num_known": len(self.requests)}))


def plain_logprobs(logprobs: Any) -> list[Any] | None:
    """TokenLogprobs as lists."""
    return None if logprobs is None else [_plain_logprob(entry) for entry in logprobs]


def _plain_logprob(entry: TokenLogprobs | None) -> list[Any] | None:
    return None if entry is None else [entry.token_id, entry.logprob, entry.top]


def _end(done: Completion) -> list[Any]:
    return End(
        finish_reason=done.finish_reason,
        stop_reason=done.stop_reason,
        prompt_tokens=done.prompt_tokens,
        completion_tokens=len(done.token_ids),
        cached_tokens=done.cached_tokens,
        error=done.error,
        prompt_logprobs=plain_logprobs(done.prompt_logprobs),
        queued_s=done.timings.queued_s,
        ttft_s=done.timings.ttft_s,
        total_s=done.timings.total_s,
    ).as_list()


def serve(link: Link, load: Load) -> int:
    """Load what the first message says, then run the loop. Returns the exit code."""
    try:
        start = link.inbox.get()
        if not isinstance(start, messages.Start):
            return 0
        try:
            model = load(EngineOptions(**start.options), link.send)
        except Exception as error:
            is_user_error = isinstance(error, TunesmithError) and isinstance(error, ValueError)
            if not isinstance(error, TunesmithError):
                log.error("the model can't be loaded", exc_info=error)
            text = str(error) if isinstance(error, TunesmithError) else f"{type(error).__name__}: {error}"
            link.send(messages.Failed(text, is_user_error))
            return 2 if is_user_error else 1
        link.send(messages.Ready(model.facts))
        try:
            Worker(link, model).run()
        except TunesmithError as error:  # outside of any step
            link.send(messages.Failed(str(error), False))  # what /health says while the engine is started again
            raise
        finally:
            model.close()
        return 0
    finally:
        link.close()


def main(argv: list[str]) -> None:
    """The process. Its end is the server's business, so a terminal's or a manager's signals to all are not taken."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    logging.basicConfig(level=logging.WARNING, format="engine: %(message)s", stream=sys.stderr)
    link = Link(socket.socket(fileno=int(argv[0])))
    threading.Thread(target=_leave_with, args=(link,), daemon=True).start()

    def load(options: EngineOptions, send: Callable[[Message], None]) -> Loaded:
        start_ahead(options.kernels())  # while torch is imported
        from tunesmith.serve.loading import load_model

        return load_model(options, send)

    code = 1
    try:
        code = serve(link, load)
    except Exception:
        log.exception("the engine can't go on")
    sys.stderr.flush()
    os._exit(code)  # a device's threads may not end by themselves


def _leave_with(link: Link) -> None:
    """A server that is gone takes its engine with it, even one that loads or hangs."""
    link.closed.wait()
    time.sleep(ORPHAN_S)
    os._exit(1)


if __name__ == "__main__":
    main(sys.argv[1:])
