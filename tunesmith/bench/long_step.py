"""One step on one long document under a cap of device memory, and what peaks of small models say of large ones."""

from __future__ import annotations

import gc
import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from tunesmith.arch import ModelConfig, read_config
from tunesmith.bench.counting import count_live_bytes
from tunesmith.checkpoint.source import resolve_model
from tunesmith.errors import DeviceError, NonFiniteError
from tunesmith.recipe.load import with_overrides
from tunesmith.recipe.schema import Recipe
from tunesmith.train.session import build_session

GB = 10**9
BLOCKS = (2, 4)
"""Of the probe's models. Of one block alone nothing is offloaded."""


@dataclass(frozen=True)
class Peaks:
    """peak = fixed + block * blocks + (token + token_and_block * blocks) * tokens, in bytes."""

    fixed: float
    block: float
    token: float
    token_and_block: float

    @classmethod
    def through(cls, lengths: Sequence[int], peaks: dict[tuple[int, int], int]) -> Peaks:
        """The surface through four peaks, by (blocks, tokens). Nothing gets smaller with more blocks or tokens."""
        (few, many), (short, long) = BLOCKS, lengths
        slopes = {n: (peaks[n, long] - peaks[n, short]) / (long - short) for n in BLOCKS}
        starts = {n: peaks[n, short] - slopes[n] * short for n in BLOCKS}
        both = max(0.0, (slopes[many] - slopes[few]) / (many - few))
        block = max(0.0, (starts[many] - starts[few]) / (many - few))
        return cls(starts[few] - block * few, block, max(1.0, slopes[few] - both * few), both)

    def bytes_for(self, blocks: int, tokens: int) -> float:
        """The peak of a step."""
        return self.fixed + self.block * blocks + (self.token + self.token_and_block * blocks) * tokens

    def most_tokens(self, blocks: int, cap_bytes: float) -> int:
        """The most tokens whose peak is at most the cap; 0 where not even the weights fit."""
        room = cap_bytes - self.bytes_for(blocks, 0)
        return max(0, int(room / (self.token + self.token_and_block * blocks)))


@dataclass(frozen=True)
class Step:
    """One step that was taken, or what kept it from being taken. build_s: the seconds until it could begin."""

    tokens: int
    peak_bytes: int | None = None
    reserved_bytes: int | None = None
    host_bytes: int | None = None
    build_s: float | None = None
    seconds: float | None = None
    loss: float | None = None
    error: str | None = None


def of_length(recipe: Recipe, tokens: int) -> Recipe:
    """The recipe on a document of so many tokens, one step."""
    changes = {"data.max_length": tokens, "train.micro_batch_tokens": tokens, "data.max_rows": 1, "train.max_steps": 1}
    return with_overrides(recipe, changes)


def config_of(recipe: Recipe) -> ModelConfig:
    """The configuration of a recipe's model."""
    return read_config(resolve_model(recipe.model.path, recipe.model.revision))


@contextmanager
def with_blocks(recipe: Recipe, blocks: int) -> Iterator[Recipe]:
    """The recipe with a model of so many blocks, random weights."""
    raw = dict(config_of(recipe).raw)
    with tempfile.TemporaryDirectory(prefix="tunesmith-probe-") as folder:
        Path(folder, "config.json").write_text(json.dumps({**raw, "num_hidden_layers": blocks}), encoding="utf-8")
        yield with_overrides(recipe, {"model.path": folder, "model.weights": "random"})


def take_step(recipe: Recipe) -> Step:
    """One step of a recipe whose length is set. Raises: what a step raises."""
    forget()
    is_gpu = torch.device(recipe.model.device).type == "cuda"
    began = time.perf_counter()
    session = build_session(recipe)
    try:
        ready = time.perf_counter()
        metrics = session.step()
        seconds = time.perf_counter() - ready
        peak = torch.cuda.max_memory_allocated() if is_gpu else count_live_bytes(session)
        reserved = torch.cuda.max_memory_reserved() if is_gpu else None
        offloader = getattr(session.model, "offloader", None)
        host = 0 if offloader is None else int(offloader.host.total_bytes)
    finally:
        session.close()
    return Step(int(recipe.data.max_length), peak, reserved, host, ready - began, seconds, metrics.loss)


def forget() -> None:
    """Give back what earlier steps hold, and count the peak anew."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def tried(recipe: Recipe, cap_bytes: int) -> Step:
    """A step under the cap; one that does not fit, or is not finite, is an answer too."""
    tokens = int(recipe.data.max_length)
    try:
        step = take_step(recipe)
    except (torch.OutOfMemoryError, MemoryError):
        return Step(tokens, error="device memory")
    except DeviceError as error:
        return Step(tokens, error=f"host memory: {error}")
    except NonFiniteError as error:
        return Step(tokens, error=f"not finite: {error}")
    if step.peak_bytes is not None and step.peak_bytes > cap_bytes:
        return Step(tokens, step.peak_bytes, step.reserved_bytes, step.host_bytes, error="device memory")
    return step
