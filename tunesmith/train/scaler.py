"""Dynamic loss scaling for float16. Source: arXiv 1710.03740, section 3.2.

The scale lives on the host, so a float16 run waits for the device once a step; no other precision does.
"""

from __future__ import annotations

from dataclasses import dataclass

from tunesmith.errors import NonFiniteError

SMALLEST = 2.0**-14
LARGEST = 2.0**24


@dataclass
class LossScaler:
    """The factor on the loss: halved at an overflow (that update is left out), doubled after a quiet stretch."""

    scale: float = 2.0**16
    growth_interval: int = 1000
    quiet_steps: int = 0
    skipped_steps: int = 0

    def update(self, overflow: bool) -> None:
        """Adapt to one step's outcome.

        Raises: NonFiniteError when even the smallest scale overflows: the model itself diverged.
        """
        if overflow:
            self._shrink()
            return
        self.quiet_steps += 1
        if self.quiet_steps == self.growth_interval:
            self.scale = min(self.scale * 2, LARGEST)
            self.quiet_steps = 0

    def _shrink(self) -> None:
        self.quiet_steps = 0
        self.skipped_steps += 1
        self.scale /= 2
        if self.scale < SMALLEST:
            raise NonFiniteError(
                f"gradients overflow float16 even with a loss scale of {SMALLEST:g}: lower train.learning_rate, "
                "or use train.precision: bfloat16 or float32"
            )
