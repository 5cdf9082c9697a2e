"""A chat request that is ready for the engine."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from tunesmith.serve.answers import TokenNames
from tunesmith.serve.client import Job
from tunesmith.serve.schema.chat import ChatRequest
from tunesmith.serve.state import Server
from tunesmith.serve.tools import AnswerPlan


@dataclass
class ChatCall:
    """The jobs of a request, one for each of its n answers, and how the answers are written."""

    server: Server
    body: ChatRequest
    id: str
    model: str
    jobs: list[Job]
    deadline_s: float
    names: TokenNames
    plan: AnswerPlan | None
    created: int = field(default_factory=lambda: int(time.time()))

    def head(self, kind: str) -> dict[str, Any]:
        """The fields that every answer begins with."""
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with a chunk of usage."""
        return self.body.stream_options is not None and bool(self.body.stream_options.include_usage)

    @property
    def wants_usage_always(self) -> bool:
        """Whether every chunk of a stream has the usage so far."""
        return self.body.stream_options is not None and bool(self.body.stream_options.continuous_usage_stats)
