"""tunesmith itself, in a process like any peer's: the recipe's own session, its own data, its own optimiser."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from tunesmith.bench.cell import timed_step, timed_steps
from tunesmith.bench.peers.batches import digest, documents_of
from tunesmith.bench.peers.job import Job
from tunesmith.bench.peers.loop import Recorder, dtypes_of
from tunesmith.bench.peers.timing import CONTINUOUS
from tunesmith.bench.peers.wire import Say, serve
from tunesmith.train.metrics import StepMetrics
from tunesmith.train.session import Session, build_session


def run(mapping: Mapping[str, Any], say: Say) -> dict[str, Any]:
    """Train the job's row."""
    job = Job.of(mapping)
    session = build_session(job.recipe)
    try:
        return _train(session, job, say)
    finally:
        session.close()


def _train(session: Session, job: Job, say: Say) -> dict[str, Any]:
    first = [documents_of(batch, job.recipe.data) for batch in session.host_window(0).batches]
    recorder = Recorder(job, say)
    done: list[StepMetrics] = []
    for metrics, seconds in _steps(session, recorder, len(job.rates)):
        recorder.add(seconds, metrics.loss, metrics.grad_norm)
        done.append(metrics)
    return {
        **recorder.finish(),
        "digest": digest(first),
        "tokens": [step.tokens for step in done],
        "trained_tokens": [step.trained_tokens for step in done],
        **dtypes_of(session.module, session.optimizer),
        "attention": "packed",
        "autocast": False,
    }


def _steps(session: Session, recorder: Recorder, steps: int) -> Iterator[tuple[StepMetrics, float]]:
    """Every step and its seconds: one after the other, or the timed ones queued as training queues them."""
    alone = recorder.warmup if recorder.timing == CONTINUOUS else steps
    for _ in range(alone):
        recorder.begin()
        yield timed_step(session)
    if alone < steps:
        recorder.begin()
        yield from timed_steps(session, steps - alone)


if __name__ == "__main__":
    serve(run)
