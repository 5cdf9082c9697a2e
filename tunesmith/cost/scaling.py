"""What a step's communication costs, how much of it computing hides, and a measured curve extended to more nodes.

One process's step of n:

    step = compute + optimiser + data + serial + exposed
    exposed = C - h min(C, compute)

C is the time of the messages that computing may hide (`step_messages`, `cost.collectives`), serial that of the others,
and h, the share that is hidden, the model's one free parameter: `fit_hidden` takes it from measured steps. Where
messages take longer than computing, hiding ends with the computing. What overlapping slows computing down by is in h,
and so is what messages take beyond their bytes, above all waiting for a late process: then h may be below 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from tunesmith.arch import ModelConfig
from tunesmith.cost.collectives import Cluster, Message, Ring, message_s, ring_of
from tunesmith.cost.shapes import Method
from tunesmith.cost.shards import Formats, HeldTensor, Layout, by_block, held_tensors
from tunesmith.formats import FORMATS
from tunesmith.units import MIB, ceil_div

BUCKET_BYTES = 25 * MIB
"""Gradients of one of DDP's messages: torch's default."""
Mode = Literal["weak", "strong"]


@dataclass(frozen=True)
class Work:
    """One process's part of a step. tokens: of a micro-batch."""

    tokens: int
    micro_batches: int = 1


@dataclass(frozen=True)
class Parts:
    """A measured step, in seconds. exposed_s: communication that nothing hid."""

    compute_s: float
    exposed_s: float = 0.0
    data_s: float = 0.0
    optimizer_s: float = 0.0

    @property
    def step_s(self) -> float:
        """All parts together."""
        return self.compute_s + self.exposed_s + self.data_s + self.optimizer_s


@dataclass(frozen=True)
class Point:
    """A step on `gpus` GPUs; is_projected: from the model, not measured."""

    gpus: int
    step_s: float
    tokens_per_s: float
    is_projected: bool = False


@dataclass(frozen=True)
class Talk:
    """Seconds of a step's messages: those that computing may hide, and those it waits for."""

    hideable_s: float
    serial_s: float


@dataclass(frozen=True)
class Overlap:
    """hidden_ratio: h of the module's formula. error_ratio: the worst miss of a measured step, as a share of it."""

    hidden_ratio: float
    error_ratio: float


def step_messages(
    config: ModelConfig, method: Method, layout: Layout, formats: Formats, work: Work
) -> tuple[Message, ...]:
    """Every message of a step of our own strategies, of the process that has most of them.

    Data-parallel: ddp sums gradients in buckets once; zero3 gathers each block twice and scatters its gradients in
    every micro-batch, zero2 gathers once a micro-batch, zero1 gathers and scatters once a step; adapters are summed in
    one message. Tensor-parallel: two gathers and two scatters of the stream a block forward, and again backward, and
    the sums of what is whole. Pipeline: activations and their gradients between neighbours.
    """
    tensors = list(held_tensors(config, method, layout, 0))
    return (
        *_data_messages(tensors, layout, formats, work),
        *_tensor_messages(config, tensors, layout, formats, work),
        *_pipeline_messages(config, layout, formats, work),
    )


def _data_messages(tensors: Sequence[HeldTensor], layout: Layout, formats: Formats, work: Work) -> list[Message]:
    if layout.data == 1:
        return []
    master = FORMATS[formats.master].bytes_for(1)
    if not layout.is_sharded:
        size = sum(tensor.values for tensor in tensors if tensor.is_trained) * master
        buckets = max(1, ceil_div(size, BUCKET_BYTES))
        return [Message("all_reduce", size / buckets, buckets)]
    weights, gradients = by_block(tensors, formats)
    scatters = 1 if layout.strategy == "zero1" else work.micro_batches
    messages = []
    for block, size in weights.items():
        # Outside the blocks nothing is resharded between the passes.
        passes = 2 if layout.strategy == "zero3" and block >= 0 else 1
        messages.append(Message("all_gather", size, passes * scatters))
    messages += [Message("reduce_scatter", size, scatters) for size in gradients.values()]
    adapters = sum(tensor.values for tensor in tensors if tensor.is_adapter)
    # Adapters are summed after the last backward pass: there is nothing left to hide them.
    return [*messages, Message("all_reduce", adapters * master, overlaps=False)] if adapters else messages


def _tensor_messages(
    config: ModelConfig, tensors: Sequence[HeldTensor], layout: Layout, formats: Formats, work: Work
) -> list[Message]:
    if layout.tensor == 1:
        return []
    stream = work.tokens * config.hidden_size * FORMATS[formats.compute].bytes_for(1)
    blocks = len({tensor.block for tensor in tensors if tensor.block >= 0})
    count = 4 * blocks * work.micro_batches
    moves = [Message(kind, stream, count, "tensor", overlaps=False) for kind in ("all_gather", "reduce_scatter")]
    whole = sum(tensor.values for tensor in tensors if tensor.is_trained and tensor.block < 0)
    size = whole * FORMATS[formats.master].bytes_for(1)
    return [*moves, Message("all_reduce", size, 1, "tensor", overlaps=False)] if size else moves


def _pipeline_messages(config: ModelConfig, layout: Layout, formats: Formats, work: Work) -> list[Message]:
    if layout.pipeline == 1:
        return []
    stream = work.tokens // layout.tensor * config.hidden_size * FORMATS[formats.compute].bytes_for(1)
    return [Message("send", stream, 2 * work.micro_batches, "pipeline", overlaps=False)]


def bubble_ratio(stages: int, micro_batches: int) -> float:
    """Share of a step in which a pipeline's stage waits: (p - 1) / (m + p - 1).

    Source: arXiv 1811.06965, section 2.3; the same under 1F1B (arXiv 2104.04473, section 2.2.1).
    """
    return (stages - 1) / (micro_batches + stages - 1)


def talk(messages: Sequence[Message], layout: Layout, cluster: Cluster) -> Talk:
    """Seconds of these messages on a cluster; tensor-parallel processes are neighbours, pipeline stages far apart."""
    rings: dict[str, Ring] = {
        "tensor": ring_of(layout.tensor, 1, cluster),
        "data": ring_of(layout.data, layout.tensor, cluster),
        "pipeline": ring_of(layout.pipeline, layout.tensor * layout.data, cluster),
    }
    seconds = [(message.overlaps, message_s(message, rings[message.over], cluster)) for message in messages]
    return Talk(sum(s for overlaps, s in seconds if overlaps), sum(s for overlaps, s in seconds if not overlaps))


def exposed_s(spoken: Talk, compute_s: float, hidden_ratio: float) -> float:
    """Seconds of communication that nothing hides (see the module)."""
    return spoken.serial_s + spoken.hideable_s - hidden_ratio * min(spoken.hideable_s, compute_s)


@dataclass(frozen=True)
class Measured:
    """A step of several processes, its parts, and what its messages should take by the model."""

    step_s: float
    parts: Parts
    talk: Talk

    @property
    def base_s(self) -> float:
        """The step without communication."""
        return self.parts.step_s - self.parts.exposed_s


def fit_hidden(measured: Sequence[Measured]) -> Overlap | None:
    """The hidden share that explains measured steps best, by least squares, 1 at most.

    Linear in h: step - base - serial - C = -h min(C, compute), so h is sum(m r) / sum(m m), m being the minimum and r
    what the step is shorter than nothing hidden.
    Returns: None where no step had anything to hide.
    """
    could = [min(one.talk.hideable_s, one.parts.compute_s) for one in measured]
    weight = sum(most * most for most in could)
    if weight == 0:
        return None
    saved = [one.base_s + one.talk.serial_s + one.talk.hideable_s - one.step_s for one in measured]
    hidden = min(1.0, sum(most * less for most, less in zip(could, saved, strict=True)) / weight)
    misses = [
        abs(one.base_s + exposed_s(one.talk, one.parts.compute_s, hidden) - one.step_s) / one.step_s for one in measured
    ]
    return Overlap(hidden, max(misses))


@dataclass(frozen=True)
class Curve:
    """What a projection starts from: a measured step's layout, work and parts, and how much is hidden."""

    config: ModelConfig
    method: Method
    layout: Layout
    formats: Formats
    work: Work
    parts: Parts
    hidden_ratio: float
    mode: Mode = "weak"

    def at(self, gpus: int, cluster: Cluster) -> Point:
        """A step on `gpus` GPUs of a cluster; `layout`'s tensor and pipeline sizes stay, data grows.

        Weak: every process does what it did. Strong: the step's micro-batches are divided among the processes.
        """
        model = self.layout.tensor * self.layout.pipeline
        layout = replace(self.layout, data=max(1, gpus // model))
        total = self.work.micro_batches * self.layout.data
        micro_batches = self.work.micro_batches if self.mode == "weak" else ceil_div(total, layout.data)
        work = replace(self.work, micro_batches=micro_batches)
        # A pipeline's stages wait for each other at both ends of a step, as long as `pipeline - 1` micro-batches take.
        ends = layout.pipeline - 1
        compute_s = self.parts.compute_s * (micro_batches + ends) / (self.work.micro_batches + ends)
        spoken = talk(step_messages(self.config, self.method, layout, self.formats, work), layout, cluster)
        step_s = compute_s + self.parts.data_s + self._optimizer_s(layout)
        step_s += exposed_s(spoken, compute_s, self.hidden_ratio)
        tokens = self.work.tokens * (total if self.mode == "strong" else micro_batches * layout.data)
        return Point(gpus, step_s, tokens / step_s, is_projected=True)

    def _optimizer_s(self, layout: Layout) -> float:
        """The update is of a share where states are sharded: bytes, and so the time, divide."""
        if not self.layout.is_sharded:
            return self.parts.optimizer_s
        return self.parts.optimizer_s * self.layout.data / layout.data


def extend(curve: Curve, cluster: Cluster, nodes: int) -> tuple[Point, ...]:
    """Steps on 1, 2, 4 ... nodes and on `nodes` themselves, all of their GPUs in use."""
    counts = [2**power for power in range(nodes.bit_length()) if 2**power < nodes] + [nodes]
    return tuple(curve.at(count * cluster.per_node, cluster) for count in counts)
