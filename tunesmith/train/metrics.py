"""What a step and a validation report: the rows of metrics.jsonl."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from tunesmith.train.clock import StepTime
from tunesmith.train.update import Update


@dataclass(frozen=True)
class StepMetrics:
    """One optimiser step. Unknown is None, never zero.

    loss: mean over the trained tokens of the global batch. tokens: real tokens, fillers left out.
    duration_s: of the step, the wait for data included; on a GPU from the end of the step before, by its own events.
    data_wait_s: the part in which the device had nothing to do for want of data. skipped: the update was left out
    (float16 overflow).
    """

    step: int
    epoch: float
    loss: float
    grad_norm: float
    learning_rate: float
    tokens: int
    trained_tokens: int
    samples: int
    duration_s: float
    data_wait_s: float
    tokens_seen: int
    micro_batches: int = 1
    skipped: bool = False
    loss_scale: float | None = None
    device_allocated_bytes: int | None = None
    device_peak_bytes: int | None = None
    host_resident_bytes: int | None = None
    model_flops: int | None = None
    model_flops_per_s: float | None = None
    mfu_ratio: float | None = None

    @property
    def tokens_per_s(self) -> float:
        """Real tokens a second."""
        return self.tokens / self.duration_s

    @property
    def samples_per_s(self) -> float:
        """Documents a second."""
        return self.samples / self.duration_s

    def row(self) -> dict[str, Any]:
        """The row of metrics.jsonl."""
        rates = {"tokens_per_s": self.tokens_per_s, "samples_per_s": self.samples_per_s}
        return {"event": "step", **asdict(self), **rates}


def step_metrics(update: Update, time: StepTime, **facts: Any) -> StepMetrics:
    """The row of a step from what the update and the clock say, and the other fields as `facts`."""
    return StepMetrics(
        loss=update.loss,
        grad_norm=update.grad_norm,
        learning_rate=update.learning_rate,
        trained_tokens=update.count,
        skipped=update.skipped,
        duration_s=time.duration_s,
        data_wait_s=time.data_wait_s,
        **facts,
    )


@dataclass(frozen=True)
class EvalMetrics:
    """A validation: mean loss over the trained tokens of the validation data, and its exponential."""

    step: int
    loss: float
    perplexity: float
    tokens: int
    trained_tokens: int
    duration_s: float

    def row(self) -> dict[str, Any]:
        """The row of metrics.jsonl."""
        names = {"loss": "validation_loss", "perplexity": "validation_perplexity"}
        return {"event": "validation", **{names.get(key, key): value for key, value in asdict(self).items()}}
