"""The bar shown while many prompts are answered."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Any


class GenerationProgress:
    """Finished requests, tokens per second and the time left, on stderr; silent when not shown."""

    def __init__(self, num_requests: int, shown: bool) -> None:
        self.num_requests = num_requests
        self.num_tokens = 0
        self.started_s = time.perf_counter()
        self.bar: Any = _bar() if shown else None
        self.task: Any = None

    def __enter__(self) -> GenerationProgress:
        if self.bar is not None:
            self.bar.start()
            self.task = self.bar.add_task("generating", total=self.num_requests, rate="")
        return self

    def advance(self, num_finished: int, num_tokens: int) -> None:
        """Count what one step brought."""
        if self.bar is None:
            return
        self.num_tokens += num_tokens
        rate = self.num_tokens / max(time.perf_counter() - self.started_s, 1e-9)
        self.bar.update(self.task, advance=num_finished, rate=f"{rate:,.0f} tokens/s")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar is not None:
            self.bar.stop()


def _bar() -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    )
