"""What all routes share: the engine, the texts, the queue's places, the numbers."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from starlette.requests import Request

from tunesmith.errors import nearest
from tunesmith.rundir.model_notes import read_notes
from tunesmith.serve.auth import key_of
from tunesmith.serve.client import AsyncEngine
from tunesmith.serve.errors import ApiError, engine_down
from tunesmith.serve.limits import Admission, Ticket, deadline_s
from tunesmith.serve.messages import End
from tunesmith.serve.metrics import Metrics
from tunesmith.serve.options import ServerOptions
from tunesmith.serve.text import ServedText

log = logging.getLogger(__name__)
REQUEST_ID_HEADER = "X-Request-Id"
_USUAL_SEQS = 256


@dataclass
class Adapter:
    """A LoRA adapter that was loaded while serving. single_turns: it learnt from single questions only."""

    path: str
    created: int
    follow: bool = False
    single_turns: bool = False


@dataclass
class Server:
    """The HTTP process's state. `text` is there once the engine has said where the tokenizer is."""

    options: ServerOptions
    engine: AsyncEngine
    metrics: Metrics
    admission: Admission
    created: int = field(default_factory=lambda: int(time.time()))
    adapters: dict[str, Adapter] = field(default_factory=dict)
    is_draining: bool = False
    model_text: ServedText | None = None
    reloading: asyncio.Task[None] | None = None
    has_adapters: bool = False

    @property
    def text(self) -> ServedText:
        """Tokenizer and template. Raises: ApiError (503) before they are loaded."""
        if self.model_text is None:
            raise engine_down("the model is being loaded")
        return self.model_text

    @property
    def name(self) -> str:
        """What the model is called."""
        return self.options.names[0]

    @property
    def max_model_len(self) -> int:
        """Tokens of context."""
        return int(self.engine.facts["max_model_len"])

    def adapter_of(self, model: str | None) -> str | None:
        """The adapter that a request's model names; None is the base.

        Raises: ApiError: 404 for an unknown name; 503 while adapters are loaded.
        """
        if model is None or model in self.options.names:
            return None
        if model in self.adapters:
            if not self.has_adapters:
                raise engine_down("the adapters are being loaded")
            return model
        known = [*self.options.names, *self.adapters]
        raise ApiError(
            404,
            f"there is no model {model!r} here{nearest(model, known)}; there are: {', '.join(known)}",
            param="model",
            code="model_not_found",
        )

    def check_ready(self) -> None:
        """Raises: ApiError (503) unless requests are taken and answered: also while adapters are loaded or it hangs."""
        if self.is_draining:
            raise engine_down("the server is shutting down")
        self.engine.check_up()
        _ = self.text
        if self.adapters and not self.has_adapters:
            raise engine_down("the adapters are being loaded")
        if not self.engine.is_healthy:
            raise engine_down(f"the engine has got nowhere for {self.engine.pulse.silent_s():.1f} s")

    def settle(self) -> None:
        """The engine says how many answers it makes at a time, where nobody else has: the queue begins behind these."""
        running = int(self.engine.facts["max_num_seqs"])
        self.admission.max_places, self.admission.max_by_key = _places(self.options, running)

    def enter(
        self, request: Request, num_answers: int, user: str | None, metadata: Mapping[str, str] | None = None
    ) -> Ticket:
        """Places for a request's answers. Raises: ApiError: 503 while there is no engine; 429 when all is full.

        Args: `user`, `metadata`: what the client says of itself, for the request log.
        """
        if self.is_draining:
            raise engine_down("the server is shutting down")
        self.engine.check_up()
        said = {"key": key_of(request), "answers": num_answers, "user": user, "metadata": metadata}
        request.scope["state"]["said"] = {name: value for name, value in said.items() if value}
        return self.admission.enter(key_of(request), num_answers)

    def deadline_s(self, request: Request, asked_s: float | None) -> float:
        """When the request's time is over, on the event loop's clock."""
        return deadline_s(request.headers, asked_s, self.options.max_timeout_s)


def make_server(options: ServerOptions, engine: AsyncEngine) -> Server:
    """The state of a server around an engine that may not have been started yet."""
    metrics = Metrics(options.metrics_prefix, options.names[0])
    engine.on_stats = metrics.engine.take
    engine.on_end = metrics.finished
    metrics.engine.gaps, metrics.engine.options = engine.gaps, engine.options
    server = Server(options, engine, metrics, Admission(*_places(options, engine.options.max_num_seqs or _USUAL_SEQS)))
    for given, follow in ((options.adapters, False), (options.followed, True)):
        for name, path in given:
            server.adapters[name] = make_adapter(path, server.created, follow)
    server.has_adapters = not server.adapters
    engine.on_restart = lambda: _reload(server)
    return server


def make_adapter(path: str, created: int, follow: bool = False) -> Adapter:
    """An adapter, and what its run knows of it."""
    directory = Path(path).expanduser()
    return Adapter(path, created, follow, directory.is_dir() and read_notes(directory).single_turns)


def _places(options: ServerOptions, running: int) -> tuple[int, int]:
    """Answers that may run and wait in all, and of one key."""
    places = running + options.max_waiting
    share = options.key_share_ratio if len(options.api_keys) > 1 else 1.0
    return places, max(1, int(places * share))


def _reload(server: Server) -> None:
    """A new engine process has none of the adapters that the last one had."""
    server.has_adapters = False
    server.reloading = asyncio.get_running_loop().create_task(load_adapters(server, is_strict=False))


async def load_adapters(server: Server, *, is_strict: bool = True) -> None:
    """Have the engine load all adapters that are known.

    Args: `is_strict`: raise for one that can't be loaded (ApiError); else it is dropped, and the log says why.
    """
    for name, adapter in list(server.adapters.items()):
        try:
            await server.engine.load_adapter(name, adapter.path, adapter.follow)
        except ApiError as error:
            if is_strict:
                raise
            if error.status == 503:
                return  # this engine is gone too; the next one is given them all
            log.error("the adapter %s can't be loaded again: %s", name, error.message)
            server.adapters.pop(name, None)
    server.has_adapters = True


async def load_text(server: Server) -> None:
    """Load tokenizer and template as soon as the engine process has said where they are."""
    facts = await asyncio.shield(server.engine.source)
    options = server.options

    def load() -> ServedText:
        return ServedText(
            facts, chat_template=options.chat_template, tool_parser=options.tool_call_parser,
            reasoning_parser=options.reasoning_parser,
        )  # fmt: skip

    server.model_text = await asyncio.get_running_loop().run_in_executor(None, load)


def make_id(prefix: str, request: Request, given: str | None) -> str:
    """The answer's id: the one that was given in the body or in X-Request-Id, else a new one."""
    wanted = given or request.headers.get(REQUEST_ID_HEADER, "")
    fits = 0 < len(wanted) <= 128 and all(c.isalnum() or c in "._:-" for c in wanted) and wanted.isascii()
    return f"{prefix}-{wanted if fits else secrets.token_hex(12)}"


def usage_of(ends: list[End], num_prompts: int, hidden_tokens: int = 0) -> dict[str, Any]:
    """OpenAI's usage object. The answers to one prompt count it once.

    Args: `ends`: of all answers, those to one prompt side by side; `hidden_tokens`: generated, but not asked for.
    """
    each = max(1, len(ends) // num_prompts)
    prompt = sum(end.prompt_tokens for end in ends[::each])
    cached = sum(end.cached_tokens for end in ends[::each])
    return usage(prompt, sum(end.completion_tokens for end in ends) - hidden_tokens, cached)


def usage(prompt_tokens: int, completion_tokens: int, cached_tokens: int) -> dict[str, Any]:
    """OpenAI's usage object."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
    }
